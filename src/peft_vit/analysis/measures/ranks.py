"""Measures of where ranks went."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean
from typing import Literal

from peft_vit.analysis.measures.evidence import Evidence, Measured, OfParameters, Subject, Subjects, by_seed, together
from peft_vit.analysis.studies import Run
from peft_vit.config import SiteMatrix
from peft_vit.statistics import gini, normalized_entropy


class RankLeadParameters(OfParameters):
    """Of `rank_lead`."""

    matrix: SiteMatrix
    over: Literal["each", "mean"]


def rank_lead(_: Evidence, subjects: Subjects, parameters: RankLeadParameters) -> tuple[Measured, ...]:
    """Return the mean final rank of a matrix type minus that of the others.

    `over: each` asks for the most of all types. Every other type is a rival of its own, tested over seeds; the values
    are those against the rival of the largest mean over seeds. The largest type of each seed would not do: it changes
    with chance, and lies above any single type even where all get the same on average. `over: mean` subtracts the mean
    over all other sites.
    """
    if parameters.over == "each":
        return tuple(_over_each(subject, parameters.matrix) for subject in subjects)
    return tuple(by_seed(subject, lambda run: _over_mean(run, parameters.matrix), _WITHOUT) for subject in subjects)


_WITHOUT = "without sites of both kinds"


def _over_each(subject: Subject, matrix: SiteMatrix) -> Measured:
    means = {run.seed: {kind: fmean(ranks) for kind, ranks in _by_matrix(run).items()} for run in subject.runs}
    seeds = [seed for seed, of in means.items() if matrix in of and len(of) > 1]
    common = sorted(set.intersection(*(set(means[seed]) for seed in seeds)) - {matrix}) if seeds else []
    leads = {kind: tuple(means[seed][matrix] - means[seed][kind] for seed in seeds) for kind in common}
    strongest = min(leads, key=lambda kind: (math.fsum(leads[kind]), kind), default="")
    values = dict(zip(seeds, leads[strongest], strict=True)) if leads else {}
    measured = by_seed(subject, lambda run: values.get(run.seed), _WITHOUT)
    if not leads:
        return measured
    note = together(measured.note, f"estimate and interval against {strongest}, the most of {', '.join(common)}")
    return replace(measured, rivals=tuple(leads.values()), note=note)


def _over_mean(run: Run, matrix: SiteMatrix) -> float | None:
    ranks = _by_matrix(run)
    own = ranks.pop(matrix, None)
    if own is None or not ranks:
        return None
    return fmean(own) - fmean(rank for other in ranks.values() for rank in other)


def _by_matrix(run: Run) -> dict[str, list[int]]:
    """Return matrix type -> final ranks of its sites."""
    final = run.final_ranks()
    ranks: dict[str, list[int]] = {}
    for site in run.adapted_sites():
        ranks.setdefault(site.matrix, []).append(final[site.name])
    return ranks


class RankSpreadParameters(OfParameters):
    """Of `rank_spread`."""

    index: Literal["gini", "entropy"]


def rank_spread(run: Run, parameters: RankSpreadParameters) -> float | None:
    """Return how the final ranks are spread over sites: Gini's coefficient, or entropy over its largest value."""
    return rank_gini(run) if parameters.index == "gini" else rank_entropy(run)


def rank_gini(run: Run) -> float | None:
    """Return how concentrated a run's final ranks are; None without ranks on two sites."""
    ranks = list(run.final_ranks().values())
    return gini(ranks) if len(ranks) > 1 and sum(ranks) > 0 else None


def rank_entropy(run: Run) -> float | None:
    """Return how even a run's final ranks are; None without ranks on two sites."""
    ranks = list(run.final_ranks().values())
    return normalized_entropy(ranks) if len(ranks) > 1 and sum(ranks) > 0 else None
