"""Studies of runs of seconds, for tools that disturb them, and what their runs give undisturbed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from small_methods import INT4, LINEAR, study_mapping

from peft_vit.runs.records.progress import read_run_files
from peft_vit.runs.records.run_rows import outcome_digest
from peft_vit.runs.records.scan import read_records
from peft_vit.runs.records.storage import ADAPTER_FILE, RECORD_FILE, run_folder

NAME = "tiny"
_ADALORA = {
    "total_rank_budget": 40,
    "allocation_strategy": "proportional",
    "importance_metric": "sensitivity",
    "update_frequency": 2,
    "warmup_steps": 3,
    "final_steps": 3,
}
_QA_LORA = {**INT4, **LINEAR}
_TRAINING = {"epochs": 4, "batch_size": 8, "learning_rate": 3e-3}
_JITTER = {"color_jitter": {"saturation": 0}}
_AUGMENTATION = ["flip", "rotate90", "random_resized_crop", _JITTER, "rand_augment", "mixup", "cutmix"]  # all there is
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 2}, "training": {**_TRAINING, "augmentation": _AUGMENTATION, "label_smoothing": 0.1}},
    "adalora": {"adalora": {**_ADALORA, "parametrization": "svd"}},
    "qa_lora": {"qa_lora": {**_QA_LORA, "rank": 2}},
    "qa_adalora": {"adalora": _ADALORA, "qa_lora": {**_QA_LORA, "targets": ["out", "fc2"]}},
}


def with_adalora(**settings: Any) -> dict[str, Any]:
    """Return the section of an AdaLoRA experiment in which some settings are others."""
    return {"adalora": {**_ADALORA, **settings}}


def write_study(
    folder: Path, experiments: Mapping[str, Mapping[str, Any]], seeds: Sequence[int], **execution: Any
) -> Path:
    """Write the configuration of a study of these sections by name, which is also the method if they don't say so."""
    sections = [{"name": name, "training": _TRAINING, "method": name, **own} for name, own in experiments.items()]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{NAME}.yaml"
    file.write_text(json.dumps(study_mapping(sections, seeds, execution=execution)))  # which is YAML too
    return file


@dataclass(frozen=True)
class End:
    """What a run has come to: all that must not depend on what disturbed it."""

    digest: str  # see outcome_digest: metrics, histories, hashes of adapter and optimiser
    adapter: str  # SHA-256 of its file
    optimizer: str | None
    ranks: str


def ends_of(results_dir: Path) -> dict[str, End]:
    """Return what the runs in a results directory have come to, by run name."""
    ends = {}
    for record in read_records(results_dir):
        folder = run_folder(results_dir, record.spec)
        adapter = hashlib.sha256((folder / ADAPTER_FILE).read_bytes()).hexdigest()
        ranks = json.dumps([entry.model_dump(mode="json") for entry in record.rank_history])
        name = record.spec.run_id.partition("/")[2]
        ends[name] = End(outcome_digest(record), adapter, record.optimizer_sha256, ranks)
    return ends


def difference(results_dir: Path, expected: Mapping[str, End]) -> str | None:
    """Return what is wrong with a study that has ended: not every run done and as expected; None if nothing is."""
    if missing := sorted(expected.keys() - done_records(results_dir, expected).keys()):
        return f"{missing} are not done"
    ends = ends_of(results_dir)
    if more := sorted(ends.keys() - expected.keys()):
        return f"there are records of {more}"
    for name, end in expected.items():
        for field in ("ranks", "optimizer", "adapter", "digest"):
            if getattr(ends[name], field) != getattr(end, field):
                return f"{name}: its {field} differs from the undisturbed run's"
        folder = results_dir / NAME / name
        if left := sorted(path.name for path in folder.iterdir() if path.name not in (ADAPTER_FILE, "record.json")):
            return f"{name}: {left} are left in its folder"
    return None


def done_records(results_dir: Path, runs: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return inode and time of the record of each of those runs that is done; one that is written again has others."""
    study = results_dir / NAME
    stats = {run: (study / run / RECORD_FILE).stat() for run in runs if read_run_files(study, run).is_done}
    return {run: (stat.st_ino, stat.st_mtime_ns) for run, stat in stats.items()}
