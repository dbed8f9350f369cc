"""What sentences about a study are decided on: its runs, and functions from them to values by experiment or pair.

A measure returns estimates that are not decided yet, whose positive values speak for the sentence, or raises
NoDataError where nothing in the records speaks about it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np

from experiments.hypotheses.rivals import wilcoxon_against_each
from experiments.scripts.concentration import gini, normalized_entropy
from peft_vit.base.statistics import spearman
from peft_vit.base.statistics.descriptive import grouped
from peft_vit.base.statistics.estimates import Estimate, join_notes
from peft_vit.core.config import ExperimentConfig
from peft_vit.lab.analysis.comparison import Value, accuracy_on_test, compare, references, same_problem, same_source
from peft_vit.lab.analysis.findings import estimated
from peft_vit.lab.analysis.layers import Allocation, allocations, fixed_lora_line
from peft_vit.lab.analysis.quantization import (
    FLOAT32_BITS,
    QuantizationImpact,
    layers_bits,
    model_bytes,
    quantization_impacts,
)
from peft_vit.lab.analysis.studies import Run, Study

OVERHEAD_LIMIT = 0.10  # over the steps' seconds without scoring and reallocation
_FEWEST_SITES = 3  # with two, a rank correlation is 1 or -1 whatever they are
# Where the fields that not every record has come from; what is not named here, every finished run has.
_HOW_TO_RECORD = {
    "importance_history": "runs with adaptive ranks record it",
    "rank_history": "runs with adapters record it",
    "quantization": "runs on quantized weights record it",
    "removal": "set measures.removal_images in the configuration and run again",
    "overhead_s": "records of older versions lack it; run again",
    "steps": "records of older versions lack it; run again",
}


class NoDataError(Exception):
    """Nothing in the records speaks about a sentence; the message says why, and what would."""


# --- which experiments ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Some experiments of a study, chosen by what they are, never by their results; all that is said must hold."""

    methods: tuple[str, ...] = ()  # one must be its own
    where: Mapping[str, Any] = field(default_factory=dict)  # settings by dotted name, and the value or values they have
    unless: Mapping[str, Any] = field(default_factory=dict)  # and those that exclude an experiment
    names: tuple[str, ...] = ()  # patterns as in lora_r*; one must fit
    reference_lora: bool = False  # only the fixed-rank LoRA that others are compared with

    def takes(self, experiment: ExperimentConfig, reference_lora: str | None) -> bool:
        """Return whether an experiment is meant; `reference_lora` is the name of that one in its study."""
        return (
            (not self.names or any(fnmatchcase(experiment.name, pattern) for pattern in self.names))
            and (not self.methods or experiment.method in self.methods)
            and all(value_at(experiment, path) in _listed(values) for path, values in self.where.items())
            and not any(value_at(experiment, path) in _listed(values) for path, values in self.unless.items())
            and (not self.reference_lora or experiment.name == reference_lora)
        )

    @property
    def words(self) -> str:
        """Return what is selected, as it follows "no experiment"."""
        parts = ["the fixed-rank LoRA of largest rank up to 8"] if self.reference_lora else []
        parts += [f"named {' or '.join(self.names)}"] if self.names else []
        parts += [f"of method {' or '.join(self.methods)}"] if self.methods else []
        for word, settings in (("with", self.where), ("without", self.unless)):
            for path, values in settings.items():
                said = (value if isinstance(value, str) else json.dumps(value) for value in _listed(values))
                parts.append(f"{word} {path} {' or '.join(said)}")
        return ", ".join(parts) or "of any kind"


def _listed(values: Any) -> tuple[Any, ...]:
    return values if isinstance(values, tuple) else (values,)


def value_at(experiment: ExperimentConfig, path: str) -> Any:
    """Return what a setting is by its dotted name, as in qa_lora.quantization_bits; None where its section is not."""
    value: Any = experiment
    for part in path.split("."):
        value = None if value is None else getattr(value, part)
    return value


def settings_without(experiment: ExperimentConfig, paths: Sequence[str]) -> str:
    """Return all settings but the name and the given ones, as text that is equal where they are."""
    left_out: dict[str, Any] = {"name": True}
    for path in paths:
        *sections, setting = path.split(".")
        inner = left_out
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[setting] = True
    return experiment.model_dump_json(exclude=left_out)


@dataclass(frozen=True)
class Subject:
    """An experiment, and those of its finished runs that recorded what is needed."""

    experiment: ExperimentConfig
    runs: tuple[Run, ...]
    note: str

    @property
    def name(self) -> str:
        """Return the experiment's name."""
        return self.experiment.name


