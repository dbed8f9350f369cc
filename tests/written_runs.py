"""Studies of seconds on a folder of images, and runs whose records and adapters are written as a driver does it."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_methods import EXPERIMENTS

from peft_vit.base.files import checkpoint_folders
from peft_vit.core.config import StudyConfig, study_from_mapping
from peft_vit.core.records import RunRecord, RunSpec
from peft_vit.core.training import Checkpoints, Interrupted
from peft_vit.runs.execute import run_one
from peft_vit.runs.planned import Plan
from peft_vit.runs.records.storage import RECORD_FILE, read_record, run_folder, write_result
from peft_vit.runs.scheduling.plan import plan_study

TRAINING = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2}


def tiny_study(*names: str, images: Path | None = None, **changes: Any) -> dict[str, Any]:
    """Return the configuration of a study of some of the small methods on a folder of images."""
    folder = {"dataset": "image-folder", "path": str(images), "image_size": 32}
    return {
        "name": "tiny",
        "seeds": [0],
        "threads": 1,
        "device": "cpu",
        "precision": "fp32",
        "backbone": {"model": "test_vit", "weights": "random"},
        "data": {**folder, "validation_images": 12, "test_images": 12},
        "experiments": [{"name": name, "training": TRAINING, **EXPERIMENTS[name]} for name in names],
        **changes,
    }


def planned(study: StudyConfig, folder: Path, **options: Any) -> Plan:
    """Return the plan of a study with its results in a folder."""
    return plan_study(study, folder, file=folder / f"{study.name}.yaml", **options)


def plan_of(mapping: dict[str, Any], folder: Path) -> Plan:
    """Return the plan of a configuration with its results in a folder."""
    return planned(study_from_mapping(mapping, file=folder / f"{mapping['name']}.yaml"), folder)


def run_and_write(spec: RunSpec, folder: Path) -> RunRecord:
    """Do one run in this process, write what came out, and return its record."""
    finished = run_one(spec)
    write_result(folder, finished.record, finished.adapter, finished.features)
    return finished.record


def interrupted(spec: RunSpec, folder: Path, step: int) -> None:
    """Carry a run on until so many steps are done, and leave a checkpoint of them."""
    steps: list[int] = []
    with pytest.raises(Interrupted) as stopped:
        run_one(
            spec,
            checkpoints=Checkpoints(folder, 0),
            should_stop=lambda: bool(steps) and steps[-1] >= step,
            on_progress=lambda progress: steps.append(progress.step),
        )
    assert stopped.value.step == step
    assert max(checkpoint_folders(folder)) == step


def stopped_and_continued(spec: RunSpec, folder: Path) -> RunRecord:
    """Stop a run at its third step, and return the record of the one that continues it."""
    interrupted(spec, folder, 3)
    return run_one(spec, checkpoints=Checkpoints(folder, 0)).record


def read_without(field: str, record: RunRecord, folder: Path) -> RunRecord:
    """Take a field out of a written record, as if it were from before there was one, and read it."""
    file = run_folder(folder, record.spec) / RECORD_FILE
    older = json.loads(file.read_text())
    del older[field]
    file.write_text(json.dumps(older))
    return read_record(file)
