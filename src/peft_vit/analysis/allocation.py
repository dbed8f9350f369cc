"""What adaptive ranks did: where the budget went, how it moved, and whether it paid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from peft_vit.analysis.comparison import Estimate, compare_values, decide, same_problem
from peft_vit.analysis.grid import Grid
from peft_vit.analysis.limits import SAME_SIZE
from peft_vit.analysis.studies import Run, Study
from peft_vit.config import ExperimentConfig
from peft_vit.statistics import Interval, gini, mean_interval, normalized_entropy, spearman

SETTLED_AT = 0.9  # share of the final ranks


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
    runs: tuple[dict[str, Any], ...]  # a row a run, see `_run_row`
    courses: tuple[list[dict[str, Any]], ...]  # by run, a row an entry of its ranks, see `_course`
    maps: tuple[RankMap, ...]  # at the steps that all seeds share
    rank_by_matrix: dict[str, Interval]  # mean final rank of a matrix type, interval over seeds
    against_fixed: Estimate  # test accuracy minus that of fixed LoRA at equal trainable parameters


def allocations(study: Study) -> tuple[Allocation, ...]:
    """Return one row for each experiment with adaptive ranks that has a finished run with recorded ranks."""
    found = [
        (experiment, runs)
        for experiment in study.with_method("adalora", "peft_adalora", "qa_adalora")
        if (runs := [run for run in study.of(experiment.name) if run.adapted_sites()])
    ]
    family = decide([against_fixed_lora(study, runs, experiment.name) for experiment, runs in found], study.untested)
    rows = []
    for (experiment, runs), against in zip(found, family, strict=True):
        grid = Grid.of(runs[0].adapted_sites())
        finals = np.stack([_fill_ranks(grid, run.final_ranks()) for run in runs])  # (seeds, blocks, matrices)
        rows.append(
            Allocation(
                experiment=experiment,
                grid=grid,
                runs=tuple(map(_run_row, runs)),
                courses=tuple(map(_course, runs)),
                maps=_rank_maps(grid, runs),
                rank_by_matrix={
                    matrix: mean_interval(np.nanmean(finals[:, :, i], axis=1)) for i, matrix in enumerate(grid.matrices)
                },
                against_fixed=against,
            )
        )
    return tuple(rows)


def _fill_ranks(grid: Grid, ranks: dict[str, int]) -> np.ndarray:
    """Return (blocks, matrices); a site left out by an entry has rank 0, a place without a site is NaN."""
    return grid.fill({site.name: ranks.get(site.name, 0) for site in grid.sites})


def _ranks(run: Run) -> list[list[int]]:
    """Return (entries, sites) ranks."""
    names = [site.name for site in run.adapted_sites()]
    return [[entry.ranks.get(name, 0) for name in names] for entry in run.record.rank_history]


def _run_row(run: Run) -> dict[str, Any]:
    """Return where one run's budget went."""
    ranks, last = _ranks(run), run.record.rank_history[-1]
    final = ranks[-1]
    spread = sum(final) > 0 and len(final) > 1
    return {
        "experiment": run.experiment.name,
        "seed": run.seed,
        "budget": last.budget,  # allowed at the end, in its unit
        "unit": last.unit,
        "spent": last.spent,  # what the ranks cost, in that unit
        "used": sum(final),  # ranks at the end
        "sites": len(final),
        "sites_without_rank": sum(rank == 0 for rank in final),
        "gini": gini(final) if spread else None,  # concentration of the final ranks over sites, 0 for equal ranks
        "evenness": normalized_entropy(final) if spread else None,  # 1 for equal ranks
        "updates": len(ranks) - 1,
        "moved": " ".join(str(moved_ranks(before, after)) for before, after in pairwise(ranks)),  # at each update
    }


def _course(run: Run) -> list[dict[str, Any]]:
    """Return how one run's ranks came to where they end: a row an entry, the first included."""
    ranks = _ranks(run)
    steps = [entry.step for entry in run.record.rank_history]
    overlaps = [overlap(then, ranks[-1]) for then in ranks]
    moved = [None, *(moved_ranks(before, after) for before, after in pairwise(ranks))]
    return [
        {
            "experiment": run.experiment.name,
            "seed": run.seed,
            "step": step,
            "moved": of,
            "churn": None if of is None or not sum(then) else of / sum(then),  # over the ranks that are held afterwards
            "rho_with_final": spearman(then, ranks[-1]),
            "overlap_with_final": shared,
            "settled_step": settled_step(steps, overlaps),
        }
        for step, then, of, shared in zip(steps, ranks, moved, overlaps, strict=True)
    ]


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