class Evidence:
    """One study, and what other parts of the analysis have made of it; that is computed when first asked for."""

    def __init__(self, study: Study) -> None:
        self.study = study

    @cached_property
    def allocation(self) -> dict[str, Allocation]:
        """Return experiment -> what became of its ranks."""
        return {allocation.experiment.name: allocation for allocation in allocations(self.study)}

    @cached_property
    def quantization(self) -> dict[str, QuantizationImpact]:
        """Return experiment -> what quantization did."""
        return {impact.experiment.name: impact for impact in quantization_impacts(self.study)}

    @cached_property
    def reference_lora(self) -> str | None:
        """Return the fixed-rank LoRA that others are compared with."""
        loras = {experiment.name for experiment in self.study.fixed_rank_loras()}
        return next((name for name in references(self.study) if name in loras), None)

    def subjects(self, of: Group, needs: Sequence[str] = ()) -> tuple[Subject, ...]:
        """Return the experiments of a group that have a finished run whose record has all fields that are needed.

        Raises:
            NoDataError: if there is none, with what is missing.
        """
        meant = [e for e in self.study.experiments if of.takes(e, self.reference_lora)]
        if not any(self.study.runs_of(e.name) for e in meant):
            raise NoDataError(f"no experiment {of.words}{' has finished' if meant else ''}")
        subjects: list[Subject] = []
        lacking: set[str] = set()
        for experiment in meant:
            runs = self.study.runs_of(experiment.name)
            empty = [(run.seed, name) for run in runs for name in needs if getattr(run.record, name) in (None, [], {})]
            lacking |= {name for _, name in empty}
            incomplete = dict.fromkeys(seed for seed, _ in empty)
            whole = tuple(run for run in runs if run.seed not in incomplete)
            if whole:
                seeds = joined(incomplete)
                failed = joined(r.spec.seed for r in self.study.failed if r.spec.experiment.name == experiment.name)
                absent = joined(run.seed for run in self.study.unfinished if run.experiment == experiment.name)
                note = join_notes(
                    f"seeds left out, whose records lack {joined(needs)}: {seeds}" if seeds else "",
                    f"failed: seed {failed}" if failed else "",
                    f"missing: seed {absent}" if absent else "",
                )
                subjects.append(Subject(experiment, whole, note))
        if not subjects:
            raise NoDataError("; ".join(f"no record has {name}: {_HOW_TO_RECORD[name]}" for name in sorted(lacking)))
        return tuple(subjects)


def joined(values: Iterable[object]) -> str:
    """Return values as a list in prose."""
    return ", ".join(str(value) for value in values)


# --- one value a run --------------------------------------------------------------------------------------------------

Measure = Callable[[Evidence, Group], tuple[Estimate, ...]]


def of_runs(subject: Subject, by_seed: Mapping[int, float | None], without: str) -> Estimate:
    """Return an estimate of one value a run; `without` says why a run has none, or one that is not finite."""
    known = {seed: value for seed, value in by_seed.items() if value is not None and math.isfinite(value)}
    left_out = joined(run.seed for run in subject.runs if run.seed not in known)
    note = join_notes(subject.note, f"seeds left out, {without}: {left_out}" if left_out else "")
    return estimated(subject.name, known, note=note)


def each_run(without: str, *needs: str) -> Callable[[Value], Measure]:
    """Turn a function of a run whose record has some fields into a measure, see `of_runs`."""

    def to_measure(value: Value) -> Measure:
        def measure(evidence: Evidence, of: Group) -> tuple[Estimate, ...]:
            return tuple(
                of_runs(subject, {run.seed: value(run) for run in subject.runs}, without)
                for subject in evidence.subjects(of, needs)
            )

        measure.__doc__ = value.__doc__
        return measure

    return to_measure


@each_run("without a recorded majority class")
def above_majority(run: Run) -> float | None:
    """Test accuracy minus that of always naming the most frequent class."""
    majority = run.record.majority_accuracy.get("test")
    return None if majority is None else run.test.accuracy - majority


# --- differences of paired runs ---------------------------------------------------------------------------------------


