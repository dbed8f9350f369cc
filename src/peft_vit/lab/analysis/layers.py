"""Which layers matter, where adaptive ranks went and how they moved.

Scores of different metrics have different units and scales, so a run's scores are divided by their mean over
its sites: a relative score of 1 is an average site of that run.

Agreement describes. The sites of one network are not independent, so no p-value comes from their number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike

from peft_vit.base.statistics import Interval, gini, mean_interval, normalized_entropy, spearman
from peft_vit.base.statistics.estimates import Estimate, compare_values, decide, known_mean
from peft_vit.core.config import SITE_MATRICES, AdaLoraConfig, ExperimentConfig
from peft_vit.core.records import Role, SiteInfo
from peft_vit.lab.analysis.comparison import SAME_SIZE, same_problem, same_source
from peft_vit.lab.analysis.studies import Run, Study


@dataclass(frozen=True)
class Grid:
    """Where each site stands: rows are blocks, columns are the matrix types that carry an adapter."""

    blocks: tuple[int, ...]
    matrices: tuple[str, ...]
    sites: tuple[SiteInfo, ...]

    @classmethod
    def of(cls, sites: Sequence[SiteInfo]) -> Grid:
        """Lay out the sites of a run."""
        present = dict.fromkeys(site.matrix for site in sites)
        blocks = tuple(sorted({site.block for site in sites}))
        matrices = [m for m in (*SITE_MATRICES, *present) if m in present]
        return cls(blocks, tuple(dict.fromkeys(matrices)), tuple(sites))

    def fill(self, values: Mapping[str, float]) -> np.ndarray:
        """Return (blocks, matrices); NaN where no value was recorded."""
        array = np.full((len(self.blocks), len(self.matrices)), np.nan)
        for site in self.sites:
            if site.name in values:
                array[self._place(site)] = values[site.name]
        return array

    def has_matrix(self) -> np.ndarray:
        """Return (blocks, matrices) whether a block has such a matrix; Swin merges patches between stages alone."""
        return ~np.isnan(self.fill({site.name: 1.0 for site in self.sites}))

    def pick(self, values: np.ndarray, site: SiteInfo) -> float:
        """Return a site's entry of a (blocks, matrices) array."""
        return float(values[self._place(site)])

    def _place(self, site: SiteInfo) -> tuple[int, int]:
        return self.blocks.index(site.block), self.matrices.index(site.matrix)

    def columns_of(self, role: Role) -> np.ndarray:
        """Return (matrices,) whether a column holds matrices of a role."""
        roles = {site.matrix: site.role for site in self.sites}
        return np.array([roles[matrix] == role for matrix in self.matrices])


# --- which layers matter ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImportancePattern:
    """Scores of one experiment."""

    experiment: ExperimentConfig
    seeds: tuple[int, ...]  # seeds with scores
    grid: Grid  # where each site stands
    raw_final: np.ndarray  # (blocks, matrices) mean over seeds of the last scores, in the metric's own unit
    relative_final: np.ndarray  # (seeds, blocks, matrices) last scores, over each run's mean
    by_matrix: dict[str, Interval]  # matrix type -> mean relative score, interval over seeds
    # log2 of the mean attention score over the mean MLP score, by seed; none where a group is absent or scores nothing
    attention_over_mlp: tuple[float, ...]
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
    finals = [run.last_scores() for run in runs]
    grid = Grid.of([site for site in runs[0].record.sites if any(site.name in scores for scores in finals)])
    raw = np.stack([grid.fill(scores) for scores in finals])  # (S, B, M)
    relative = raw / np.nanmean(raw, axis=(1, 2), keepdims=True)
    by_matrix = {
        matrix: mean_interval(np.nanmean(relative[:, :, column], axis=1))
        for column, matrix in enumerate(grid.matrices)
        if np.isfinite(relative[:, :, column]).any(axis=1).all()
    }
    attention, mlp = grid.columns_of("attention"), grid.columns_of("mlp")
    over_mlp: tuple[float, ...] = ()
    if attention.any() and mlp.any():
        left, right = (np.nanmean(relative[:, :, columns], axis=(1, 2)) for columns in (attention, mlp))  # (S,)
        if ((left > 0) & (right > 0)).all():
            over_mlp = tuple(np.log2(left / right).tolist())
    between = [rho for a, b in combinations(finals, 2) if (rho := _rho(a, b)) is not None]
    return ImportancePattern(
        experiment=experiment,
        seeds=tuple(run.seed for run in runs),
        grid=grid,
        raw_final=np.mean(raw, axis=0),
        relative_final=relative,
        by_matrix=by_matrix,
        attention_over_mlp=over_mlp,
        agreement_between_seeds=known_mean(between),
    )


