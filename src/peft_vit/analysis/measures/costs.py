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
from peft_vit.method_settings import Frozen

Part = Literal["scoring", "reallocation"]


class OverheadParameters(Frozen):
    """Of `overhead_below`."""

    of: Selection
    parts: tuple[Part, ...] = Field(min_length=1)
    limit: float = Field(gt=0, description="share of the steps' seconds")


def overhead_below(evidence: Evidence, parameters: OverheadParameters, needs: Sequence[str]) -> tuple[Measured, ...]:
    """Return by how much the seconds of some parts, as a share of all steps' seconds, lie below a limit."""

    def spare(run: Run) -> float | None:
        share = overhead_share(run, parameters.parts)
        return None if share is None else parameters.limit - share

    return tuple(
        by_seed(subject, spare, "whose records do not tell scoring from reallocation (older version)")
        for subject in evidence.subjects(parameters.of, needs)
    )


def overhead_share(run: Run, parts: Sequence[Part]) -> float | None:
    """Return the share of the steps' seconds; older records know only the sum of both parts, as "allocation"."""
    seconds, steps = run.record.overhead_s, math.fsum(row.seconds for row in run.record.steps)
    if steps <= 0:
        return None
    if all(part in seconds for part in parts):
        return math.fsum(seconds[part] for part in parts) / steps
    return (
        seconds["allocation"] / steps if set(parts) == {"scoring", "reallocation"} and "allocation" in seconds else None
    )


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
    if run.record.quantization is None or run.experiment.qa_lora is None:
        return None
    size = measured_size(run.experiment.qa_lora, [run])
    if scope == "layers":
        return FLOAT32_BITS / size.layers_bits
    return None if size.model is None else FLOAT32_BITS / size.model.bits_per_weight


COST_MEASURES = {
    "memory_factor": Measure(MemoryParameters, lambda _: "factor", memory_factor),
    "overhead_below": Measure(OverheadParameters, lambda _: "share", overhead_below),
}