def difference(
    evidence: Evidence,
    of: Group,
    against: Group,
    *,
    same_but: tuple[str, ...] = (),
    value: Value = accuracy_on_test,
    lower_is_better: bool = False,
) -> tuple[Estimate, ...]:
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
    study, sign = evidence.study, -1.0 if lower_is_better else 1.0
    subjects = evidence.subjects(of)
    others = [e for e in study.experiments if study.runs_of(e.name) and against.takes(e, evidence.reference_lora)]
    rest = {e.name: settings_without(e, same_but) for e in study.experiments} if same_but else {}

    def comparable(a: ExperimentConfig, b: ExperimentConfig) -> bool:
        differ = not same_but or any(value_at(a, path) != value_at(b, path) for path in same_but)
        return a.name != b.name and differ and rest.get(a.name) == rest.get(b.name)

    differences = [
        _beside(subject, compare(subject.runs, study.runs_of(other.name), subject.name, other.name, value), sign)
        for subject in subjects
        for other in others
        if comparable(subject.experiment, other)
    ]
    if not differences:
        partner = f"{against.words}, equal but for {', '.join(same_but)}" if same_but else against.words
        raise NoDataError(f"no experiment {of.words} has a partner {partner}")
    return tuple(differences)


def _beside(subject: Subject, compared: Estimate, sign: float = 1.0) -> Estimate:
    """Return a comparison, not decided yet, with what restricts its subject."""
    unpaired = joined(run.seed for run in subject.runs if run.seed not in compared.by_seed)
    without = f"seeds without a pair: {unpaired}" if unpaired and compared.by_seed else ""
    return estimated(
        compared.name,
        {seed: sign * value for seed, value in compared.by_seed.items()},
        reference=compared.reference,
        n_of="pairs",
        note=join_notes(subject.note, compared.note, without),
    )


def against_float(evidence: Evidence, of: Group) -> tuple[Estimate, ...]:
    """Return test accuracy minus that of the experiment that differs only in that its weights are float."""
    differences = []
    for subject in evidence.subjects(of, ("quantization",)):
        impact = evidence.quantization[subject.name]
        compared = impact.against_unquantized
        if impact.settings.gradient_scaling_factor != 1 or impact.settings.gradient_scaling != "constant":
            scaled = "it also scales its adapters' gradients, which the float twin does not"
            compared = replace(compared, note=join_notes(compared.note, scaled))
        differences.append(_beside(subject, compared))
    return tuple(differences)


def at_equal_parameters(evidence: Evidence, of: Group) -> tuple[Estimate, ...]:
    """Return test accuracy minus that of fixed LoRA at as many trainable parameters, see `against_fixed_lora`."""
    differences = [
        _beside(subject, evidence.allocation[subject.name].against_fixed)
        for subject in evidence.subjects(of, ("rank_history",))
        if subject.name in evidence.allocation
    ]
    if not differences:
        raise NoDataError(f"no record has the ranks of an experiment {of.words}")
    return tuple(differences)


def parameters_at_equal_accuracy(evidence: Evidence, of: Group) -> tuple[Estimate, ...]:
    """Return log2 of a run's trainable parameters over those that fixed LoRA needs for its test accuracy.

    What fixed LoRA needs is where the line through the same seed's runs, linear in the logarithm of trainable
    parameters, first reaches the accuracy. A run that is less accurate than the smallest of them needs at most that
    one, a run that is more accurate than all of them needs more than the largest: then the ratio to this one stands,
    a bound that lies nearer to zero than the truth, and the note counts it. Where the truth could lie on either side
    of zero (less accurate than the smallest with fewer parameters, or more accurate than the largest with more), the
    value is zero, which speaks for neither.
    """
    subjects = evidence.subjects(of, ("rank_history",))
    if len(evidence.study.fixed_rank_loras()) < 2:
        raise NoDataError("the study has no fixed LoRA at two ranks, whose line would tell what an accuracy needs")
    estimates = []
    for subject in subjects:
        ratios = {
            run.seed: _over_needed(run, line)
            for run in subject.runs
            if len(line := fixed_lora_line(evidence.study, run)) > 1
        }
        values = {seed: ratio for seed, (ratio, _) in ratios.items()}
        bounds = [seed for seed, (_, is_bound) in ratios.items() if is_bound]
        estimate = of_runs(subject, values, "without fixed LoRA at two ranks")
        note = f"bounds only, the accuracy lies outside of fixed LoRA's: seeds {joined(bounds)}" if bounds else ""
        either = joined(seed for seed in bounds if values[seed] == 0)
        note = join_notes(note, f"set to 0, which of both needs fewer is open: seeds {either}" if either else "")
        reference = "fixed LoRA at equal accuracy"
        estimates.append(replace(estimate, reference=reference, note=join_notes(estimate.note, note)))
    return tuple(estimates)


