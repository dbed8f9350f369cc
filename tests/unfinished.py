"""Results that are not whole: a record that can't be read among good ones, a study in progress."""

from __future__ import annotations

from pathlib import Path

import planted

from peft_vit.core.records import RunRecord
from peft_vit.runs.records.progress import PROGRESS_FILE, Attempt
from peft_vit.runs.records.storage import write_study_file
from peft_vit.runs.scheduling.scheduler import study_file

EXPERIMENTS = planted.experiments()
GOOD = [planted.record(EXPERIMENTS["linear_probe"], seed, 0.7) for seed in range(3)]
BAD = "quickstart/lora_r8/seed_1/record.json"


def results_with(folder: Path, content: bytes) -> Path:
    """Write three good records and a bad one."""
    planted.write(folder, GOOD)
    (folder / BAD).parent.mkdir(parents=True)
    (folder / BAD).write_bytes(content)
    return folder


PLAN = planted.configuration([EXPERIMENTS["linear_probe"], EXPERIMENTS["lora_r8"]], seeds=[0, 1, 2])


def planned(folder: Path, records: list[RunRecord], begun: dict[str, Attempt], left_out: str = "") -> Path:
    """Write a study in progress with the runs that were begun; its last run may be one that the command leaves out."""
    planted.write(folder, records)
    runs = {f"{experiment.name}/seed_{seed}" for experiment in PLAN.experiments for seed in PLAN.seeds} - {left_out}
    write_study_file(folder / "quickstart", study_file(PLAN, runs, smoke=False, data_sha256="b" * 64))
    for run, attempt in begun.items():
        (folder / "quickstart" / run).mkdir(parents=True)
        (folder / "quickstart" / run / PROGRESS_FILE).write_text(attempt.model_dump_json())
    return folder


def attempt(state: str, **more: object) -> Attempt:
    """Return an attempt far in the future."""
    return Attempt.model_validate({"number": 1, "state": state, "started_at": "2999-01-01T00:00:00+00:00", **more})
