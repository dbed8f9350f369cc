"""The same experiments in several studies, over data sets and backbones: differences in each, and pooled where allowed.

An experiment is the same if its name and its configuration are; data and backbone may differ. Within a study, methods
are compared as in `analysis.comparison`: pairs share seed, weights, images and split, the exact Wilcoxon test decides,
with Holm's correction over the study's table. Over studies a difference is pooled only if nothing differs that
POOL_KINDS names, or the caller allows it by name; what is refused is reported with its reason. The pooled claim "is
more accurate than the reference, on average over these studies" is decided by the stratified t test of
`stratified_mean`, with Holm's correction over the pooled table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

from peft_vit.base.errors import UserError
from peft_vit.base.statistics import Interval, Verdict, stratified_mean
from peft_vit.base.statistics.descriptive import grouped
from peft_vit.base.statistics.estimates import DECIMALS, Estimate, decide
from peft_vit.core.tasks import Scores
from peft_vit.lab.analysis.comparison import MethodResult, compare, compare_all, method_results, references
from peft_vit.lab.analysis.layers import importance_patterns, study_agreements
from peft_vit.lab.analysis.studies import Run, Study, load_studies

PoolKind = Literal["configurations", "precision", "versions", "splits", "weights", "timings"]
POOL_KINDS: tuple[PoolKind, ...] = get_args(PoolKind)
_NEEDS_OF_ACCURACY: tuple[PoolKind, ...] = ("configurations", "precision", "versions", "splits", "weights")
_NEEDS_OF_TIMES: tuple[PoolKind, ...] = ("configurations", "precision", "versions", "timings")
_MOST_NAMED = 4  # differences in one line

Studies = Mapping[str, Study]  # by label, with its directory where two have the same
RunsOf = Mapping[str, Sequence[Run]]  # likewise


@dataclass(frozen=True)
class Refusal:
    """Something that was not pooled."""

    kind: PoolKind  # what differs, as `--allow-mismatch` names it
    experiments: tuple[str, ...]  # of which nothing was pooled for that reason
    studies: tuple[str, ...]  # in which they would have been
    reason: str  # what differs, in words


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

    studies: Studies  # in the order given
    reference: str | None  # what the others are compared with; None if no experiment stands in every study
    rows: tuple[InStudy, ...]  # every experiment that occurs in two studies and more, by experiment, then study
    pooled: tuple[PooledRow, ...]  # one row an experiment that may be pooled
    times: tuple[PooledRow, ...]  # likewise, of seconds a step
    refusals: tuple[Refusal, ...]  # what was not pooled, and why
    alone: dict[str, str]  # experiment -> the one study with finished runs of it
    # of the importance of sites, between experiments of two studies with the same strategy and metric
    agreements: list[dict[str, Any]]  # rows of `study_agreements`

    @property
    def scores(self) -> Scores:
        """Return by what runs are compared; the standard deviation is the first study's."""
        return next(study.scores for study in self.studies.values() if study.runs)


# --- reading ----------------------------------------------------------------------------------------------------------


def load_across(directories: Sequence[Path]) -> dict[str, Study]:
    """Read the studies below several directories.

    Raises:
        UserError: if a directory can't be read, if a study or a run occurs twice, if there are fewer than two studies,
            or if real and smoke studies are mixed; names them.
    """
    read: list[tuple[Path, Study]] = []
    places: dict[Path, Path] = {}
    for directory in directories:
        place = Path(directory).resolve()
        if place in places:
            raise UserError(f"is given twice (as {places[place]}); give each directory once", file=directory)
        places[place] = directory
        read += [(directory, study) for study in load_studies(directory)]
    _refuse_copies(read)
    smoke = [f"{study.label} in {directory}" for directory, study in read if study.smoke]
    if smoke and len(smoke) < len(read):
        problem = (
            f"{', '.join(smoke)}: smoke runs say nothing about a method, so they can't be compared with a real study"
        )
        raise UserError(f"{problem}; leave them out", file="compare")
    labels = [study.label for _, study in read]
    if len(read) < 2:
        problem = f"holds one study ({labels[0]}), and this needs two; give another directory, or use `peft-vit report`"
        raise UserError(problem, file=directories[0])
    return {
        study.label if labels.count(study.label) == 1 else f"{study.label} ({directory})": study
        for directory, study in read
    }


