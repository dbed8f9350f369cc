"""Ranks and scores of a record as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft_vit.records.values import ImportanceEntry, ProbeEntry, RankEntry, SiteInfo


def history_rows(
    sites: Sequence[SiteInfo],
    ranks: Sequence[RankEntry],
    importance: Sequence[ImportanceEntry],
    probes: Sequence[ProbeEntry],
) -> list[dict[str, Any]]:
    """Return ranks and scores as a tidy table: one row a step and site, plain values, in the sites' order.

    Steps are those at which ranks or scores were recorded. `rank` and `budget` hold from that step on; a site that an
    entry leaves out has rank 0. `score` is None where there is none: at step 0, and with fixed ranks. `probed` tells
    whether it came from a probe at this step, not from the site's own triplets.
    """
    entries = {entry.step: entry for entry in ranks}
    scores = {entry.step: entry.scores for entry in importance}
    probed = {(entry.step, name) for entry in probes for name in entry.sites}
    named = {name for entry in ranks for name in entry.ranks}
    rows: list[dict[str, Any]] = []
    present: RankEntry | None = None
    for step in sorted({*entries, *scores}):
        present = entries.get(step, present)
        rows += [
            {
                "step": step,
                "site": site.name,
                "block": site.block,
                "matrix": site.matrix,
                "in_features": site.in_features,
                "out_features": site.out_features,
                "score": scores.get(step, {}).get(site.name),
                "probed": (step, site.name) in probed,
                "rank": None if present is None else present.ranks.get(site.name, 0),
                "budget": None if present is None else present.budget,
                "budget_unit": None if present is None or present.budget is None else present.unit,
            }
            for site in sites
            if site.name in named
        ]
    return rows
