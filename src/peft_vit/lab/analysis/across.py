"""The same experiments in several studies, over data sets and backbones: differences in each, and pooled where allowed.

An experiment is the same if its name and its configuration are; data and backbone may differ. Within a study, pairs
share seed, weights, images and split, the exact Wilcoxon test decides, with Holm's correction over the study's table.
Over studies a difference is pooled only if nothing differs that POOL_KINDS names, or the caller allows it by name; what
is refused is reported with its reason. The pooled claim "is more accurate than the reference, on average over these
studies" is decided by the stratified t test of `stratified_mean`, with Holm's correction over the pooled table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from peft_vit.base.errors import UserError
from peft_vit.base.statistics import stratified_mean
from peft_vit.base.statistics.descriptive import grouped
from peft_vit.base.statistics.estimates import Estimate, decide
from peft_vit.lab.analysis.comparison import MethodResult, compare_all, method_results, references, same_problem
from peft_vit.lab.analysis.studies import Run, Study, load_studies

PoolKind = Literal["configurations", "precision", "versions", "splits", "weights"]
POOL_KINDS: tuple[PoolKind, ...] = get_args(PoolKind)
_MOST_NAMED = 4  # differences in one line

Studies = Mapping[str, Study]  # by label, with its directory where two have the same


@dataclass(frozen=True, kw_only=True)
class Pooled(Estimate):
    """Test accuracy of one experiment minus the reference's, mean over the studies with pairs of both.

    The claim is "is more accurate than the reference, on average over these studies", corrected over the table; without
    values where pooling is refused.
    """

    studies: tuple[str, ...]  # their labels
    ahead: int  # number of studies in which the experiment's mean is higher
    differing: dict[PoolKind, str]  # what differs between them, in words


@dataclass(frozen=True)
class Across:
    """Several studies, side by side and pooled."""

    studies: Studies  # in the order given
    reference: str | None  # what the others are compared with; None if no experiment is every study's
    # every experiment that occurs in two studies and more, by experiment, then study; compared with the reference,
    # corrected over the study's table
    rows: tuple[MethodResult, ...]
    pooled: tuple[Pooled, ...]
    alone: dict[str, str]  # experiment -> the one study with finished runs of it
    allowed: Collection[PoolKind]  # what is pooled although it differs


def load_across(directories: Sequence[Path]) -> dict[str, Study]:
    """Read the studies below several directories.

    Raises:
        UserError: if a directory can't be read, if a run occurs twice, if there are fewer than two studies, or if real
            and smoke studies are mixed; names them.
    """
    located = [(directory, study) for directory in directories for study in load_studies(directory)]
    places: dict[object, str] = {}  # what tells a run, wherever its images are -> where it is
    for directory, study in located:
        for run in study.runs:
            spec, place = run.record.spec, f"{run.record.spec.run_id!r} in {directory}"
            data = spec.data.model_copy(update={"path": None})
            anywhere = {"study": "any", "device": "auto", "threads": 1, "data": data}
            content = spec.model_copy(update=anywhere).model_dump_json(), same_problem(run)
            if content in places:
                problem = f"holds the run {place}, which is {places[content]} too, and would count twice as evidence"
                raise UserError(f"{problem}; give one of them", file=directory)
            places[content] = place
    labels = [study.label for _, study in located]
    if len({study.smoke for _, study in located}) > 1:
        problem = "smoke runs say nothing about a method, so they can't be compared with real ones; leave them out"
        raise UserError(problem, file=", ".join(labels))
    if len(located) < 2:
        problem = f"holds one study ({labels[0]}), and this needs two; give another directory, or use `peft-vit report`"
        raise UserError(problem, file=directories[0])
    return {
        study.label if labels.count(study.label) == 1 else f"{study.label} ({directory})": study
        for directory, study in located
    }


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
    metrics = {study.scores.metric.words for study in studies.values() if study.runs}
    if len(metrics) > 1:
        problem = f"are compared by different metrics ({', '.join(sorted(metrics))}); give studies of one"
        raise UserError(problem, file=", ".join(studies))
    every = (replace(row, study=label) for label, study in studies.items() for row in method_results(study))
    by_name = grouped((row.name, row) for row in every)
    shared = {name: rows for name, rows in by_name.items() if len(rows) > 1}
    if not shared:
        problem = "no experiment has finished runs in two of them under the same name, so there is nothing to compare"
        raise UserError(problem, file=", ".join(studies))
    if reference is None:
        by_study = [references(study) for study in studies.values() if study.runs]
        common = set.intersection(*map(set, by_study)) & shared.keys()
        reference = next((name for name in reversed(by_study[0]) if name in common), None)
    elif reference not in shared:
        problem = f"{reference!r} has finished runs in fewer than two studies; choose one of {', '.join(shared)}"
        raise UserError(problem, field="--reference")
    rows = {(row.name, row.study): row for name in shared for row in shared[name]}
    for base in shared.get(reference or "", ()):
        names = [name for name, label in rows if label == base.study and name != base.name]
        for estimate in compare_all(studies[base.study], base.name, names):
            place = estimate.name, base.study
            rows[place] = replace(rows[place], estimate=estimate)
    paired = grouped((row.name, row) for row in rows.values() if row.estimate is not None and row.estimate.by_seed)
    untested = next((study.untested for study in studies.values() if study.untested), "")
    pooled = decide([_pooled(studies, paired[name], pool) for name in paired if len(paired[name]) > 1], untested)
    alone = {name: rows_of[0].study for name, rows_of in by_name.items() if len(rows_of) == 1}
    return Across(studies, reference, tuple(rows.values()), pooled, alone, pool)


def _pooled(studies: Studies, rows: Sequence[MethodResult], pool: Collection[PoolKind]) -> Pooled:
    """Pool what one experiment differs by in several studies, if nothing else differs between their pairs."""
    estimates = {row.study: row.estimate for row in rows if row.estimate is not None}
    name, reference = rows[0].name, estimates[rows[0].study].reference
    runs_of = {label: (*studies[label].runs_of(name), *studies[label].runs_of(reference)) for label in estimates}
    differing = differences(runs_of)
    values = [list(estimate.by_seed.values()) for estimate in estimates.values()]
    pooled = Pooled(
        name=name,
        reference=reference,
        n_of="pairs",
        studies=tuple(estimates),
        ahead=sum(sum(by_pair) > 0 for by_pair in values),
        differing=differing,
    )
    if not differing.keys() <= set(pool):
        return pooled
    interval, significance = stratified_mean(values)
    pairs = ((label, *pair) for label, estimate in estimates.items() for pair in estimate.by_seed.items())
    by_seed = {(label, seed): difference for label, seed, difference in pairs}
    return replace(pooled, by_seed=by_seed, interval=interval, significance=significance)


# --- what must be equal before numbers are pooled ---------------------------------------------------------------------


def parse_pool(text: str, option: str) -> frozenset[PoolKind]:
    """Return what may be pooled although it differs, from ``versions,weights``.

    Raises:
        UserError: for a name that is none of POOL_KINDS; names the option.
    """
    names = {part.strip() for part in text.split(",")} if text else set()
    if unknown := names.difference(POOL_KINDS):
        raise UserError(f"{min(unknown)!r} is not one of {', '.join(POOL_KINDS)}", field=option)
    return frozenset(kind for kind in POOL_KINDS if kind in names)


def differences(runs_of: Mapping[str, Sequence[Run]]) -> dict[PoolKind, str]:
    """Return what differs between the runs of several studies, in words, by its kind.

    Data sets and backbones may differ, since that is what studies are compared over. Splits differ if two studies
    take the same images and divide them otherwise: then test images of one may have trained the other. Where each seed
    divides them otherwise (`train_subset` or `test_split: per_seed`), what is compared are the seeds that both have.
    """
    differing: dict[PoolKind, str] = {}
    for kind, settings in _SETTINGS.items():
        values = grouped(
            (name, (label, str(value)))
            for label, runs in runs_of.items()
            for run in runs
            for name, value in settings(run).items()
        )
        lines = [
            f"{name}: {', '.join(f'{value} in {label}' for label, value in dict.fromkeys(labelled))}"
            for name, labelled in sorted(values.items())
            if len({value for _, value in labelled}) > 1
        ]
        if lines:
            more = f"; {len(lines) - _MOST_NAMED} more" if len(lines) > _MOST_NAMED else ""
            differing[kind] = "; ".join(lines[:_MOST_NAMED]) + more
    return differing


def _splits(run: Run) -> dict[str, str]:
    data, origin = run.record.spec.data, run.provenance
    by_seed = data.tests_by_seed or data.train_subset == "per_seed"
    return {f"images {origin.data_sha256[:8]}{f', seed {run.seed}' if by_seed else ''}": origin.split_sha256[:8]}


def _weights(run: Run) -> dict[str, str]:
    origin = run.provenance
    kind = "random" if origin.random_weights else "pretrained"
    return {"weights": kind, run.record.spec.backbone.model: (origin.weights_sha256 or kind)[:12]}


def _flat(plain: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield settings by their dotted names; not the flips, since the images say which ones leave a label right."""
    if isinstance(plain, dict):
        for key, value in plain.items():
            yield from _flat(value, f"{path}.{key}")
    elif path.endswith(".training.augmentation"):
        yield path, [name for name in plain if "flip" not in name]
    else:
        yield path, plain


_SETTINGS: dict[PoolKind, Callable[[Run], Mapping[str, Any]]] = {
    "configurations": lambda run: dict(_flat(run.experiment.model_dump(mode="json"), run.experiment.name)),
    "precision": lambda run: {"precision": run.record.spec.precision},
    "versions": lambda run: run.provenance.packages,
    "splits": _splits,
    "weights": _weights,
}