def _refuse_copies(read: Sequence[tuple[Path, Study]]) -> None:
    """Refuse a run that is in two studies: the same seed of the same configuration on the same images."""
    seen: dict[str, tuple[Path, str]] = {}
    for directory, study in read:
        for run in study.runs:
            spec, made = run.record.spec, run.provenance
            # the same images elsewhere are the same images
            anywhere = {"study": "any", "device": "auto", "threads": 1}
            described = spec.model_copy(update={**anywhere, "data": spec.data.model_copy(update={"path": None})})
            key = f"{described.model_dump_json()} {made.data_sha256} {made.split_sha256} {made.weights_sha256}"
            if key in seen:
                other, name = seen[key]
                same = "holds it" if name == spec.run_id else f"holds it as {name!r}"
                raise UserError(
                    f"holds the run {spec.run_id!r}, and {other} {same} too, which would count it twice as evidence; "
                    "give one of them",
                    file=directory,
                )
            seen[key] = directory, spec.run_id


# --- comparing --------------------------------------------------------------------------------------------------------


def compare_studies(studies: Studies, *, reference: str | None = None, pool: Collection[PoolKind] = ()) -> Across:
    """Compare what occurs in several studies.

    Args:
        studies: at least two, from `load_across`.
        reference: name of the experiment that others are compared with; None: the fixed-rank LoRA, or else the linear
            probe, that is every study's own reference.
        pool: what may be pooled although it differs.

    Raises:
        UserError: if studies are compared by different metrics, the reference has a finished run in fewer than two
            studies, or nothing occurs in two.
    """
    by_metric = grouped((study.scores.metric.words, label) for label, study in studies.items() if study.runs)
    if len(by_metric) > 1:
        metrics = "; ".join(f"{', '.join(labels)} by {words}" for words, labels in by_metric.items())
        raise UserError(f"are compared by different metrics ({metrics}); give studies of one", file="compare")
    found_in = grouped(
        (name, label)
        for label, study in studies.items()
        for name in dict.fromkeys(run.experiment.name for run in study.runs)
    )
    shared = [name for name, labels in found_in.items() if len(labels) > 1]
    if not shared:
        problem = "no experiment has finished runs in two of them under the same name, so there is nothing to compare"
        raise UserError(problem, file=", ".join(studies))
    chosen = _reference(studies, shared) if reference is None else reference
    if chosen is not None and chosen not in shared:
        problem = f"{chosen!r} has finished runs in fewer than two studies; choose one of {', '.join(shared)}"
        raise UserError(problem, field="--reference")
    rows = []
    for label, study in studies.items():
        results = [result for result in method_results(study) if result.experiment.name in shared]
        compared: dict[str, Estimate] = {}
        if chosen is not None and study.of(chosen):
            compared = {estimate.name: estimate for estimate in compare_all(study, chosen, shared)}
        rows += [InStudy(label, result, compared.get(result.experiment.name)) for result in results]
    pooled, times, refusals = _pooled(studies, [] if chosen is None else shared, chosen or "", pool)
    # two may share a name
    apart = [replace(study, name=label.removesuffix(" (smoke)")) for label, study in studies.items()]
    return Across(
        studies=studies,
        reference=chosen,
        rows=tuple(sorted(rows, key=lambda row: shared.index(row.name))),
        pooled=pooled,
        times=times,
        refusals=refusals,
        alone={name: labels[0] for name, labels in found_in.items() if len(labels) == 1},
        agreements=study_agreements([(study, importance_patterns(study)) for study in apart]),
    )


def _reference(studies: Studies, shared: Collection[str]) -> str | None:
    for kind in ("lora", "linear"):
        own = [
            {e.name for e in study.with_method(kind)} & {*references(study)} for study in studies.values() if study.runs
        ]
        if common := set.intersection(*own) & {*shared}:
            return min(common)
    return None


