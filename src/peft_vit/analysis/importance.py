"""Which layers matter, by the scores that AdaLoRA decided with; and whether that repeats over seeds and studies.

Scores of different metrics have different units and scales, so a run's scores are divided by their mean over
its sites: a relative score of 1 is an average site of that run.

Agreement describes. The sites of one network are no independent draws, so no p-value comes from their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike

from peft_vit.analysis.comparison import known_mean, same_source
from peft_vit.analysis.grid import Grid
from peft_vit.analysis.studies import Run, Study
from peft_vit.config import AdaLoraConfig, ExperimentConfig
from peft_vit.records import FisherCheck
from peft_vit.statistics import Interval, mean_interval, spearman


@dataclass(frozen=True)
class ImportancePattern:
    """Scores of one experiment."""

    experiment: ExperimentConfig
    seeds: tuple[int, ...]  # seeds with scores
    grid: Grid  # where each site stands
    raw_final: np.ndarray  # (blocks, matrices) mean over seeds of the last scores, in the metric's own unit
    relative_final: np.ndarray  # (seeds, blocks, matrices) last scores, over each run's mean
    by_block: np.ndarray  # (seeds, blocks) mean relative score of a block
    by_matrix: dict[str, Interval]  # matrix type -> mean relative score, interval over seeds
    attention_over_mlp: tuple[float, ...]  # log2 of the mean attention score over the mean MLP score, one value a seed
    steps: tuple[int, ...]  # steps at which scores were recorded in every seed
    # (steps,) Spearman's rho between the scores then and the last ones, mean over seeds
    agreement_with_final: tuple[float | None, ...]
    # (steps, matrices) mean relative score of a matrix type at each of these steps, over seeds; NaN where no seed
    # scored it
    matrix_course: np.ndarray
    agreement_between_seeds: float | None  # mean Spearman's rho over pairs of seeds, or None


def importance_patterns(study: Study) -> tuple[ImportancePattern, ...]:
    """Return one pattern for each experiment whose runs recorded scores."""
    patterns = []
    for experiment in study.experiments:
        runs = [run for run in study.of(experiment.name) if run.record.sites and sum(run.last_scores().values()) > 0]
        if runs:
            patterns.append(_pattern(experiment, runs))
    return tuple(patterns)


def _pattern(experiment: ExperimentConfig, runs: list[Run]) -> ImportancePattern:
    by_run = [{entry.step: entry.scores for entry in run.record.importance_history} for run in runs]
    steps = tuple(sorted(set.intersection(*(set(entries) for entries in by_run))))
    finals = [run.last_scores() for run in runs]
    grid = Grid.of([site for site in runs[0].record.sites if any(site.name in scores for scores in finals)])
    raw = np.stack([grid.fill(scores) for scores in finals])  # (S, B, M)
    relative = raw / np.nanmean(raw, axis=(1, 2), keepdims=True)
    by_matrix = {
        matrix: mean_interval(np.nanmean(relative[:, :, column], axis=1))
        for column, matrix in enumerate(grid.matrices)
        if np.isfinite(relative[:, :, column]).any(axis=1).all()
    }
    between = [rho for a, b in combinations(finals, 2) if (rho := _rho(a, b)) is not None]
    return ImportancePattern(
        experiment=experiment,
        seeds=tuple(run.seed for run in runs),
        grid=grid,
        raw_final=np.mean(raw, axis=0),
        relative_final=relative,
        by_block=np.stack([row_means(of_run) for of_run in relative]),
        by_matrix=by_matrix,
        attention_over_mlp=_attention_over_mlp(relative, grid),
        steps=steps,
        agreement_with_final=tuple(
            known_mean(_rho(entries[step], final) for entries, final in zip(by_run, finals, strict=True))
            for step in steps
        ),
        matrix_course=_matrix_course(grid, by_run, steps),
        agreement_between_seeds=known_mean(between),
    )


def row_means(relative: np.ndarray) -> np.ndarray:
    """Return (rows,) means of (rows, columns) that ignore what has no score; NaN for a row without any."""
    known = np.isfinite(relative)
    total = np.where(known, relative, 0.0).sum(axis=1)
    return np.divide(total, known.sum(axis=1), out=np.full(len(relative), np.nan), where=known.any(axis=1))


def _attention_over_mlp(relative: np.ndarray, grid: Grid) -> tuple[float, ...]:
    """Return log2 ratios, one a seed; empty where a group is absent or has no positive mean."""
    attention, mlp = grid.columns_of("attention"), grid.columns_of("mlp")
    if not attention.any() or not mlp.any():
        return ()
    left = np.nanmean(relative[:, :, attention], axis=(1, 2))
    right = np.nanmean(relative[:, :, mlp], axis=(1, 2))
    if not ((left > 0) & (right > 0)).all():
        return ()
    return tuple(float(ratio) for ratio in np.log2(left / right))


def _matrix_course(grid: Grid, by_run: list[dict[int, dict[str, float]]], steps: tuple[int, ...]) -> np.ndarray:
    """Return (steps, matrices): mean relative score of a matrix type at each step, over the seeds that scored it."""
    course = np.full((len(steps), len(grid.matrices)), np.nan)
    for row, step in enumerate(steps):
        relative = []
        for entries in by_run:
            raw = grid.fill(entries[step])  # (B, M)
            total = np.nansum(raw)
            if total > 0:  # nothing is relative to a mean of zero
                relative.append(row_means((raw / (total / np.isfinite(raw).sum())).T))
        if relative:
            course[row] = row_means(np.stack(relative).T)
    return course


def _rho(left: dict[str, float], right: dict[str, float]) -> float | None:
    """Return Spearman's rho over the sites that both score."""
    common = sorted(left.keys() & right.keys())
    return spearman([left[name] for name in common], [right[name] for name in common])


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
    if judges < 2 or things < 3 or (np.ptp(data, axis=1) == 0).any():
        return None
    return float(scipy.stats.friedmanchisquare(*data.T).statistic) / (judges * (things - 1))