def _over_needed(run: Run, line: Sequence[tuple[float, float]]) -> tuple[float, bool]:
    """Return log2 of a run's parameters over those that the line needs for its accuracy, and whether it is a bound."""
    sizes, accuracies = zip(*line, strict=True)
    own, wanted = math.log2(run.parameters.final), run.test.accuracy
    if wanted <= accuracies[0]:
        is_bound = wanted < accuracies[0]
        return max(0.0, own - sizes[0]) if is_bound else own - sizes[0], is_bound  # the truth is this or more
    for i in range(1, len(line)):
        if accuracies[i] >= wanted:
            return own - float(np.interp(wanted, accuracies[i - 1 : i + 1], sizes[i - 1 : i + 1])), False
    return min(0.0, own - sizes[-1]), True


# --- where ranks went -------------------------------------------------------------------------------------------------

_WITHOUT_KINDS = "without modules of both kinds"


def query_over_each(evidence: Evidence, of: Group) -> tuple[Estimate, ...]:
    """Return the mean final rank of query sites minus that of each other matrix type.

    Every other type is a rival of its own, tested over seeds; the values are those against the rival of the largest
    mean over seeds. The largest type of each seed would not do: it changes with chance, and lies above any single type
    even where all get the same on average.
    """
    estimates = []
    for subject in evidence.subjects(of, ("rank_history",)):
        means = {run.seed: {kind: fmean(ranks) for kind, ranks in _by_matrix(run).items()} for run in subject.runs}
        seeds = [seed for seed, by_kind in means.items() if "query" in by_kind and len(by_kind) > 1]
        common = sorted(set.intersection(*(set(means[seed]) for seed in seeds)) - {"query"}) if seeds else []
        leads = {kind: tuple(means[seed]["query"] - means[seed][kind] for seed in seeds) for kind in common}
        strongest = min(leads, key=lambda kind: (math.fsum(leads[kind]), kind), default="")
        estimate = of_runs(subject, dict(zip(seeds, leads[strongest], strict=True)) if leads else {}, _WITHOUT_KINDS)
        if leads:
            against = f"estimate and interval against {strongest}, the most of {', '.join(common)}"
            shown, opposite = wilcoxon_against_each(list(leads.values()))
            note = join_notes(estimate.note, against)
            estimate = replace(estimate, significance=shown, opposite=opposite, note=note)
        estimates.append(estimate)
    return tuple(estimates)


@each_run(_WITHOUT_KINDS, "rank_history")
def query_over_mean(run: Run) -> float | None:
    """Mean final rank of query sites minus that of all other sites."""
    ranks = _by_matrix(run)
    own = ranks.pop("query", None)
    if own is None or not ranks:
        return None
    return fmean(own) - fmean(rank for other in ranks.values() for rank in other)


def _by_matrix(run: Run) -> dict[str, list[int]]:
    """Return matrix type -> final ranks of its sites."""
    final = final_ranks(run)
    return grouped((site.matrix, final[site.name]) for site in run.adapted_sites())


def final_ranks(run: Run) -> dict[str, int]:
    """Return adapted site -> rank at the end of the run; one that the last entry leaves out has rank 0."""
    return {site.name: run.record.rank_history[-1].ranks.get(site.name, 0) for site in run.adapted_sites()}


def rank_gini(run: Run) -> float | None:
    """Return how concentrated a run's final ranks are; None without ranks on two sites."""
    ranks = list(final_ranks(run).values())
    return gini(ranks) if len(ranks) > 1 and sum(ranks) > 0 else None


def rank_entropy(run: Run) -> float | None:
    """Return how even a run's final ranks are, over the largest entropy; None without ranks on two sites."""
    ranks = list(final_ranks(run).values())
    return normalized_entropy(ranks) if len(ranks) > 1 and sum(ranks) > 0 else None


_spread = each_run("without ranks on two modules", "rank_history")
spread_gini, spread_entropy = _spread(rank_gini), _spread(rank_entropy)


# --- scores that ranks were decided with, and what leaving adapters out costs -----------------------------------------


@each_run("without positive scores of attention and of MLP modules", "importance_history")
def attention_over_mlp(run: Run) -> float | None:
    """log2 of the mean final score of attention sites over that of MLP sites; a score is a mean per triplet."""
    scores = run.last_scores()
    attention, mlp = (
        [scores[site.name] for site in run.record.sites if site.name in scores and site.role == role]
        for role in ("attention", "mlp")
    )
    if not attention or not mlp or fmean(attention) <= 0 or fmean(mlp) <= 0:
        return None
    return math.log2(fmean(attention) / fmean(mlp))


