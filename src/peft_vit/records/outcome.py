"""What a run's outcome is, apart from where, when and in how many attempts it came about."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from peft_vit.records.values import RunRecord

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
    values["steps"] = [{key: value for key, value in row.items() if key != "seconds"} for row in values["steps"]]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
