"""How the scores of sites, blocks and matrix types went over a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peft_vit.records import SiteInfo


def layer_summary(
    sites: Sequence[SiteInfo], score_history: Sequence[Mapping[str, Any]], ranks: Mapping[str, int]
) -> dict[str, dict[str, float]]:
    """Return mean, std, trend (slope per decision) of the scores, and the rank, over the decisions so far.

    Args:
        sites: in their order.
        score_history: of each decision, with "scores" by site.
        ranks: by site, as they are now.

    Returns:
        By site, then by `blocks.<i>`, matrix type and `overall`: of the mean score over the group's sites, each site
        counted once whatever its rank; ranks are summed.
    """
    groups: dict[str, list[str]] = {site.name: [site.name] for site in sites}
    for site in sites:
        for key in (f"blocks.{site.block}", site.matrix, "overall"):
            groups.setdefault(key, []).append(site.name)
    return {
        key: {
            **_course(np.array([np.mean([entry["scores"][name] for name in members]) for entry in score_history])),
            "rank": float(sum(ranks[name] for name in members)),
        }
        for key, members in groups.items()
    }


def _course(series: np.ndarray) -> dict[str, float]:
    several = len(series) > 1
    return {
        "mean": float(series.mean()) if len(series) else 0.0,
        "std": float(series.std(ddof=1)) if several else 0.0,
        "trend": float(np.polyfit(np.arange(len(series)), series, 1)[0]) if several else 0.0,
    }
