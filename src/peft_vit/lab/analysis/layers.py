"""Which layers matter, and where adaptive ranks went.

Scores of different metrics have different units and scales, so a run's scores are divided by their mean over
its sites: a relative score of 1 is an average site of that run.

Agreement describes. The sites of one network are not independent, so no p-value comes from their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from peft_vit.base.statistics import spearman
from peft_vit.base.statistics.descriptive import grouped
from peft_vit.base.statistics.estimates import Estimate, compare_values, decide
from peft_vit.core.config import SITE_MATRICES, ExperimentConfig
from peft_vit.core.records import SiteInfo
from peft_vit.lab.analysis.comparison import SAME_SIZE, same_problem, same_source
from peft_vit.lab.analysis.studies import Run, Study


@dataclass(frozen=True)
class Grid:
    """Where each site stands: rows are blocks, columns are the matrix types that carry an adapter."""

    blocks: tuple[int, ...]
    matrices: tuple[str, ...]
    sites: dict[tuple[int, str], str]  # block and matrix -> site; Swin has some matrices between stages alone

    @classmethod
    def of(cls, sites: Sequence[SiteInfo]) -> Grid:
        """Lay out the sites of a run."""
        present = dict.fromkeys(site.matrix for site in sites)
        matrices = dict.fromkeys(m for m in (*SITE_MATRICES, *present) if m in present)
        blocks = sorted({site.block for site in sites})
        return cls(tuple(blocks), tuple(matrices), {(site.block, site.matrix): site.name for site in sites})

    def cells(self) -> Iterator[tuple[int, str, str]]:
        """Yield block, matrix and site of each cell, by row; an empty name where there is no site."""
        for block in self.blocks:
            for matrix in self.matrices:
                yield block, matrix, self.sites.get((block, matrix), "")


# --- which layers matter ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImportancePattern:
    """Scores of one experiment."""

    experiment: ExperimentConfig
    seeds: int  # number of those with scores
    grid: Grid  # where each site stands
    raw: dict[str, float]  # site -> mean over seeds of the last scores, in the metric's own unit
    relative: dict[str, float]  # site -> mean over seeds of the last scores over their run's mean
    # seed -> log2 of the mean attention score over the mean MLP score; without a seed where one of both is not above 0
    attention_over_mlp: dict[int, float]
    # Spearman's rho of the scores of two seeds, over disjoint pairs "0-1", "2-3" of the same weights and data set: all
    # pairs would share runs, and no test for independent values could be used
    between_seeds: dict[str, float]

    @property
    def measures(self) -> dict[str, dict[str, float]]:
        """Return measure -> site -> value."""
        return {"relative_score": self.relative, "score": self.raw}


def importance_patterns(study: Study) -> tuple[ImportancePattern, ...]:
    """Return one pattern for each experiment whose runs recorded scores."""
    patterns = []
    for experiment in study.experiments:
        runs = study.runs_of(experiment.name)
        scored = [run for run in runs if run.record.sites and sum(run.last_scores().values()) > 0]
        if scored:
            patterns.append(_pattern(experiment, scored))
    return tuple(patterns)


def _pattern(experiment: ExperimentConfig, runs: list[Run]) -> ImportancePattern:
    finals = [run.last_scores() for run in runs]
    sites = [site for site in runs[0].record.sites if all(site.name in scores for scores in finals)]
    names = [site.name for site in sites]
    scores = np.array([[by_site[name] for name in names] for by_site in finals])  # (seeds, sites)
    relative = scores / np.mean(scores, axis=1, keepdims=True)
    over_mlp: dict[int, float] = {}
    for run, of_run in zip(runs, scores, strict=True):
        by_role = grouped((site.role, score) for site, score in zip(sites, of_run, strict=True))
        attention, mlp = (fmean(by_role.get(role, [0.0])) for role in ("attention", "mlp"))
        if attention > 0 and mlp > 0:
            over_mlp[run.seed] = math.log2(attention / mlp)
    between: dict[str, float] = {}
    for i in range(0, len(runs) - 1, 2):
        a, b, rho = runs[i], runs[i + 1], spearman(scores[i], scores[i + 1])
        if rho is not None and same_source(a) == same_source(b):
            between[f"{a.seed}-{b.seed}"] = rho
    return ImportancePattern(
        experiment=experiment,
        seeds=len(runs),
        grid=Grid.of(sites),
        raw=dict(zip(names, np.mean(scores, axis=0).tolist(), strict=True)),
        relative=dict(zip(names, np.mean(relative, axis=0).tolist(), strict=True)),
        attention_over_mlp=over_mlp,
        between_seeds=between,
    )


# --- where ranks went -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Allocation:
    """One experiment with adaptive ranks: ours, on float or low-bit weights, or PEFT's, whose masks free nothing."""

    experiment: ExperimentConfig
    grid: Grid
    seeds: int
    ranks: dict[str, float]  # site -> mean final rank over seeds; one that a run's last entry leaves out has rank 0
    against_fixed: Estimate  # test accuracy minus that of fixed LoRA at equal trainable parameters

    @property
    def measures(self) -> dict[str, dict[str, float]]:
        """Return measure -> site -> value."""
        return {"rank": self.ranks}


def allocations(study: Study) -> tuple[Allocation, ...]:
    """Return one row for each experiment with adaptive ranks that has a finished run with recorded ranks."""
    adaptive = [
        (experiment, runs)
        for experiment in study.with_method("adalora", "peft_adalora", "qa_adalora")
        if (runs := [run for run in study.runs_of(experiment.name) if run.adapted_sites()])
    ]
    family = decide([against_fixed_lora(study, runs, experiment.name) for experiment, runs in adaptive], study.untested)
    rows = []
    for (experiment, runs), against in zip(adaptive, family, strict=True):
        sites = runs[0].adapted_sites()
        finals = [run.record.rank_history[-1].ranks for run in runs]
        ranks = {site.name: fmean(by_site.get(site.name, 0) for by_site in finals) for site in sites}
        rows.append(Allocation(experiment, Grid.of(sites), len(runs), ranks, against))
    return tuple(rows)


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
        for other in study.runs_of(lora.name)
        if other.seed == run.seed and same_problem(other) == same_problem(run)
    )
