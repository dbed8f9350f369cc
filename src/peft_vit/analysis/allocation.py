"""What adaptive ranks did: where the budget went, how it moved, and whether it paid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from peft_vit.analysis.comparison import Estimate, compare_values, decide, same_problem
from peft_vit.analysis.grid import Grid
from peft_vit.analysis.limits import SAME_SIZE
from peft_vit.analysis.studies import Run, Study
from peft_vit.config import BudgetUnit, ExperimentConfig
from peft_vit.statistics import Interval, gini, mean_interval, normalized_entropy, spearman

SETTLED_AT = 0.9  # share of the final ranks


@dataclass(frozen=True)
class RunAllocation:
    """One run's ranks."""

    seed: int
    used: int  # ranks at the end
    spent: int  # what they cost, in the budget's unit
    budget: int | None  # allowed at the end, in its unit
    unit: BudgetUnit  # of the budget
    gini: float | None  # concentration of the final ranks over sites, 0 for equal ranks
    entropy: float | None  # evenness of the final ranks, 1 for equal ranks
    sites: int
    sites_without_rank: int  # sites with rank 0 at the end
    updates: int  # number of rank entries after the first
    steps: tuple[int, ...]  # at which entries begin, the first included
    # ranks that went from one site to another at each update; what the budget took away does not count
    moved: tuple[int, ...]
    churn: tuple[float | None, ...]  # `moved` over the ranks that are held after the update; None where none are
    agreement_with_final: tuple[float | None, ...]  # Spearman's rho of the ranks from each entry on with the final ones
    # `overlap` of the ranks from each entry on with the final ones; None without ranks
    overlap_with_final: tuple[float | None, ...]
    settled_step: int | None  # first step from which on that overlap is at least SETTLED_AT; None without final ranks


@dataclass(frozen=True)
class RankMap:
    """Mean rank over seeds from one step on."""

    step: int
    ranks: np.ndarray  # (blocks, matrices)


@dataclass(frozen=True)
class Allocation:
    """One experiment with adaptive ranks: ours, on float or low-bit weights, or PEFT's, whose masks free nothing."""

    experiment: ExperimentConfig
    grid: Grid
    runs: tuple[RunAllocation, ...]
    maps: tuple[RankMap, ...]  # at the steps that all seeds share
    rank_by_matrix: dict[str, Interval]  # mean final rank of a matrix type, interval over seeds
    against_fixed: Estimate  # test accuracy minus that of fixed LoRA at equal trainable parameters


def allocations(study: Study) -> tuple[Allocation, ...]:
    """Return one row for each experiment with adaptive ranks that has a finished run with recorded ranks."""
    found = []
    for experiment in study.with_method("adalora", "peft_adalora", "qa_adalora"):
        runs = [run for run in study.of(experiment.name) if run.adapted_sites()]
        if runs:
            found.append((experiment, runs))
    family = decide([against_fixed_lora(study, runs, experiment.name) for experiment, runs in found], study.untested)
    return tuple(
        _allocation(experiment, runs, against) for (experiment, runs), against in zip(found, family, strict=True)
    )


def _allocation(experiment: ExperimentConfig, runs: list[Run], against: Estimate) -> Allocation:
    grid = Grid.of(runs[0].adapted_sites())
    finals = np.stack([_fill_ranks(grid, run.final_ranks()) for run in runs])  # (seeds, blocks, matrices)
    return Allocation(
        experiment=experiment,
        grid=grid,
        runs=tuple(_run_allocation(run) for run in runs),
        maps=_rank_maps(grid, runs),
        rank_by_matrix={
            matrix: mean_interval(np.nanmean(finals[:, :, i], axis=1)) for i, matrix in enumerate(grid.matrices)
        },
        against_fixed=against,
    )


def _fill_ranks(grid: Grid, ranks: dict[str, int]) -> np.ndarray:
    """Return (blocks, matrices); a site left out by an entry has rank 0, a place without a site is NaN."""
    return grid.fill({site.name: ranks.get(site.name, 0) for site in grid.sites})


