"""Measures of seconds and bytes of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from functools import partial

from peft_vit.analysis.measures.evidence import Evidence, Group, Measured, each_run
from peft_vit.analysis.quantization import FLOAT32_BITS, layers_bits, model_bytes
from peft_vit.analysis.studies import Run

OVERHEAD_LIMIT = 0.10  # over the steps' seconds without scoring and reallocation


def overhead_below(evidence: Evidence, of: Group, parts: Set[str]) -> tuple[Measured, ...]:
    """Return by how much the seconds of scoring, reallocation or both, over those of plain steps, lie below a limit.

    A step's seconds hold what hooks take in it, so scoring and reallocation are taken off first. Older records know
    only the sum of both, as "allocation".
    """
    without = "whose records do not tell scoring from reallocation (older version)"
    return each_run(evidence, of, ("overhead_s", "steps"), partial(_overhead_below, parts=parts), without)


def _overhead_below(run: Run, parts: Set[str]) -> float | None:
    known, both = run.record.overhead_s, {"scoring", "reallocation"}
    asked, taken_off = parts, both
    if not both <= known.keys():
        if asked != both or "allocation" not in known:
            return None
        asked = taken_off = {"allocation"}
    plain = math.fsum(row.seconds for row in run.record.steps) - math.fsum(known[name] for name in taken_off)
    return None if plain <= 0 else OVERHEAD_LIMIT - math.fsum(known[name] for name in asked) / plain


def memory_factor(evidence: Evidence, of: Group, value: Callable[[Run], float | None]) -> tuple[Measured, ...]:
    """Return how many times smaller than float32 quantized weights are, by `layers_factor` or `model_factor`."""
    return each_run(evidence, of, ("quantization",), value, "whose records lack the model's size")


def layers_factor(run: Run) -> float:
    """Return the factor of the quantized layers, scales and offsets included."""
    return FLOAT32_BITS / layers_bits([run])


def model_factor(run: Run) -> float | None:
    """Return the factor of the whole model, everything counted."""
    model = model_bytes([run])
    return None if model is None else FLOAT32_BITS / model.bits_per_weight