def _pooled(
    studies: Studies, shared: Sequence[str], reference: str, pool: Collection[PoolKind]
) -> tuple[tuple[PooledRow, ...], tuple[PooledRow, ...], tuple[Refusal, ...]]:
    """Return rows of accuracy and of seconds, and what was refused; in the order of the experiments."""
    rows: list[PooledRow] = []
    times: list[PooledRow] = []
    refused: list[tuple[tuple[PoolKind, tuple[str, ...], str], str]] = []
    for name in shared:
        pairs: dict[str, list[tuple[Run, Run]]] = {}  # of runs that `compare` pairs: the experiment's, the reference's
        for label, study in studies.items():
            runs, others = ({run.seed: run for run in study.of(each)} for each in (name, reference))
            paired = compare(study.of(name), study.of(reference), name, reference).by_seed
            if paired:
                pairs[label] = [(runs[seed], others[seed]) for seed in sorted(paired)]
        if name == reference or len(pairs) < 2:
            continue
        differing = differences({label: [run for pair in own for run in pair] for label, own in pairs.items()})
        refused += [((kind, tuple(pairs), why), name) for kind, why in differing.items() if kind not in pool]
        untested = next((studies[label].untested for label in pairs if studies[label].untested), "")
        for table, value, needs, note in (
            (rows, lambda a, b: round(a.score - b.score, DECIMALS), _NEEDS_OF_ACCURACY, untested),
            (times, _log_ratio, _NEEDS_OF_TIMES, ""),
        ):
            allowed = tuple((kind, differing[kind]) for kind in needs if kind in differing)
            known = grouped(
                (label, number) for label, own in pairs.items() for a, b in own if (number := value(a, b)) is not None
            )
            if all(kind in pool for kind, _ in allowed) and len(known) > 1:
                table.append(_row(name, known, allowed, note))
    decided = decide([row.estimate for row in rows])  # one that nothing may decide still counts in the family
    for place, estimate in enumerate(decided):
        open_ = replace(estimate, adjusted_p=None, opposite_p=None, verdict=Verdict.NOT_DECIDED)
        rows[place] = replace(rows[place], estimate=open_ if estimate.note else estimate)
    for place, time in enumerate(times):  # ratios instead of their logarithms, which nothing decides
        logs = time.interval
        low, high = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
        ratio = Interval(math.exp(logs.estimate), low, high, logs.n, logs.confidence, logs.reason)
        times[place] = replace(time, estimate=replace(time.estimate, interval=ratio, significance=None))
    refusals = [Refusal(kind, tuple(names), labels, why) for (kind, labels, why), names in grouped(refused).items()]
    refusals.sort(key=lambda refusal: (refusal.kind, refusal.experiments))
    return tuple(rows), tuple(times), tuple(refusals)


def _log_ratio(a: Run, b: Run) -> float | None:
    first, second = a.record.seconds_per_step, b.record.seconds_per_step
    return math.log(first / second) if first and second else None  # 0 is that of a clock that was set back


def _row(
    name: str, by_study: Mapping[str, Sequence[float]], allowed: tuple[tuple[PoolKind, str], ...], note: str
) -> PooledRow:
    interval, significance = stratified_mean(list(by_study.values()))
    estimate = Estimate(
        name=name,
        by_seed={f"{label}, pair {i}": value for label, own in by_study.items() for i, value in enumerate(own)},
        n_of="pairs",
        interval=interval,
        significance=significance,
        note=note,
    )
    return PooledRow(tuple(by_study), estimate, sum(math.fsum(own) > 0 for own in by_study.values()), allowed)


# --- what must be equal before numbers are pooled ---------------------------------------------------------------------


def parse_pool(text: str, option: str) -> frozenset[PoolKind]:
    """Return what may be pooled although it differs, from ``versions,timings``.

    Raises:
        UserError: for a name that is none of POOL_KINDS; names the option.
    """
    names = [part.strip() for part in text.split(",")] if text else []
    unknown = [name for name in names if name not in POOL_KINDS]
    if unknown:
        problem = f"{unknown[0]!r} is not one of {', '.join(POOL_KINDS)}; name what may be pooled, separated by commas"
        raise UserError(problem, field=option)
    return frozenset(kind for kind in POOL_KINDS if kind in names)


