"""The same experiments in several studies, over data sets and backbones: differences in each, and pooled where allowed.

An experiment is the same if its name and its configuration are; data and backbone may differ. Within a study, methods
are compared as in `analysis.comparison`: pairs share seed, weights, images and split, the exact Wilcoxon test decides,
with Holm's correction over the study's table. Over studies a difference is pooled only if nothing differs that
`comparability` names, or the caller allows it by name; what is refused is told with its reason. The pooled claim "is
more accurate than the reference, on average over these studies" is decided by the stratified t test of
`stratified_mean`, with Holm's correction over the pooled table.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft_vit.analysis.comparability import POOL_KINDS, PoolKind, Refusal, difference
from peft_vit.analysis.comparison import DECIMALS, Estimate, MethodResult, compare, decide, method_results, references
from peft_vit.analysis.importance import importance_patterns, study_agreements
from peft_vit.analysis.limits import is_time
from peft_vit.analysis.results import load_studies
from peft_vit.analysis.stopping import compare_all
from peft_vit.analysis.studies import Run, Study
from peft_vit.errors import UserError
from peft_vit.statistics import Interval, Verdict, stratified_mean

_ACCURACY_NEEDS: tuple[PoolKind, ...] = ("configurations", "precision", "versions", "splits", "weights")
_TIME_NEEDS: tuple[PoolKind, ...] = ("configurations", "precision", "versions", "timings")


@dataclass(frozen=True)
class LabelledStudy:
    """A study and what it is called here: its label, with its directory where two have the same."""

    label: str
    study: Study


@dataclass(frozen=True)
class InStudy:
    """One experiment in one study: what it reached, and its difference to the reference."""

    study: str  # label of the study
    result: MethodResult  # over the study's seeds
    # with the reference, corrected over the study's table; None of the reference itself, or without one
    comparison: Estimate | None

    @property
    def name(self) -> str:
        """Return the experiment's name."""
        return self.result.experiment.name


@dataclass(frozen=True)
class PooledRow:
    """One experiment against the reference over several studies."""

    studies: tuple[str, ...]  # labels of the studies with pairs of both
    # of test accuracy, experiment minus reference, mean over studies, corrected over the table, on "is more accurate
    # than the reference, on average over these studies"; or of seconds a step, the geometric mean of their ratios
    estimate: Estimate
    ahead: int  # in how many studies the experiment's mean is higher
    allowed: tuple[tuple[PoolKind, str], ...]  # kinds that differ and were pooled all the same, with what differs

    @property
    def interval(self) -> Interval:
        """Return the estimate with its interval; n counts all pairs."""
        assert self.estimate.interval is not None
        return self.estimate.interval


@dataclass(frozen=True)
class Across:
    """Several studies, side by side and pooled."""

    studies: tuple[LabelledStudy, ...]  # in the order given
    reference: str | None  # what the others are compared with; None if no experiment stands in every study
    rows: tuple[InStudy, ...]  # every experiment that occurs in two studies and more, by experiment, then study
    pooled: tuple[PooledRow, ...]  # one row an experiment that may be pooled
    times: tuple[PooledRow, ...]  # likewise, of seconds a step
    refusals: tuple[Refusal, ...]  # what was not pooled, and why
    alone: dict[str, str]  # experiment -> the one study with finished runs of it
    # of the importance of sites, between experiments of two studies with the same strategy and metric
    agreements: list[dict[str, Any]]  # rows of `study_agreements`


def load_across(directories: Sequence[Path]) -> tuple[LabelledStudy, ...]:
    """Read the studies below several directories.

    Raises:
        UserError: if a directory can't be read, if a study or a run stands twice, if there are fewer than two studies,
            or if real and smoke studies are mixed; names them.
    """
    found: list[tuple[Path, Study]] = []
    places: dict[Path, Path] = {}
    for directory in directories:
        place = Path(directory).resolve()
        if place in places:
            raise UserError(f"is given twice (as {places[place]}); give each directory once", file=directory)
        places[place] = directory
        found += [(directory, study) for study in load_studies(directory)]
    _refuse_copies(found)
    smoke = [f"{study.label} in {directory}" for directory, study in found if study.smoke]
    if smoke and len(smoke) < len(found):
        problem = f"{', '.join(smoke)}: smoke runs say nothing about a method, so they stand beside no real study"
        raise UserError(f"{problem}; leave them out", file="compare")
    if len(found) < 2:
        names = ", ".join(study.label for _, study in found)
        problem = f"holds one study ({names}), and it takes two; give another directory, or use `peft-vit report`"
        raise UserError(problem, file=directories[0])
    labels = [study.label for _, study in found]
    return tuple(
        LabelledStudy(study.label if labels.count(study.label) == 1 else f"{study.label} ({directory})", study)
        for directory, study in found
    )


