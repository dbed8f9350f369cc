"""Measures over all studies of a directory. Smoke studies stand apart from real ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations

from peft_vit.analysis.measures.accuracy import OfParameters
from peft_vit.analysis.measures.evidence import Evidence, Measure, Measured, NoDataError, Subject, joined, records_of
from peft_vit.analysis.measures.importance import last_scores, rank_correlation
from peft_vit.analysis.measures.selection import settings_without
from peft_vit.analysis.studies import Run
from peft_vit.records import RunRecord
from peft_vit.statistics import gini, spearman

_FEWEST_EXPERIMENTS = 3  # with two, a rank correlation is 1 or -1 whatever they are


def importance_between_data_sets(
    studies: Sequence[Evidence], parameters: OfParameters, needs: Sequence[str]
) -> tuple[Measured, ...]:
    """Return Spearman's rho of the final scores on two data sets, by common seed.

    A pair are two studies of one backbone on different images, with an experiment of the same name and the same
    settings except for how long and how fast it trained.
    """
    found = [
        _agreement(left, a, right, b)
        for left, right in combinations(studies, 2)
        if left.study.smoke == right.study.smoke
        for a in _subjects(left, parameters, needs)
        for b in _subjects(right, parameters, needs)
        if _comparable(a, b)
    ]
    if not found:
        raise NoDataError("needs two studies of one backbone on different images that share an experiment with scores")
    return tuple(found)


def _subjects(evidence: Evidence, parameters: OfParameters, needs: Sequence[str]) -> tuple[Subject, ...]:
    try:
        return evidence.subjects(parameters.of, needs)
    except NoDataError:
        return ()


def _comparable(a: Subject, b: Subject) -> bool:
    left, right = a.runs[0], b.runs[0]
    same_model = left.record.spec.backbone.model == right.record.spec.backbone.model
    same_weights = left.provenance.weights_sha256 == right.provenance.weights_sha256
    other_images = left.provenance.data_sha256 != right.provenance.data_sha256
    same_settings = settings_without(a.experiment, ["training"]) == settings_without(b.experiment, ["training"])
    return a.name == b.name and same_settings and same_model and same_weights and other_images


def _agreement(left: Evidence, a: Subject, right: Evidence, b: Subject) -> Measured:
    partner = {run.seed: run for run in b.runs}
    pairs = [(run, partner[run.seed]) for run in a.runs if run.seed in partner]
    rhos = {x.seed: rank_correlation(last_scores(x), last_scores(y)) for x, y in pairs}
    known = {seed: rho for seed, rho in rhos.items() if rho is not None}
    return Measured(
        subject=f"{a.name} on {left.study.label} and {right.study.label}",
        values=tuple(known.values()), labels=tuple(str(seed) for seed in known), n_of="seeds",
        records=_records(run for pair in pairs if pair[0].seed in known for run in pair),
        note="" if known else "no seed has scores in both",
    )  # fmt: skip


def gain_where_importance_varies(
    studies: Sequence[Evidence], parameters: OfParameters, needs: Sequence[str]
) -> tuple[Measured, ...]:
    """Return, by seed, Spearman's rho over experiments of all studies between two of their values.

    These are Gini's coefficient of the final scores over sites, and the gain in test accuracy over fixed LoRA at equal
    parameters. The interval over seeds says what other seeds would change on the same experiments and images; it says
    nothing of other data sets.
    """
    return tuple(
        _gains([evidence for evidence in studies if evidence.study.smoke == smoke], parameters, needs)
        for smoke in sorted({evidence.study.smoke for evidence in studies})
    )


def _gains(studies: Sequence[Evidence], parameters: OfParameters, needs: Sequence[str]) -> Measured:
    points: dict[int, list[tuple[float, float]]] = {}
    records: dict[int, list[RunRecord]] = {}
    for evidence in studies:
        loras = [lora.name for lora in evidence.study.fixed_rank_loras()]
        for subject in _subjects(evidence, parameters, needs):
            allocated = evidence.allocation.get(subject.name)
            if allocated is None:
                continue
            gains = dict(zip(allocated.against_fixed.seeds, allocated.against_fixed.by_seed, strict=True))
            for run in subject.runs:
                scores = list(last_scores(run).values())
                if run.seed in gains and all(map(math.isfinite, scores)) and min(scores) >= 0 and sum(scores) > 0:
                    points.setdefault(run.seed, []).append((gini(scores), gains[run.seed]))
                    records.setdefault(run.seed, []).append(run.record)
                    records[run.seed] += records_of(evidence.study, loras, [run.seed])
    rhos = {
        seed: spearman(*zip(*found, strict=True)).rho
        for seed, found in sorted(points.items())
        if len(found) >= _FEWEST_EXPERIMENTS
    }
    known = {seed: rho for seed, rho in rhos.items() if rho is not None}
    most = max((len(found) for found in points.values()), default=0)
    few = f"needs scores and gains of at least {_FEWEST_EXPERIMENTS} experiments with a common seed, there are {most}"
    if most >= _FEWEST_EXPERIMENTS:
        few = "the scores vary alike in all experiments, or they gain the same"
    counts = sorted({len(points[seed]) for seed in known})
    return Measured(
        subject=f"experiments of {joined(evidence.study.label for evidence in studies)}",
        values=tuple(known.values()), labels=tuple(str(seed) for seed in known), n_of="seeds",
        records=tuple(record for seed in known for record in records[seed]),
        note=f"over {joined(counts)} experiments" if known else few,
    )  # fmt: skip


def _records(runs: Iterable[Run]) -> tuple[RunRecord, ...]:
    return tuple(run.record for run in runs)


MEASURES_OF_SEVERAL_STUDIES = {
    "gain_where_importance_varies": Measure(OfParameters, lambda _: "rho", of_studies=gain_where_importance_varies),
    "importance_between_data_sets": Measure(OfParameters, lambda _: "rho", of_studies=importance_between_data_sets),
}
