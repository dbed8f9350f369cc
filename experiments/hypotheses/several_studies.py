"""Measures over all studies of a directory, which may be one. Smoke studies stand apart from real ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from experiments.hypotheses.measures import (
    Evidence,
    Group,
    NoDataError,
    Subject,
    joined,
    rank_correlation,
    settings_without,
)
from experiments.scripts.concentration import gini
from peft_vit.base.statistics.estimates import Estimate, join_notes
from peft_vit.base.statistics.intervals import ROUNDING
from peft_vit.lab.analysis.findings import estimated

Studies = Sequence[tuple[Evidence, Group]]  # each with the experiments that a hypothesis is about
Subjects = tuple[Subject, ...]
_HOW_LONG = ("training", "adalora.update_frequency", "adalora.warmup_steps", "adalora.final_steps")


def importance_between_data_sets(studies: Studies) -> tuple[Estimate, ...]:
    """Return Spearman's rho of the final scores on two data sets, by common seed.

    A pair are two studies of one backbone on different images, with an experiment of the same name and the same
    settings except for how long and how fast it trained, and at which steps it decided.
    """
    found = [
        _agreement(left, a, right, b)
        for (left, own), (right, others) in combinations(_with_subjects(studies, "importance_history"), 2)
        if left.study.smoke == right.study.smoke
        for a in own
        for b in others
        if _comparable(a, b)
    ]
    if not found:
        raise NoDataError("needs two studies of one backbone on different images that share an experiment with scores")
    return tuple(found)


def _with_subjects(studies: Studies, *needs: str) -> list[tuple[Evidence, Subjects]]:
    found: list[tuple[Evidence, Subjects]] = []
    for evidence, of in studies:
        try:
            found.append((evidence, evidence.subjects(of, needs)))
        except NoDataError:
            found.append((evidence, ()))
    return found


def _comparable(a: Subject, b: Subject) -> bool:
    left, right = a.runs[0], b.runs[0]
    same_model = left.record.spec.backbone.model == right.record.spec.backbone.model
    same_weights = left.provenance.weights_sha256 == right.provenance.weights_sha256
    other_images = left.provenance.data_sha256 != right.provenance.data_sha256
    same_settings = settings_without(a.experiment, _HOW_LONG) == settings_without(b.experiment, _HOW_LONG)
    return a.name == b.name and same_settings and same_model and same_weights and other_images


def _agreement(left: Evidence, a: Subject, right: Evidence, b: Subject) -> Estimate:
    partner = {run.seed: run for run in b.runs}
    pairs = [(run, partner[run.seed]) for run in a.runs if run.seed in partner]
    rhos = {x.seed: rank_correlation(x.last_scores(), y.last_scores()) for x, y in pairs}
    known = {seed: rho for seed, rho in rhos.items() if rho is not None}
    name = f"{a.name} on {left.study.label} and {right.study.label}"
    return estimated(name, known, note="" if known else "no seed has scores in both")


def gain_where_importance_varies(studies: Studies) -> tuple[Estimate, ...]:
    """Return, by pair of experiments, how much more the one gains whose scores vary more between sites.

    How much scores vary is Gini's coefficient of the final scores over sites, the gain is that in test accuracy over
    fixed LoRA at equal parameters; both are means over seeds. Experiments of all studies are put in the order of Gini's
    coefficient, and the first of the upper half is set against the first of the lower half, and so on; of an odd
    number the middle one is left out. So pairs are disjoint, and no gain decides who meets whom.

    n counts pairs of experiments and not seeds: more seeds of the same few experiments would only make sure in which
    order these stand, and an order by chance is as likely to rise as to fall. Assumption of the test: if importance
    had nothing to do with it, either one of a pair would be as likely to gain more, independently of other pairs.
    """
    found = _with_subjects(studies, "importance_history", "rank_history")
    return tuple(
        _gains([(evidence, subjects) for evidence, subjects in found if evidence.study.smoke == smoke])
        for smoke in sorted({evidence.study.smoke for evidence, _ in found})
    )


@dataclass(frozen=True)
class _Gain:
    """One experiment: how much its scores vary, what it gains, means over the same seeds."""

    gini: float
    name: str
    gain: float


def _gains(studies: Sequence[tuple[Evidence, Subjects]]) -> Estimate:
    found = sorted(
        (gain for evidence, subjects in studies for gain in _gains_of(evidence, subjects)),
        key=lambda one: (one.gini, one.name),
    )
    half = len(found) // 2
    pairs = [
        (lower, upper)
        for lower, upper in zip(found[:half], found[len(found) - half :], strict=True)
        if upper.gini - lower.gini > ROUNDING
    ]
    note = f"over {len(found)} experiments"
    if len(found) % 2:
        note = join_notes(note, f"in no pair: {found[half].name}")
    if not pairs:
        note = f"needs scores and gains of at least 2 experiments, there are {len(found)}"
        if half:
            note = "the scores vary alike in all experiments"
    return estimated(
        f"experiments of {joined(evidence.study.label for evidence, _ in studies)}",
        {f"{upper.name} - {lower.name}": upper.gain - lower.gain for lower, upper in pairs},
        n_of="pairs of experiments",
        note=note,
    )


def _gains_of(evidence: Evidence, subjects: Subjects) -> Iterator[_Gain]:
    for subject in subjects:
        allocated = evidence.allocation.get(subject.name)
        if allocated is None:
            continue
        gains = allocated.against_fixed.by_seed
        known: dict[int, float] = {}
        for run in subject.runs:
            scores = list(run.last_scores().values())
            if run.seed in gains and all(map(math.isfinite, scores)) and min(scores) >= 0 and sum(scores) > 0:
                known[run.seed] = gini(scores)
        if known:
            yield _Gain(
                gini=math.fsum(known.values()) / len(known),
                name=f"{subject.name} in {evidence.study.label}",
                gain=math.fsum(gains[seed] for seed in known) / len(known),
            )