def rank_correlation(left: dict[str, float], right: dict[str, float]) -> float | None:
    """Return Spearman's rho over the sites that both have; None for fewer than three, a constant or not finite one."""
    common = sorted(left.keys() & right.keys())
    if len(common) < _FEWEST_SITES or not all(math.isfinite(left[name] + right[name]) for name in common):
        return None
    return spearman([left[name] for name in common], [right[name] for name in common])


def between_seeds(evidence: Evidence, of: Group) -> tuple[Estimate, ...]:
    """Return Spearman's rho of the final scores of two seeds, over disjoint pairs of seeds: 1st and 2nd, 3rd and 4th.

    All pairs of seeds would share runs, and no test for independent values could be used; the mean over all of them
    is in `analysis.importance`. Where each seed draws its own images out of one data set, agreement holds over
    these too, which is more than was asked; the note says so.
    """
    estimates = []
    for subject in evidence.subjects(of, ("importance_history",)):
        runs = sorted(subject.runs, key=lambda run: run.seed)
        formed = list(zip(runs[::2], runs[1::2], strict=False))
        pairs = [(a, b) for a, b in formed if same_problem(a) == same_problem(b) or _drawn_by_seed(a, b)]
        rhos = {f"{a.seed}-{b.seed}": rank_correlation(a.last_scores(), b.last_scores()) for a, b in pairs}
        undefined = joined(label for label, rho in rhos.items() if rho is None)
        refused = len(formed) - len(pairs)
        note = join_notes(
            subject.note,
            f"seed {runs[-1].seed} has no partner" if len(runs) % 2 else "",
            f"{refused} pair(s) refused: other weights, images or splits" if refused else "",
            "each seed draws its own images" if any(_drawn_by_seed(a, b) for a, b in pairs) else "",
            f"scores are all equal, not finite, or of too few modules: seeds {undefined}" if undefined else "",
        )
        known = {label: rho for label, rho in rhos.items() if rho is not None}
        estimates.append(estimated(subject.name, known, n_of="pairs of seeds", note=note))
    return tuple(estimates)


def _drawn_by_seed(a: Run, b: Run) -> bool:
    """Return whether two runs of one study differ in nothing but which images of one data set their seeds drew."""
    settings = a.record.spec.data
    by_seed = settings.tests_by_seed or settings.train_subset == "per_seed"
    return by_seed and settings == b.record.spec.data and same_source(a) == same_source(b)


@each_run("whose scores or losses are all equal, not finite, or of too few modules", "importance_history", "removal")
def against_harm(run: Run) -> float | None:
    """Spearman's rho, over sites with rank, between last scores and the loss rise when a site is left out."""
    removal = run.record.removal
    return None if removal is None else rank_correlation(run.last_scores(), removal.site_loss_rise)


@each_run("without a module in that group", "removal")
def cost_of_removing_mlp(run: Run) -> float | None:
    """Validation accuracy that is lost when the updates of MLP sites are left out."""
    removal = run.record.removal
    if removal is None or "mlp" not in removal.group_accuracy:
        return None
    return removal.accuracy - removal.group_accuracy["mlp"]


# --- seconds and bytes ------------------------------------------------------------------------------------------------


def overhead_below(evidence: Evidence, of: Group, parts: Set[str]) -> tuple[Estimate, ...]:
    """Return by how much the seconds of scoring, reallocation or both, over those of plain steps, lie below a limit.

    A step's seconds hold what hooks take in it, so scoring and reallocation are taken off first. Older records know
    only the sum of both, as "allocation".
    """
    both = {"scoring", "reallocation"}

    @each_run("whose records do not tell scoring from reallocation (older version)", "overhead_s", "steps")
    def measure(run: Run) -> float | None:
        known, counted, taken_off = run.record.overhead_s, parts, both
        if not both <= known.keys():
            if counted != both or "allocation" not in known:
                return None
            counted = taken_off = {"allocation"}
        plain = math.fsum(row.seconds for row in run.record.steps) - math.fsum(known[name] for name in taken_off)
        return None if plain <= 0 else OVERHEAD_LIMIT - math.fsum(known[name] for name in counted) / plain

    return measure(evidence, of)


@each_run("whose records lack the model's size", "quantization")
def layers_factor(run: Run) -> float:
    """How many times smaller than float32 the quantized layers are, scales and offsets included."""
    return FLOAT32_BITS / layers_bits([run])


@each_run("whose records lack the model's size", "quantization")
def model_factor(run: Run) -> float | None:
    """How many times smaller than float32 the whole model is, everything counted."""
    model = model_bytes([run])
    return None if model is None else FLOAT32_BITS / model.bits_per_weight