def differences(runs_of: RunsOf) -> dict[PoolKind, str]:
    """Return what differs between the runs of several studies, in words, by its kind.

    Data sets and backbones may differ, since that is what studies are compared over. Splits differ if two studies
    take the same images and divide them otherwise: then test images of one may have trained the other. Seeds of one
    study may divide them otherwise (`train_subset` or `test_split: per_seed`), so what is compared are the seeds that
    both have.
    """
    return {kind: _few(texts) for kind in POOL_KINDS if (texts := list(_DIFFERENCES[kind](runs_of)))}


def _few(texts: Sequence[str]) -> str:
    more = f"; {len(texts) - _MOST_NAMED} more" if len(texts) > _MOST_NAMED else ""
    return "; ".join(texts[:_MOST_NAMED]) + more


def _among(runs_of: RunsOf, value: Callable[[Run], str], name: str = "") -> Iterator[str]:
    """Yield in one text the values and the studies that have them, below a name, if they are not all the same."""
    having = grouped((text, label) for label, runs in runs_of.items() for text in sorted({value(run) for run in runs}))
    if len(having) > 1:
        yield name + _few([f"{text} in {' and '.join(labels)}" for text, labels in sorted(having.items())])


def _versions(runs_of: RunsOf) -> Iterator[str]:
    for name in sorted({name for runs in runs_of.values() for run in runs for name in run.provenance.packages}):
        yield from _among(runs_of, partial(_version, name), f"{name} ")


def _version(package: str, run: Run) -> str:
    return run.provenance.packages.get(package, "not there")


def _weights(runs_of: RunsOf) -> Iterator[str]:
    kinds = [*_among(runs_of, lambda run: f"{'random' if run.provenance.random_weights else 'pretrained'} weights")]
    if kinds:
        yield from kinds
        return
    for model in sorted({run.record.spec.backbone.model for runs in runs_of.values() for run in runs}):
        same = {label: [r for r in runs if r.record.spec.backbone.model == model] for label, runs in runs_of.items()}
        yield from _among(same, lambda run: (run.provenance.weights_sha256 or "random")[:12], f"{model} ")


def _splits(runs_of: RunsOf) -> Iterator[str]:
    for images in sorted({run.provenance.data_sha256 for runs in runs_of.values() for run in runs}):
        splits = {
            label: {r.seed: r.provenance.split_sha256 for r in runs if r.provenance.data_sha256 == images}
            for label, runs in runs_of.items()
        }
        for (label, first), (other, second) in combinations(((label, own) for label, own in splits.items() if own), 2):
            shared = first.keys() & second.keys()
            same = all(first[seed] == second[seed] for seed in shared)
            if not (same if shared else {*first.values()} == {*second.values()}):
                yield f"{label} and {other} divide the same images differently"


def _configurations(runs_of: RunsOf) -> Iterator[str]:
    settings_of = dict.fromkeys(
        (run.experiment.name, label, run.experiment.model_dump_json())
        for label, runs in runs_of.items()
        for run in runs
    )
    by_name = grouped((name, (label, dict(_flat(json.loads(text))))) for name, label, text in settings_of)
    for name, own in sorted(by_name.items()):
        for field in sorted({field for _, settings in own for field in settings}):
            values = grouped((label, str(settings.get(field))) for label, settings in own)
            if len({value for each in values.values() for value in each}) > 1:
                each = ", ".join(f"{' and '.join(sorted({*of}))} in {label}" for label, of in values.items())
                yield f"{name}.{field}: {each}"


def _flat(plain: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield settings by their dotted names; not the flips, since the images say which ones leave a label right."""
    if isinstance(plain, dict):
        for key, value in plain.items():
            yield from _flat(value, f"{path}.{key}" if path else key)
    elif path == "training.augmentation":
        yield path, [name for name in plain if "flip" not in name]
    else:
        yield path, plain


_DIFFERENCES: dict[PoolKind, Callable[[RunsOf], Iterator[str]]] = {
    "configurations": _configurations,
    "precision": lambda runs_of: _among(runs_of, lambda run: run.record.spec.precision),
    "versions": _versions,
    "splits": _splits,
    "weights": _weights,
    "timings": lambda runs_of: _among(runs_of, lambda run: run.hardware),
}
