"""Measures of where ranks went."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from peft_vit.analysis.measures.accuracy import rank_entropy, rank_gini
from peft_vit.analysis.measures.evidence import Evidence, Measure, Measured, by_seed
from peft_vit.analysis.measures.selection import Selection
from peft_vit.analysis.studies import Run
from peft_vit.config import SiteMatrix
from peft_vit.method_settings import Frozen


class RankLeadParameters(Frozen):
    """Of `rank_lead`."""

    of: Selection
    matrix: SiteMatrix
    over: Literal["each", "mean"]


def rank_lead(evidence: Evidence, parameters: RankLeadParameters, needs: Sequence[str]) -> tuple[Measured, ...]:
    """Return the mean final rank of a matrix type minus that of the others.

    `over: each` subtracts the largest mean of another type, so positive means the most of all; `over: mean` the mean
    over all other sites.
    """
    return tuple(
        by_seed(subject, lambda run: _lead(run, parameters.matrix, parameters.over), "without sites of both kinds")
        for subject in evidence.subjects(parameters.of, needs)
    )


def _lead(run: Run, matrix: SiteMatrix, over: Literal["each", "mean"]) -> float | None:
    named = {name for entry in run.record.rank_history for name in entry.ranks}
    final = run.final_ranks()
    ranks: dict[str, list[int]] = {}
    for site in run.record.sites:
        if site.name in named:
            ranks.setdefault(site.matrix, []).append(final.get(site.name, 0))
    own = ranks.pop(matrix, None)
    if own is None or not ranks:
        return None
    if over == "mean":
        return fmean(own) - fmean(rank for other in ranks.values() for rank in other)
    return fmean(own) - max(fmean(other) for other in ranks.values())


class RankSpreadParameters(Frozen):
    """Of `rank_spread`."""

    of: Selection
    index: Literal["gini", "entropy"]


def rank_spread(evidence: Evidence, parameters: RankSpreadParameters, needs: Sequence[str]) -> tuple[Measured, ...]:
    """Return how the final ranks are spread over sites: Gini's coefficient, or entropy over its largest value."""
    index = {"gini": rank_gini, "entropy": rank_entropy}[parameters.index]
    return tuple(
        by_seed(subject, index, "without ranks on two sites") for subject in evidence.subjects(parameters.of, needs)
    )


RANK_MEASURES = {
    "rank_lead": Measure(RankLeadParameters, lambda _: "ranks", rank_lead),
    "rank_spread": Measure(RankSpreadParameters, lambda _: "index", rank_spread),
}