def _refuse_copies(found: Sequence[tuple[Path, Study]]) -> None:
    """Refuse a run that stands in two studies: the same seed of the same configuration on the same images."""
    seen: dict[str, tuple[Path, str]] = {}
    for directory, study in found:
        for run in study.runs:
            key, name = _what_was_run(run), run.record.spec.run_id
            if key in seen:
                other, other_name = seen[key]
                same = "holds it" if name == other_name else f"holds it as {other_name!r}"
                raise UserError(
                    f"holds the run {name!r}, and {other} {same} too, which would count it twice as evidence; give one "
                    "of them",
                    file=directory,
                )
            seen[key] = directory, name


def _what_was_run(run: Run) -> str:
    """Return configuration, seed and images; the same images elsewhere are the same images."""
    spec, made = run.record.spec, run.provenance
    anywhere = {"study": "any", "device": "auto", "threads": 1, "data": spec.data.model_copy(update={"path": None})}
    images = made.data_sha256, made.split_sha256, made.weights_sha256
    return f"{spec.model_copy(update=anywhere).model_dump_json()} {images}"


def compare_studies(
    studies: Sequence[LabelledStudy], *, reference: str | None = None, pool: Collection[PoolKind] = ()
) -> Across:
    """Compare what occurs in several studies.

    Args:
        studies: at least two, from `load_across`.
        reference: name of the experiment that others are compared with; None: the fixed-rank LoRA, or else the linear
            probe, that is every study's own reference.
        pool: what may be pooled although it differs.

    Raises:
        UserError: if the reference has a finished run in fewer than two studies, or nothing occurs in two.
    """
    found_in: dict[str, list[str]] = {}
    for one in studies:
        for name in dict.fromkeys(run.experiment.name for run in one.study.runs):
            found_in.setdefault(name, []).append(one.label)
    shared = [name for name, labels in found_in.items() if len(labels) > 1]
    if not shared:
        names = ", ".join(one.label for one in studies)
        problem = "no experiment has finished runs in two of them under the same name, so there is nothing to compare"
        raise UserError(problem, file=names)
    chosen = _reference(studies, shared) if reference is None else reference
    if chosen is not None and chosen not in shared:
        problem = f"{chosen!r} has finished runs in fewer than two studies; choose one of {', '.join(shared)}"
        raise UserError(problem, field="--reference")
    rows = tuple(row for one in studies for row in _in_study(one, shared, chosen))
    order = {name: place for place, name in enumerate(shared)}
    pooled, times, refusals = _pooled(studies, shared, chosen, frozenset(pool))
    apart = [replace(one.study, name=one.label.removesuffix(" (smoke)")) for one in studies]  # two may share a name
    return Across(
        studies=tuple(studies),
        reference=chosen,
        rows=tuple(sorted(rows, key=lambda row: order[row.name])),
        pooled=pooled,
        times=times,
        refusals=refusals,
        alone={name: labels[0] for name, labels in found_in.items() if len(labels) == 1},
        agreements=study_agreements([(study, importance_patterns(study)) for study in apart]),
    )


def _reference(studies: Sequence[LabelledStudy], shared: Collection[str]) -> str | None:
    for kind in ("lora", "linear"):
        own = [
            {name for name in references(one.study) if any(e.name == name for e in one.study.with_method(kind))}
            for one in studies
            if one.study.runs
        ]
        common = sorted(set.intersection(*own) & set(shared))
        if common:
            return common[0]
    return None


