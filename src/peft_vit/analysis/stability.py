"""Does importance repeat? Over seeds, over studies with other images, and with the empirical Fisher for `fisher`.

All describe. The sites of one network are no independent draws, so no p-value comes from their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import scipy
from numpy.typing import ArrayLike

from peft_vit.analysis.comparison import same_source
from peft_vit.analysis.importance import ImportancePattern, row_means
from peft_vit.analysis.studies import Study
from peft_vit.config import AdaLoraConfig, ExperimentConfig
from peft_vit.records import FisherCheck
from peft_vit.statistics import spearman

_FEWEST_SITES = 3


def kendalls_w(scores: ArrayLike) -> float | None:
    """Return Kendall's W of (m, n) scores: 1 if all m judges order n things alike, near 0 if they do as chance would.

    Judges are seeds here, and things are sites.

    ``W = 12 S / (m^2 (n^3 - n) - m T)``, S the squared deviations of the n rank sums from their mean, T the sum of
    t^3 - t over groups of t ties of each judge. Without ties the mean Spearman's rho over pairs of judges is ``(m W
    - 1) / (m - 1)``. Source: Kendall & Babington Smith, Annals of Mathematical Statistics 10 (1939); computed from
    Friedman's statistic of `scipy.stats.friedmanchisquare`, which is m (n - 1) W.

    Returns:
        None for fewer than 2 judges or 3 things, or if a judge makes no difference between things.

    Raises:
        ValueError: for scores that are no finite (m, n) array.
    """
    data = np.asarray(scores, dtype=np.float64)
    if data.ndim != 2 or not np.isfinite(data).all():
        raise ValueError("expected a two-dimensional array of finite scores")
    judges, things = data.shape
    if judges < 2 or things < _FEWEST_SITES or (np.ptp(data, axis=1) == 0).any():
        return None
    return float(scipy.stats.friedmanchisquare(*data.T).statistic) / (judges * (things - 1))


@dataclass(frozen=True)
class SeedAgreement:
    """Do the seeds of one experiment agree on the order of sites?"""

    experiment: ExperimentConfig
    w: float | None  # Kendall's W over seeds of the last scores; None as in `kendalls_w`
    seeds: int  # judges
    sites: int  # that all seeds scored
    by_block: float | None  # Kendall's W of the blocks' mean relative scores
    by_matrix: float | None  # the same of the matrix types'


def seed_agreements(patterns: Sequence[ImportancePattern]) -> tuple[SeedAgreement, ...]:
    """Return one row for each pattern."""
    return tuple(map(_seed_agreement, patterns))


def _seed_agreement(pattern: ImportancePattern) -> SeedAgreement:
    seeds = len(pattern.seeds)
    relative = pattern.relative_final.reshape(seeds, -1)  # (S, B * M)
    sites = _judged_by_all(relative)
    by_matrix = np.stack([row_means(one.T) for one in pattern.relative_final])  # (S, M)
    return SeedAgreement(
        experiment=pattern.experiment,
        w=kendalls_w(sites),
        seeds=seeds,
        sites=sites.shape[1],
        by_block=kendalls_w(_judged_by_all(pattern.by_block)),
        by_matrix=kendalls_w(_judged_by_all(by_matrix)),
    )


def _judged_by_all(scores: np.ndarray) -> np.ndarray:
    return scores[:, np.isfinite(scores).all(axis=0)]


@dataclass(frozen=True)
class StudyAgreement:
    """Do two studies agree on which sites matter, by the same metric?"""

    metric: str  # the importance metric of both
    # study, other: labels of the studies
    study: str
    other: str
    # experiment, other_experiment: whose scores
    experiment: str
    other_experiment: str
    # images, other_images: data sets
    images: str
    other_images: str
    # Spearman's rho of the mean final relative scores of shared sites; None if one of both is constant
    rho: float | None
    sites: int  # shared
    same_backbone: bool  # whether both have the same model and weights; otherwise sites share no more than a name


def study_agreements(scored: Sequence[tuple[Study, Sequence[ImportancePattern]]]) -> tuple[StudyAgreement, ...]:
    """Return one row for each two experiments of two studies with the same method, metric and strategy.

    Smoke studies are set against no real ones. Experiments without shared sites make no row.
    """
    found = [
        (study, pattern.experiment, kind, _relative_by_site(pattern))
        for study, patterns in scored
        for pattern in patterns
        if (kind := _kind(study, pattern.experiment)) is not None
    ]
    rows = []
    for (study, a, kind, scores), (other, b, other_kind, other_scores) in combinations(found, 2):
        shared = sorted(scores.keys() & other_scores.keys())
        if study.label == other.label or kind != other_kind or not shared:
            continue
        rows.append(
            StudyAgreement(
                metric=kind[0],
                study=study.label,
                other=other.label,
                experiment=a.name,
                other_experiment=b.name,
                images=_images(study),
                other_images=_images(other),
                rho=spearman([scores[s] for s in shared], [other_scores[s] for s in shared]),
                sites=len(shared),
                same_backbone=len({same_source(run)[:2] for run in (*study.runs, *other.runs)}) == 1,
            )
        )
    return tuple(rows)


def _kind(study: Study, experiment: ExperimentConfig) -> tuple[str, str, str, bool] | None:
    """Return metric, strategy, method, and whether of smoke runs; None for PEFT's own allocator: no metric of ours."""
    section = experiment.section(AdaLoraConfig)
    if section is None:
        return None
    return section.importance_metric, section.allocation_strategy, experiment.method, study.smoke


def _relative_by_site(pattern: ImportancePattern) -> dict[str, float]:
    mean = np.mean(pattern.relative_final, axis=0)  # (B, M)
    by_site = {site.name: pattern.grid.pick(mean, site) for site in pattern.grid.sites}
    return {name: value for name, value in by_site.items() if np.isfinite(value)}


def _images(study: Study) -> str:
    return ", ".join(sorted({run.record.spec.data.title for run in study.runs}))


@dataclass(frozen=True)
class FisherAgreement:
    """How far the score `fisher` is from the empirical Fisher in one experiment: what its runs recorded, one a seed."""

    experiment: ExperimentConfig
    checks: tuple[FisherCheck, ...]

    @property
    def rhos(self) -> tuple[float, ...]:
        """Return Spearman's rho over the sites, of the seeds that have one."""
        return tuple(check.rho for check in self.checks if check.rho is not None)


def fisher_agreements(study: Study) -> tuple[FisherAgreement, ...]:
    """Return one for each experiment whose runs recorded the comparison."""
    checks_of = {e.name: [run.record.fisher_check for run in study.of(e.name)] for e in study.experiments}
    kept = [(e, tuple(check for check in checks_of[e.name] if check is not None)) for e in study.experiments]
    return tuple(FisherAgreement(experiment, checks) for experiment, checks in kept if checks)
