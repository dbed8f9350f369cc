"""Measures of where ranks went."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

from peft_vit.analysis.measures.evidence import Evidence, Group, Measured, Subject, by_seed, each_run, together
from peft_vit.analysis.studies import Run
from peft_vit.statistics import gini, normalized_entropy

_NEEDS = ("rank_history",)
_WITHOUT = "without sites of both kinds"


def query_over_each(evidence: Evidence, of: Group) -> tuple[Measured, ...]:
    """Return the mean final rank of query sites minus that of each other matrix type.

    Every other type is a rival of its own, tested over seeds; the values are those against the rival of the largest
    mean over seeds. The largest type of each seed would not do: it changes with chance, and lies above any single type
    even where all get the same on average.
    """
    return tuple(_over_each(subject) for subject in evidence.subjects(of, _NEEDS))


def _over_each(subject: Subject) -> Measured:
    means = {run.seed: {kind: fmean(ranks) for kind, ranks in _by_matrix(run).items()} for run in subject.runs}
    seeds = [seed for seed, of in means.items() if "query" in of and len(of) > 1]
    common = sorted(set.intersection(*(set(means[seed]) for seed in seeds)) - {"query"}) if seeds else []
    leads = {kind: tuple(means[seed]["query"] - means[seed][kind] for seed in seeds) for kind in common}
    strongest = min(leads, key=lambda kind: (math.fsum(leads[kind]), kind), default="")
    values = dict(zip(seeds, leads[strongest], strict=True)) if leads else {}
    measured = by_seed(subject, lambda run: values.get(run.seed), _WITHOUT)
    if not leads:
        return measured
    note = together(measured.note, f"estimate and interval against {strongest}, the most of {', '.join(common)}")
    return replace(measured, rivals=tuple(leads.values()), note=note)


def query_over_mean(evidence: Evidence, of: Group) -> tuple[Measured, ...]:
    """Return the mean final rank of query sites minus that of all other sites."""
    return each_run(evidence, of, _NEEDS, _query_over_mean, _WITHOUT)


def _query_over_mean(run: Run) -> float | None:
    ranks = _by_matrix(run)
    own = ranks.pop("query", None)
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


def rank_spread(evidence: Evidence, of: Group, index: Callable[[Run], float | None]) -> tuple[Measured, ...]:
    """Return how the final ranks are spread over sites, by `rank_gini` or `rank_entropy`."""
    return each_run(evidence, of, _NEEDS, index, "without ranks on two sites")


def rank_gini(run: Run) -> float | None:
    """Return how concentrated a run's final ranks are; None without ranks on two sites."""
    ranks = list(run.final_ranks().values())
    return gini(ranks) if len(ranks) > 1 and sum(ranks) > 0 else None


def rank_entropy(run: Run) -> float | None:
    """Return how even a run's final ranks are, over the largest entropy; None without ranks on two sites."""
    ranks = list(run.final_ranks().values())
    return normalized_entropy(ranks) if len(ranks) > 1 and sum(ranks) > 0 else None
