"""Measures of seconds and bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from peft_vit.analysis.measures.evidence import Evidence, Measure, Measured, by_seed
from peft_vit.analysis.measures.selection import Selection
from peft_vit.analysis.size import FLOAT32_BITS, measured_size
from peft_vit.analysis.studies import Run
from peft_vit.config import Frozen, QaLoraConfig

Part = Literal["scoring", "reallocation"]


class OverheadParameters(Frozen):
    """Of `overhead_below`."""

    of: Selection
    parts: tuple[Part, ...] = Field(min_length=1)
    limit: float = Field(gt=0, description="over the steps' seconds without scoring and reallocation")


def overhead_below(evidence: Evidence, parameters: OverheadParameters, needs: Sequence[str]) -> tuple[Measured, ...]:
    """Return by how much the seconds of some parts, over those of the steps without them, lie below a limit."""

    def spare(run: Run) -> float | None:
        share = overhead_share(run, parameters.parts)
        return None if share is None else parameters.limit - share

    return tuple(
        by_seed(subject, spare, "whose records do not tell scoring from reallocation (older version)")
        for subject in evidence.subjects(parameters.of, needs)
    )


def overhead_share(run: Run, parts: Sequence[Part]) -> float | None:
    """Return the seconds of some parts over the seconds that the steps take without any; None if that is not known.

    A step's seconds hold what hooks take in it, so scoring and reallocation are taken off first. Older records know
    only the sum of both, as "allocation".
    """
    known = run.record.overhead_s
    names = ["scoring", "reallocation"] if {"scoring", "reallocation"} <= known.keys() else ["allocation"]
    if not known.keys() >= set(names) or (names == ["allocation"] and set(parts) != {"scoring", "reallocation"}):
        return None
    plain = math.fsum(row.seconds for row in run.record.steps) - math.fsum(known[name] for name in names)
    asked = parts if names != ["allocation"] else names
    return None if plain <= 0 else math.fsum(known[name] for name in asked) / plain


class MemoryParameters(Frozen):
    """Of `memory_factor`."""

    of: Selection
    scope: Literal["layers", "model"]


def memory_factor(evidence: Evidence, parameters: MemoryParameters, needs: Sequence[str]) -> tuple[Measured, ...]:
    """Return how many times smaller than float32 the quantized layers, or the whole model, are; everything counted."""
    return tuple(
        by_seed(subject, lambda run: _factor(run, parameters.scope), "whose records lack the model's size")
        for subject in evidence.subjects(parameters.of, needs)
    )


def _factor(run: Run, scope: Literal["layers", "model"]) -> float | None:
    qa_lora = run.experiment.section(QaLoraConfig)
    if run.record.quantization is None or qa_lora is None:
        return None
    size = measured_size(qa_lora, [run])
    if scope == "layers":
        return FLOAT32_BITS / size.layers_bits
    return None if size.model is None else FLOAT32_BITS / size.model.bits_per_weight


COST_MEASURES = {
    "memory_factor": Measure(MemoryParameters, lambda _: "factor", memory_factor),
    "overhead_below": Measure(OverheadParameters, lambda _: "share", overhead_below),
}
