"""Methods against each other: means over seeds, and differences paired by seed.

The primary test, named here before any data: the exact two-sided Wilcoxon signed-rank test over seeds at 5 %,
with Holm's correction over all comparisons against the same reference. The t interval beside it describes, it
does not decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from peft_vit.analysis.studies import Run, Study
from peft_vit.config import ExperimentConfig, LoraConfig
from peft_vit.statistics import (
    Interval,
    Significance,
    Verdict,
    holm,
    mean_interval,
    minimum_n_wilcoxon,
    verdict,
    wilcoxon,
)

ALPHA = 0.05
BY_LOOKS = "group-sequential paired t"  # what decides where the study declared looks
DECIMALS = 12  # shares of whole images: rounding turns float noise back into the ties that it hides


@dataclass(frozen=True)
class MethodResult:
    """One experiment over its runs, means where nothing else is said. Accuracies are shares; `by_seed` is as `runs`."""

    experiment: ExperimentConfig
    runs: tuple[Run, ...]
    seeds: tuple[int, ...]
    by_seed: tuple[float, ...]
    test_accuracy: Interval
    validation_accuracy: Interval | None  # None where runs had no validation images
    above_majority: Interval
    runs_above_majority: int
    final_parameters: float
    frozen_bytes: float
    adapter_file_bytes: float
    seconds_per_step: float | None
    latency_s: float | None  # of a forward pass of one image; None if no run measured it

    @property
    def stored_bytes(self) -> float:
        """Return what a trained model takes to keep: everything frozen, and the adapter file."""
        return self.frozen_bytes + self.adapter_file_bytes


@dataclass(frozen=True)
class Comparison:
    """A claim "A is more accurate than B", over pairs of runs with the same seed."""

    name: str
    reference: str
    difference: Interval | None
    by_seed: tuple[float, ...]
    seeds: tuple[int, ...]
    significance: Significance | None
    adjusted_p: float | None
    verdict: Verdict
    note: str


def method_results(study: Study) -> tuple[MethodResult, ...]:
    """Return one row for each experiment with a finished run."""
    return tuple(_result(e, study.of(e.name)) for e in study.experiments if study.of(e.name))


def _result(experiment: ExperimentConfig, runs: tuple[Run, ...]) -> MethodResult:
    margins = [run.test.accuracy - run.record.majority_accuracy.get("test", 0.0) for run in runs]
    validated = [run.validation.accuracy for run in runs if run.validation is not None]
    return MethodResult(
        experiment=experiment,
        runs=runs,
        seeds=tuple(run.seed for run in runs),
        by_seed=tuple(run.test.accuracy for run in runs),
        test_accuracy=mean_interval([run.test.accuracy for run in runs]),
        validation_accuracy=mean_interval(validated) if len(validated) == len(runs) else None,
        above_majority=mean_interval(margins),
        runs_above_majority=sum(margin > 0 for margin in margins),
        final_parameters=fmean(run.parameters.final for run in runs),
        frozen_bytes=fmean(run.bytes.frozen_bytes for run in runs),
        adapter_file_bytes=fmean(run.bytes.adapter_file_bytes for run in runs),
        seconds_per_step=known_mean(run.record.seconds_per_step for run in runs),
        latency_s=known_mean(run.record.latency_s.get(1) for run in runs),
    )


def known_mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that were recorded; None if none was."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def known_interval(values: Iterable[float | None]) -> Interval | None:
    """Return the mean of the values that were recorded, with its interval; None if none was."""
    known = [value for value in values if value is not None]
    return mean_interval(known) if known else None


def references(study: Study) -> tuple[str, ...]:
    """Return the experiments to compare with: the linear probe, and the LoRA of largest rank up to 8.

    Without any such LoRA the smallest one; without LoRA only the linear probe; without either none. Where comparisons
    stop it is their control alone.
    """
    if study.stopping is not None:
        return (study.stopping.control,) if study.of(study.stopping.control) else ()
    linear = [e.name for e in study.with_method("linear")]
    loras = study.fixed_rank_loras()
    up_to_8 = [e for e in loras if (e.need(LoraConfig).rank or 0) <= 8]
    lora = [up_to_8[-1].name] if up_to_8 else [e.name for e in loras[:1]]
    return (*linear[:1], *lora)


def accuracy_on_test(run: Run) -> float:
    """Return what methods are compared on unless something else is named."""
    return run.test.accuracy


def compare(
    runs: Sequence[Run],
    reference_runs: Sequence[Run],
    name: str,
    reference: str,
    value: Callable[[Run], float | None] = accuracy_on_test,
) -> Comparison:
    """Compare two experiments, pairing runs by seed; not yet corrected for a family.

    A pair counts only if both runs used the same backbone weights and the same images in the same split. Pairs in which
    a run's value is None are left out and counted in the note.
    """
    partner = {run.seed: run for run in reference_runs}
    pairs = [(run, partner[run.seed]) for run in runs if run.seed in partner]
    paired = [(a, b) for a, b in pairs if same_problem(a) == same_problem(b)]
    values = {a.seed: (value(a), value(b)) for a, b in paired}
    by_seed = {seed: (left, right) for seed, (left, right) in values.items() if left is not None and right is not None}
    notes = []
    if refused := len(pairs) - len(paired):
        notes.append(f"{refused} pair(s) refused: other weights, images or splits")
    if unknown := len(paired) - len(by_seed):
        notes.append(f"{unknown} pair(s) left out: not recorded, or no finite number, in one of both runs")
    if any(_other_draws(a, b) for a, b in paired if a.seed in by_seed):
        notes.append("pairs differ in the initial head or in the order of images")
    return compare_values(by_seed, name=name, reference=reference, note="; ".join(notes))


def compare_values(
    by_seed: Mapping[int, tuple[float, float]], *, name: str, reference: str, note: str = ""
) -> Comparison:
    """Return the claim that the first value of each pair exceeds the second; not yet corrected for a family.

    Args:
        by_seed: seed -> (value, value of the reference).
        name: whose value comes first.
        reference: what it is compared with.
        note: what restricts the comparison, or why there is no pair.
    """
    if not by_seed:
        reason = note or "no pair of runs with the same seed"
        return Comparison(name, reference, None, (), (), None, None, "not decided", reason)
    values, against = zip(*by_seed.values(), strict=True)
    differences = np.round(np.subtract(values, against), DECIMALS)
    return Comparison(
        name=name,
        reference=reference,
        difference=mean_interval(np.subtract(values, against)),
        by_seed=tuple(float(d) for d in differences),
        seeds=tuple(by_seed),
        significance=wilcoxon(differences),
        adjusted_p=None,
        verdict="not decided",
        note=note,
    )


def correct(family: Sequence[Comparison], untested: str = "") -> tuple[Comparison, ...]:
    """Apply Holm's correction over a family of comparisons, and give the verdicts; none if there is a reason why."""
    if untested:
        return tuple(
            replace(one, significance=None, note="; ".join(filter(None, (one.note, untested)))) if one.by_seed else one
            for one in family
        )
    p_values = [p for c in family if c.significance is not None and (p := c.significance.p_value) is not None]
    adjusted = iter(holm(p_values))
    corrected = []
    for comparison in family:
        if comparison.difference is None or comparison.significance is None:
            corrected.append(comparison)
            continue
        p = next(adjusted)
        significance = replace(comparison.significance, minimum_n=minimum_n_wilcoxon(ALPHA, len(p_values)))
        decision = verdict(comparison.difference.estimate, significance, p, ALPHA)
        corrected.append(replace(comparison, significance=significance, adjusted_p=p, verdict=decision))
    return tuple(corrected)


def outcome(comparison: Comparison) -> str:
    """Return what the primary test says after correction, or why it says nothing."""
    significance = comparison.significance
    if significance is None:
        return "not tested" if comparison.by_seed else "no pairs"
    if not significance.decidable or comparison.adjusted_p is None:
        return significance.sentence()
    looks = "over looks, " if significance.test == BY_LOOKS else ""
    return f"p = {comparison.adjusted_p:.3g} ({looks}Holm)"


def same_problem(run: Run) -> tuple[object, ...]:
    """Return what must be equal for two runs to be a pair: backbone, weights, images and split."""
    return *same_source(run), run.provenance.split_sha256


def same_source(run: Run) -> tuple[object, ...]:
    """Return backbone, weights and data set: what is equal for runs that may have drawn other images of it."""
    return run.record.spec.backbone.model, run.provenance.weights_sha256, run.provenance.data_sha256


def _other_draws(a: Run, b: Run) -> bool:
    """Return whether runs of a seed differ in initial head or order of images; of a probe, which has neither, False."""
    if a.experiment.is_probe or b.experiment.is_probe:
        return False
    one, other = a.provenance, b.provenance
    return (one.head_init_sha256, one.data_order_sha256) != (other.head_init_sha256, other.data_order_sha256)
