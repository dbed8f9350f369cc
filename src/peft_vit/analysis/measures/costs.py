"""Measures of seconds and bytes of a run."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from peft_vit.analysis.measures.evidence import OfParameters
from peft_vit.analysis.size import FLOAT32_BITS, measured_size
from peft_vit.analysis.studies import Run
from peft_vit.config import QaLoraConfig


class OverheadParameters(OfParameters):
    """Of `overhead_below`."""

    parts: tuple[Literal["scoring", "reallocation"], ...] = Field(min_length=1)
    limit: float = Field(gt=0, description="over the steps' seconds without scoring and reallocation")


def overhead_below(run: Run, parameters: OverheadParameters) -> float | None:
    """Return by how much the seconds of some parts, over those of the steps without them, lie below a limit.

    A step's seconds hold what hooks take in it, so scoring and reallocation are taken off first. Older records know
    only the sum of both, as "allocation".
    """
    known, both = run.record.overhead_s, {"scoring", "reallocation"}
    asked: set[str] = set(parameters.parts)
    taken_off = both
    if not both <= known.keys():
        if asked != both or "allocation" not in known:
            return None
        asked = taken_off = {"allocation"}
    plain = math.fsum(row.seconds for row in run.record.steps) - math.fsum(known[name] for name in taken_off)
    return None if plain <= 0 else parameters.limit - math.fsum(known[name] for name in asked) / plain


class MemoryParameters(OfParameters):
    """Of `memory_factor`."""

    scope: Literal["layers", "model"]


def memory_factor(run: Run, parameters: MemoryParameters) -> float | None:
    """Return how many times smaller than float32 the quantized layers, or the whole model, are; everything counted."""
    settings = run.experiment.section(QaLoraConfig)
    if run.record.quantization is None or settings is None:
        return None
    size = measured_size(settings, [run])
    if parameters.scope == "layers":
        return FLOAT32_BITS / size.layers_bits
    return None if size.model is None else FLOAT32_BITS / size.model.bits_per_weight
