"""Measures of what runs predict, and differences of anything that a run has between paired runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np

from peft_vit.analysis.allocation import fixed_lora_line
from peft_vit.analysis.comparison import Comparison, accuracy_on_test, compare
from peft_vit.analysis.measures.evidence import (
    Evidence,
    Group,
    Measured,
    NoDataError,
    Subject,
    by_seed,
    each_run,
    joined,
    together,
)
from peft_vit.analysis.studies import Run


def difference(
    evidence: Evidence,
    of: Group,
    against: Group,
    *,
    same_but: tuple[str, ...] = (),
    value: Callable[[Run], float | None] = accuracy_on_test,
    lower_is_better: bool = False,
) -> tuple[Measured, ...]:
    """Return, by pair of experiments, a value of the first minus that of the second, paired by seed.

    Pairs share weights, images and split.

    Args:
        evidence: of the study.
        of: the first experiments of pairs.
        against: the second ones.
        same_but: settings in some of which the two differ, and in nothing else; none: they may differ in anything.
        value: what is compared.
        lower_is_better: the other way round, so that positive is better.
    """
    sign = -1.0 if lower_is_better else 1.0
    found = []
    for subject in evidence.subjects(of):
        for other in evidence.partners(subject.experiment, against, same_but):
            compared = compare(subject.runs, evidence.study.of(other.name), subject.name, other.name, value)
            found.append(_of_comparison(subject, compared, sign))
    if not found:
        partner = f"{against.words}, equal but for {', '.join(same_but)}" if same_but else against.words
        raise NoDataError(f"no experiment {of.words} has a partner {partner}")
    return tuple(found)


def _of_comparison(subject: Subject, compared: Comparison, sign: float = 1.0) -> Measured:
    unpaired = [run.seed for run in subject.runs if run.seed not in compared.seeds]
    without = f"seeds without a pair: {joined(unpaired)}" if unpaired and compared.seeds else ""
    return Measured(
        subject=f"{compared.name} against {compared.reference}",
        values=tuple(sign * one for one in compared.by_seed),
        labels=tuple(str(seed) for seed in compared.seeds),
        n_of="pairs",
        note=together(subject.note, compared.note, without),
    )


_RANKS = ("rank_history",)
_SCALED = "it also scales its adapters' gradients, which the float twin does not"


def against_float(evidence: Evidence, of: Group) -> tuple[Measured, ...]:
    """Return test accuracy minus that of the experiment that differs only in that its weights are float."""
    found = []
    for subject in evidence.subjects(of, ("quantization",)):
        impact = evidence.quantization[subject.name]
        compared = impact.against_unquantized
        if impact.settings.gradient_scaling_factor != 1 or impact.settings.gradient_scaling != "constant":
            compared = replace(compared, note=together(compared.note, _SCALED))
        found.append(_of_comparison(subject, compared))
    return tuple(found)


def at_equal_parameters(evidence: Evidence, of: Group) -> tuple[Measured, ...]:
    """Return test accuracy minus that of fixed LoRA at as many trainable parameters, see `against_fixed_lora`."""
    found = [
        _of_comparison(subject, evidence.allocation[subject.name].against_fixed)
        for subject in evidence.subjects(of, _RANKS)
        if subject.name in evidence.allocation
    ]
    if not found:
        raise NoDataError(f"no record has the ranks of an experiment {of.words}")
    return tuple(found)


def parameters_at_equal_accuracy(evidence: Evidence, of: Group) -> tuple[Measured, ...]:
    """Return log2 of a run's trainable parameters over those that fixed LoRA needs for its test accuracy.

    What fixed LoRA needs is where the line through the same seed's runs, linear in the logarithm of trainable
    parameters, first reaches the accuracy. A run that is less accurate than the smallest of them needs at most that
    one, a run that is more accurate than all of them needs more than the largest: then the ratio to this one stands,
    a bound that lies nearer to zero than the truth, and the note counts it. Where the truth could lie on either side
    of zero (less accurate than the smallest with fewer parameters, or more accurate than the largest with more), the
    value is zero, which speaks for neither.
    """
    subjects = evidence.subjects(of, _RANKS)
    if len(evidence.study.fixed_rank_loras()) < 2:
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
        against = f"{subject.name} against fixed LoRA at equal accuracy"
        found.append(replace(measured, subject=against, note=together(measured.note, note)))
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


def above_majority(evidence: Evidence, of: Group) -> tuple[Measured, ...]:
    """Return test accuracy minus that of always naming the most frequent class."""
    return each_run(evidence, of, (), _above_majority, "without a recorded majority class")


def _above_majority(run: Run) -> float | None:
    majority = run.record.majority_accuracy.get("test")
    return None if majority is None else run.test.accuracy - majority
