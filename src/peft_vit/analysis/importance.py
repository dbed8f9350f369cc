"""Which layers matter, by the scores that AdaLoRA decided with.

Scores of different metrics have different units and scales, so a run's scores are divided by their mean over
its sites: a relative score of 1 is an average site of that run.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from peft_vit.analysis.comparison import known_mean
from peft_vit.analysis.grid import Grid
from peft_vit.analysis.studies import Run, Study
from peft_vit.config import ExperimentConfig
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
        by_block=np.stack([row_means(one) for one in relative]),
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