def _run_allocation(run: Run) -> RunAllocation:
    history = run.record.rank_history
    names = [site.name for site in run.adapted_sites()]
    ranks = [[entry.ranks.get(name, 0) for name in names] for entry in history]
    final = ranks[-1]
    spread = sum(final) > 0 and len(final) > 1
    steps = tuple(entry.step for entry in history)
    moved = tuple(moved_ranks(before, after) for before, after in pairwise(ranks))
    overlaps = tuple(overlap(then, final) for then in ranks)
    return RunAllocation(
        seed=run.seed,
        used=sum(final),
        spent=history[-1].spent,
        budget=history[-1].budget,
        unit=history[-1].unit,
        gini=gini(final) if spread else None,
        entropy=normalized_entropy(final) if spread else None,
        sites=len(names),
        sites_without_rank=sum(rank == 0 for rank in final),
        updates=len(history) - 1,
        steps=steps,
        moved=moved,
        churn=tuple(m / sum(after) if sum(after) else None for m, after in zip(moved, ranks[1:], strict=True)),
        agreement_with_final=tuple(spearman(then, final) for then in ranks),
        overlap_with_final=overlaps,
        settled_step=settled_step(steps, overlaps),
    )


def moved_ranks(before: list[int], after: list[int]) -> int:
    """Return how many ranks changed their site: ``(sum |d| - |sum d|) / 2`` with d the change by site.

    A budget that only shrinks or grows moves nothing; a rank taken here and given there counts once.
    """
    change = np.subtract(after, before)
    return int((np.abs(change).sum() - abs(change.sum())) // 2)


def overlap(ranks: Sequence[int], final: Sequence[int]) -> float | None:
    """Return the share of the final ranks that already stood where they end: ``sum_i min(p_i, q_i)``.

    p and q are the shares of all ranks that each of (sites,) holds, then and in the end. Shares and not counts: while
    the budget is still larger than in the end, nearly every site holds its final rank and more. It is 1 minus half of
    ``sum_i |p_i - q_i|``, the total variation distance. Equal ranks at the start overlap a good deal with any final
    ones, so the value at step 0 is what nothing decided gives. None if either has no rank at all.
    """
    total, end = sum(ranks), sum(final)
    if not total or not end:
        return None
    return sum(min(then * end, last * total) for then, last in zip(ranks, final, strict=True)) / (total * end)


def settled_step(steps: Sequence[int], overlaps: Sequence[float | None]) -> int | None:
    """Return the first of (entries,) steps from which on every overlap with the final ranks is at least SETTLED_AT."""
    settled = None
    for step, value in zip(reversed(steps), reversed(overlaps), strict=True):
        if value is None or value < SETTLED_AT:
            break
        settled = step
    return settled


def _rank_maps(grid: Grid, runs: list[Run]) -> tuple[RankMap, ...]:
    by_run = [{entry.step: entry.ranks for entry in run.record.rank_history} for run in runs]
    common = sorted(set.intersection(*(set(entries) for entries in by_run)))
    return tuple(
        RankMap(step, np.mean([_fill_ranks(grid, entries[step]) for entries in by_run], axis=0)) for step in common
    )


def against_fixed_lora(study: Study, runs: list[Run], name: str) -> Estimate:
    """Compare an adaptive experiment with fixed-rank LoRA at equal trainable parameters, paired by seed.

    The reference accuracy is read off the line through the same seed's LoRA runs, linear in the logarithm of
    trainable parameters (head included, as at the end of the run). Outside the range of those runs nothing is
    extrapolated: the seed is left out and counted in the note. Sizes within SAME_SIZE are equal, so a run that lies
    outside by no more than that is compared with the run at the range's end.
    """
    on_line = {run.seed: (run.test.accuracy, _on_lora_line(study, run)) for run in runs}
    by_seed = {seed: (own, line) for seed, (own, line) in on_line.items() if line is not None}
    outside = len(on_line) - len(by_seed)
    note = f"{outside} seed(s) left out: no fixed LoRA of as many parameters, or below and above" if outside else ""
    return compare_values(by_seed, name=name, reference="fixed LoRA at equal parameters", note=note)


def fixed_lora_line(study: Study, run: Run) -> list[tuple[float, float]]:
    """Return log2 of the trainable parameters and accuracy of the fixed LoRAs of a run's seed, smallest first."""
    return sorted(
        (math.log2(other.parameters.final), other.test.accuracy)
        for lora in study.fixed_rank_loras()
        for other in study.of(lora.name)
        if other.seed == run.seed and same_problem(other) == same_problem(run)
    )


def _on_lora_line(study: Study, run: Run) -> float | None:
    points = fixed_lora_line(study, run)
    if not points:
        return None
    position = math.log2(run.parameters.final)
    x, y = zip(*points, strict=True)
    if not x[0] - math.log2(1 + SAME_SIZE) <= position <= x[-1] + math.log2(1 + SAME_SIZE):
        return None
    return float(np.interp(position, x, y))  # beyond an end, the value there