def _in_study(one: LabelledStudy, shared: Collection[str], reference: str | None) -> Iterator[InStudy]:
    results = [result for result in method_results(one.study) if result.experiment.name in shared]
    reference_runs = one.study.of(reference) if reference is not None else ()
    compared: dict[str, Estimate] = {}
    if reference is not None and reference_runs:
        names = {result.experiment.name for result in results}
        compared = {c.name: c for c in compare_all(one.study, reference, names)}
    for result in results:
        yield InStudy(one.label, result, compared.get(result.experiment.name))


def _pooled(
    studies: Sequence[LabelledStudy], shared: Sequence[str], reference: str | None, pool: Collection[PoolKind]
) -> tuple[tuple[PooledRow, ...], tuple[PooledRow, ...], tuple[Refusal, ...]]:
    rows: list[PooledRow] = []
    times: list[PooledRow] = []
    refused: dict[tuple[PoolKind, tuple[str, ...], str], list[str]] = {}
    for name in shared:
        pairs = {one.label: own for one in studies if (own := _pairs(one.study, name, reference))}
        if name == reference or len(pairs) < 2:
            continue
        runs_of = {label: [run for pair in own for run in pair] for label, own in pairs.items()}
        differing = {kind: why for kind in POOL_KINDS if (why := difference(kind, runs_of)) is not None}
        for kind in differing.keys() - pool:
            refused.setdefault((kind, tuple(pairs), differing[kind]), []).append(name)
        untested = next((one.study.untested for one in studies if one.label in pairs and one.study.untested), "")
        for table, value, needs, note in (
            (rows, _difference, _ACCURACY_NEEDS, untested),
            (times, _log_ratio, _TIME_NEEDS, ""),
        ):
            allowed = tuple((kind, differing[kind]) for kind in needs if kind in differing)
            by_study = {
                label: {a.seed: known for a, b in own if (known := value(a, b)) is not None}
                for label, own in pairs.items()
            }
            by_study = {label: own for label, own in by_study.items() if own}
            if all(kind in pool for kind, _ in allowed) and len(by_study) > 1:
                table.append(_row(name, by_study, allowed, note))
    decided = decide([row.estimate for row in rows])  # one that nothing may decide still counts in the family
    for place, one in enumerate(decided):
        open_ = replace(one, adjusted_p=None, opposite_p=None, verdict=Verdict.NOT_DECIDED)
        rows[place] = replace(rows[place], estimate=open_ if one.note else one)
    refusals = [Refusal(kind, tuple(names), labels, why) for (kind, labels, why), names in refused.items()]
    refusals.sort(key=lambda one: (one.kind, one.experiments))
    return tuple(rows), tuple(map(_as_ratio, times)), tuple(refusals)


def _pairs(study: Study, name: str, reference: str | None) -> list[tuple[Run, Run]]:
    """Return the pairs of runs that `compare` forms: the experiment's and the reference's."""
    if reference is None:
        return []
    runs, others = ({run.seed: run for run in study.of(one)} for one in (name, reference))
    seeds = compare(study.of(name), study.of(reference), name, reference).by_seed
    return [(runs[seed], others[seed]) for seed in sorted(seeds)]


def _difference(a: Run, b: Run) -> float:
    return round(a.test.accuracy - b.test.accuracy, DECIMALS)


def _log_ratio(a: Run, b: Run) -> float | None:
    first, second = a.record.seconds_per_step, b.record.seconds_per_step
    return math.log(first / second) if is_time(first) and is_time(second) else None


def _row(
    name: str, by_study: Mapping[str, Mapping[int, float]], allowed: tuple[tuple[PoolKind, str], ...], note: str
) -> PooledRow:
    interval, significance = stratified_mean([list(own.values()) for own in by_study.values()])
    estimate = Estimate(
        name=name,
        by_seed={f"{label} {seed}": value for label, own in by_study.items() for seed, value in own.items()},
        n_of="pairs",
        interval=interval,
        significance=significance,
        note=note,
    )
    ahead = sum(math.fsum(own.values()) > 0 for own in by_study.values())
    return PooledRow(tuple(by_study), estimate, ahead, allowed)


def _as_ratio(row: PooledRow) -> PooledRow:
    """Return a row of logarithms as one of ratios, which nothing decides."""
    logs = row.interval
    low, high = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
    ratio = Interval(math.exp(logs.estimate), low, high, logs.n, logs.confidence, logs.reason)
    return replace(row, estimate=replace(row.estimate, interval=ratio, significance=None))
