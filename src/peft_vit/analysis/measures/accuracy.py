"""Measures of what runs predict, and differences of anything that a run has between paired runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from peft_vit.analysis.allocation import fixed_lora_line
from peft_vit.analysis.comparison import Comparison, compare
from peft_vit.analysis.convergence import late_loss_deviation, roughness
from peft_vit.analysis.measures.evidence import (
    Evidence,
    Measured,
    NoDataError,
    OfParameters,
    Subject,
    Subjects,
    Unit,
    by_seed,
    joined,
    records_of,
    together,
)
from peft_vit.analysis.measures.ranks import rank_entropy, rank_gini
from peft_vit.analysis.measures.selection import Reference
from peft_vit.analysis.studies import Run


@dataclass(frozen=True)
class _Quantity:
    unit: Unit
    value: Callable[[Run], float | None]


Quantity = Literal[
    "test_accuracy",
    "validation_accuracy",
    "balanced_accuracy",
    "nll",
    "ece",
    "late_loss_deviation",
    "roughness",
    "rank_gini",
    "rank_entropy",
    "seconds_per_step",
    "own_memory_bytes",
]
_QUANTITIES: dict[Quantity, _Quantity] = {
    "test_accuracy": _Quantity("share", lambda run: run.test.accuracy),
    "validation_accuracy": _Quantity("share", lambda run: None if run.validation is None else run.validation.accuracy),
    "balanced_accuracy": _Quantity("share", lambda run: run.test.balanced_accuracy),
    "nll": _Quantity("nats", lambda run: run.test.nll),
    "ece": _Quantity("share", lambda run: run.test.ece),
    "late_loss_deviation": _Quantity("nats", late_loss_deviation),
    "roughness": _Quantity("nats", roughness),
    "rank_gini": _Quantity("index", rank_gini),
    "rank_entropy": _Quantity("index", rank_entropy),
    "seconds_per_step": _Quantity("s", lambda run: run.record.seconds_per_step),
    "own_memory_bytes": _Quantity("bytes", lambda run: run.record.own_memory_bytes),
}


class DifferenceParameters(OfParameters):
    """Of `difference`."""

    against: Reference
    quantity: Quantity
    better: Literal["higher", "lower"]


def unit_of_difference(parameters: DifferenceParameters) -> Unit:
    """Return the unit of the quantity."""
    return _QUANTITIES[parameters.quantity].unit


def difference(evidence: Evidence, subjects: Subjects, parameters: DifferenceParameters) -> tuple[Measured, ...]:
    """Return, by pair of experiments, the quantity of the first minus that of the second, paired by seed.

    With `better: lower` the other way round, so that positive is better. Pairs share weights, images and split.
    """
    value = _QUANTITIES[parameters.quantity].value
    sign = 1.0 if parameters.better == "higher" else -1.0
    found = []
    for subject in subjects:
        for other in evidence.partners(subject.experiment, parameters.against):
            compared = compare(subject.runs, evidence.study.of(other.name), subject.name, other.name, value)
            found.append(_of_comparison(evidence, subject, compared, [other.name], sign))
    if not found:
        raise NoDataError(f"no experiment {parameters.of.words()} has a partner {parameters.against.words()}")
    return tuple(found)


def _of_comparison(
    evidence: Evidence, subject: Subject, compared: Comparison, against: Sequence[str], sign: float = 1.0
) -> Measured:
    """Return the differences of a comparison; `against` are the experiments whose runs it used on the other side."""
    unpaired = [run.seed for run in subject.runs if run.seed not in compared.seeds]
    without = f"seeds without a pair: {joined(unpaired)}" if unpaired and compared.seeds else ""
    return Measured(
        subject=f"{compared.name} against {compared.reference}",
        values=tuple(sign * one for one in compared.by_seed),
        labels=tuple(str(seed) for seed in compared.seeds),
        n_of="pairs",
        records=records_of(evidence.study, (compared.name, *against), compared.seeds),
        note=together(subject.note, compared.note, without),
    )


_SCALED = "it also scales its adapters' gradients, which the float twin does not"


def against_float(evidence: Evidence, subjects: Subjects, parameters: OfParameters) -> tuple[Measured, ...]:
    """Return test accuracy minus that of the experiment that differs only in that its weights are float."""
    found = []
    for subject in subjects:
        impact = evidence.quantization.get(subject.name)
        if impact is not None:
            compared = impact.against_unquantized
            if impact.settings.gradient_scaling_factor != 1 or impact.settings.gradient_scaling != "constant":
                compared = replace(compared, note=together(compared.note, _SCALED))
            found.append(_of_comparison(evidence, subject, compared, [compared.reference]))
    if not found:
        raise NoDataError(f"no record has what quantization did to an experiment {parameters.of.words()}")
    return tuple(found)


def at_equal_parameters(evidence: Evidence, subjects: Subjects, parameters: OfParameters) -> tuple[Measured, ...]:
    """Return test accuracy minus that of fixed LoRA at as many trainable parameters, see `against_fixed_lora`."""
    loras = [lora.name for lora in evidence.study.fixed_rank_loras()]
    found = []
    for subject in subjects:
        allocated = evidence.allocation.get(subject.name)
        if allocated is not None:
            found.append(_of_comparison(evidence, subject, allocated.against_fixed, loras))
    if not found:
        raise NoDataError(f"no record has the ranks of an experiment {parameters.of.words()}")
    return tuple(found)


def parameters_at_equal_accuracy(evidence: Evidence, subjects: Subjects, _: OfParameters) -> tuple[Measured, ...]:
    """Return log2 of a run's trainable parameters over those that fixed LoRA needs for its test accuracy.

    What fixed LoRA needs is where the line through the same seed's runs, linear in the logarithm of trainable
    parameters, first reaches the accuracy. A run that is less accurate than the smallest of them needs at most that
    one, a run that is more accurate than all of them needs more than the largest: then the ratio to this one stands,
    a bound that lies nearer to zero than the truth, and the note counts it. Where the truth could lie on either side
    of zero (less accurate than the smallest with fewer parameters, or more accurate than the largest with more), the
    value is zero, which speaks for neither.
    """
    loras = [lora.name for lora in evidence.study.fixed_rank_loras()]
    if len(loras) < 2:
        raise NoDataError("the study has no fixed LoRA at two ranks, whose line would tell what an accuracy needs")
    found = []
    for subject in subjects:
        needed = {run.seed: need for run in subject.runs if (need := _needed(evidence, run)) is not None}
        bounds = [seed for seed, (_, bound) in needed.items() if bound]
        measured = by_seed(subject, partial(_over_needed, needed), "without fixed LoRA at two ranks")
        note = f"bounds only, the accuracy lies outside of fixed LoRA's: seeds {joined(bounds)}" if bounds else ""
        open_ = [label for label, value in zip(measured.labels, measured.values, strict=True) if value == 0]
        open_ = [label for label in open_ if int(label) in bounds]
        note = together(note, f"set to 0, which of both needs fewer is open: seeds {joined(open_)}" if open_ else "")
        seeds = [int(label) for label in measured.labels]
        found.append(
            replace(
                measured,
                subject=f"{subject.name} against fixed LoRA at equal accuracy",
                records=(*measured.records, *records_of(evidence.study, loras, seeds)),
                note=together(measured.note, note),
            )
        )
    return tuple(found)


Bound = Literal["", "at most", "more than"]


def _over_needed(needed: Mapping[int, tuple[float, Bound]], run: Run) -> float | None:
    if run.seed not in needed:
        return None
    size, bound = needed[run.seed]
    ratio = math.log2(run.parameters.final) - size
    if bound == "at most":  # the truth is this or more
        return max(0.0, ratio)
    return min(0.0, ratio) if bound == "more than" else ratio


def _needed(evidence: Evidence, run: Run) -> tuple[float, Bound] | None:
    """Return log2 of the parameters that fixed LoRA needs, and whether it needs at most, or more than, these."""
    points = fixed_lora_line(evidence.study, run)
    if len(points) < 2:
        return None
    sizes, accuracies = zip(*points, strict=True)
    wanted = run.test.accuracy
    if wanted <= accuracies[0]:
        return sizes[0], "at most" if wanted < accuracies[0] else ""
    for i in range(1, len(points)):
        if accuracies[i] >= wanted:
            return float(np.interp(wanted, accuracies[i - 1 : i + 1], sizes[i - 1 : i + 1])), ""
    return sizes[-1], "more than"


def above_majority(run: Run, _: OfParameters) -> float | None:
    """Return test accuracy minus that of always naming the most frequent class."""
    majority = run.record.majority_accuracy.get("test")
    return None if majority is None else run.test.accuracy - majority