def row_means(relative: np.ndarray) -> np.ndarray:
    """Return (rows,) means of (rows, columns) that ignore what has no score; NaN for a row without any."""
    known = np.isfinite(relative)
    total = np.where(known, relative, 0.0).sum(axis=1)
    return np.divide(total, known.sum(axis=1), out=np.full(len(relative), np.nan), where=known.any(axis=1))


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
    """
    data = np.asarray(scores, dtype=np.float64)
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
        by_block = np.stack([row_means(of) for of in pattern.relative_final])  # (S, B)
        by_matrix = np.stack([row_means(of.T) for of in pattern.relative_final])  # (S, M)
        sites, blocks, matrices = (of[:, np.isfinite(of).all(axis=0)] for of in (relative, by_block, by_matrix))
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
    comparable: list[tuple[Study, str, tuple[object, ...], dict[str, float]]] = []
    kind: tuple[object, ...]  # what has to be equal
    for study, patterns in scored:
        for pattern in patterns:
            section = pattern.experiment.section(AdaLoraConfig)
            if section is not None:  # PEFT's own has no metric of ours
                mean = np.mean(pattern.relative_final, axis=0)  # (B, M)
                by_site = {site.name: pattern.grid.pick(mean, site) for site in pattern.grid.sites}
                known = {name: value for name, value in by_site.items() if np.isfinite(value)}
                kind = section.importance_metric, section.allocation_strategy, pattern.experiment.method, study.smoke
                comparable.append((study, pattern.experiment.name, kind, known))
    rows = []
    for (study, name, kind, scores), (other, other_name, other_kind, other_scores) in combinations(comparable, 2):
        shared = sorted(scores.keys() & other_scores.keys())
        if study.label == other.label or kind != other_kind or not shared:
            continue
        rows.append(
            {
                "study": study.label,
                "experiment": name,
                "other_study": other.label,
                "other_experiment": other_name,
                "metric": kind[0],
                "images": _images(study),
                "other_images": _images(other),
                # 1 or 0; with another one sites share no more than a name
                "same_backbone": int(len({same_source(run)[:2] for run in (*study.runs, *other.runs)}) == 1),
                "sites": len(shared),
                "rho": spearman([scores[s] for s in shared], [other_scores[s] for s in shared]),
            }
        )
    return rows


def _images(study: Study) -> str:
    return ", ".join(sorted({run.record.spec.data.title for run in study.runs}))


# --- where ranks went, and how they moved -----------------------------------------------------------------------------

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
    adaptive = [
        (experiment, runs)
        for experiment in study.with_method("adalora", "peft_adalora", "qa_adalora")
        if (runs := [run for run in study.of(experiment.name) if run.adapted_sites()])
    ]
    family = decide([against_fixed_lora(study, runs, experiment.name) for experiment, runs in adaptive], study.untested)
    rows = []
    for (experiment, runs), against in zip(adaptive, family, strict=True):
        grid = Grid.of(runs[0].adapted_sites())
        finals = np.stack([_fill_ranks(grid, run.final_ranks()) for run in runs])  # (S, B, M)
        by_run = [{entry.step: entry.ranks for entry in run.record.rank_history} for run in runs]
        rows.append(
            Allocation(
                experiment=experiment,
                grid=grid,
                runs=tuple(map(_run_row, runs)),
                courses=tuple(map(_course, runs)),
                maps=tuple(
                    RankMap(step, np.mean([_fill_ranks(grid, entries[step]) for entries in by_run], axis=0))
                    for step in sorted(set.intersection(*(set(entries) for entries in by_run)))
                ),
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


def rank_gini(run: Run) -> float | None:
    """Return how concentrated a run's final ranks are; None without ranks on two sites."""
    ranks = list(run.final_ranks().values())
    return gini(ranks) if len(ranks) > 1 and sum(ranks) > 0 else None


def rank_entropy(run: Run) -> float | None:
    """Return how even a run's final ranks are, over the largest entropy; None without ranks on two sites."""
    ranks = list(run.final_ranks().values())
    return normalized_entropy(ranks) if len(ranks) > 1 and sum(ranks) > 0 else None


def _run_row(run: Run) -> dict[str, Any]:
    """Return where one run's budget went."""
    ranks, last = _ranks(run), run.record.rank_history[-1]
    final = ranks[-1]
    return {
        "experiment": run.experiment.name,
        "seed": run.seed,
        "budget": last.budget,  # allowed at the end, in its unit
        "unit": last.unit,
        "spent": last.spent,  # what the ranks cost, in that unit
        "used": sum(final),  # ranks at the end
        "sites": len(final),
        "sites_without_rank": sum(rank == 0 for rank in final),
        "gini": rank_gini(run),  # concentration of the final ranks over sites, 0 for equal ranks
        "evenness": rank_entropy(run),  # 1 for equal ranks
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


def against_fixed_lora(study: Study, runs: list[Run], name: str) -> Estimate:
    """Compare an adaptive experiment with fixed-rank LoRA at equal trainable parameters, paired by seed.

    The reference accuracy is read off the line through the same seed's LoRA runs, linear in the logarithm of
    trainable parameters (head included, as at the end of the run). Outside the range of those runs nothing is
    extrapolated: the seed is left out and counted in the note. Sizes within SAME_SIZE are equal, so a run that lies
    outside by no more than that is compared with the run at the range's end.
    """
    by_seed: dict[int, tuple[float, float]] = {}
    for run in runs:
        if points := fixed_lora_line(study, run):
            position, slack = math.log2(run.parameters.final), math.log2(1 + SAME_SIZE)
            x, y = zip(*points, strict=True)
            if x[0] - slack <= position <= x[-1] + slack:
                by_seed[run.seed] = (
                    run.test.accuracy,
                    float(np.interp(position, x, y)),
                )  # beyond an end, the value there
    outside = len(runs) - len(by_seed)
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