def seed_agreements(patterns: Sequence[ImportancePattern]) -> list[dict[str, Any]]:
    """Return one row for each pattern: Kendall's W over its seeds of what all of them scored.

    Of the last scores of sites, and of the mean relative scores of blocks and of matrix types.
    """
    rows = []
    for pattern in patterns:
        relative = pattern.relative_final.reshape(len(pattern.seeds), -1)  # (S, B * M)
        by_matrix = np.stack([row_means(of.T) for of in pattern.relative_final])  # (S, M)
        sites, blocks, matrices = (of[:, np.isfinite(of).all(axis=0)] for of in (relative, pattern.by_block, by_matrix))
        rows.append(
            {
                "experiment": pattern.experiment.name,
                "seeds": len(pattern.seeds),
                "sites": sites.shape[1],
                "kendalls_w": kendalls_w(sites),
                "kendalls_w_blocks": kendalls_w(blocks),
                "kendalls_w_matrices": kendalls_w(matrices),
            }
        )
    return rows


def study_agreements(scored: Sequence[tuple[Study, Sequence[ImportancePattern]]]) -> list[dict[str, Any]]:
    """Return one row for each two experiments of two studies with the same method, metric and strategy.

    `rho` is Spearman's of the mean final relative scores of the `sites` that both have; None if one of both is
    constant. Smoke studies are set against no real ones. Experiments without shared sites make no row.
    """
    pairs = [
        (study, pattern.experiment, section, _relative_by_site(pattern))
        for study, patterns in scored
        for pattern in patterns
        if (section := pattern.experiment.section(AdaLoraConfig)) is not None  # PEFT's own has no metric of ours
    ]
    rows = []
    for (study, a, own, scores), (other, b, its, other_scores) in combinations(pairs, 2):
        same = (a.method, study.smoke) == (b.method, other.smoke) and (
            own.importance_metric,
            own.allocation_strategy,
        ) == (its.importance_metric, its.allocation_strategy)
        shared = sorted(scores.keys() & other_scores.keys())
        if study.label == other.label or not same or not shared:
            continue
        rows.append(
            {
                "study": study.label,
                "experiment": a.name,
                "other_study": other.label,
                "other_experiment": b.name,
                "metric": own.importance_metric,
                "images": _images(study),
                "other_images": _images(other),
                # 1 or 0; with another one sites share no more than a name
                "same_backbone": int(len({same_source(run)[:2] for run in (*study.runs, *other.runs)}) == 1),
                "sites": len(shared),
                "rho": spearman([scores[s] for s in shared], [other_scores[s] for s in shared]),
            }
        )
    return rows


def _relative_by_site(pattern: ImportancePattern) -> dict[str, float]:
    mean = np.mean(pattern.relative_final, axis=0)  # (B, M)
    by_site = {site.name: pattern.grid.pick(mean, site) for site in pattern.grid.sites}
    return {name: value for name, value in by_site.items() if np.isfinite(value)}


def _images(study: Study) -> str:
    return ", ".join(sorted({run.record.spec.data.title for run in study.runs}))


def fisher_checks(study: Study) -> dict[str, list[FisherCheck]]:
    """Return what runs recorded of how far the score `fisher` is from the empirical Fisher, by experiment."""
    by_name = {e.name: [run.record.fisher_check for run in study.of(e.name)] for e in study.experiments}
    known = {name: [check for check in checks if check is not None] for name, checks in by_name.items()}
    return {name: checks for name, checks in known.items() if checks}
