"""What follows from a record: the digest of its outcome, and its ranks and scores as a table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from peft_vit.records.values import ImportanceEntry, ProbeEntry, RankEntry, RunRecord, SiteInfo

_FIELDS = (
    "spec_digest",
    "status",
    "class_names",
    "split_sizes",
    "sites",
    "steps",
    "evaluations",
    "rank_history",
    "importance_history",
    "probe_history",
    "fisher_check",
    "bits_history",
    "bit_allocation",
    "quantization",
    "parameters",
    "bytes",
    "chosen_step",
    "majority_accuracy",
    "validation",
    "test",
    "predictions",
    "removal",
    "adapter_sha256",
    "optimizer_sha256",
)


def outcome_digest(record: RunRecord) -> str:
    """Return the SHA-256 of everything that must not depend on interruptions, on the time or on the pace.

    Equal for a run and its repetition on the same machine, with the same torch and as many threads, however often it
    was killed in between.
    """
    values: dict[str, Any] = record.model_dump(mode="json", include=set(_FIELDS))
    values["sites"] = [{key: value for key, value in site.items() if key != "role"} for site in values["sites"]]
    values["steps"] = [{key: value for key, value in row.items() if key != "seconds"} for row in values["steps"]]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


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
