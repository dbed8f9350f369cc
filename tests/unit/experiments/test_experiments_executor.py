"""A worker that is killed costs its own run only; broken images and unwritable folders show before one starts."""

import multiprocessing
import os
import signal

import pytest
from PIL import Image

from peft_vit.errors import UserError
from peft_vit.experiments import RunEnded, RunProgress, RunStarted, execute, executor, plan_study
from peft_vit.records import read_records

pytestmark = pytest.mark.part("runner")


def test_a_killed_worker_fails_its_run_and_the_rest_goes_on(study, tmp_path) -> None:
    config = study("linear", "lora")
    endless = config.experiments[0].training.model_copy(update={"epochs": 100_000})
    first = config.experiments[0].model_copy(update={"training": endless})
    config = config.model_copy(update={"experiments": (first, config.experiments[1])})
    events = []

    def kill_in_the_middle(event) -> None:
        events.append(event)
        if isinstance(event, RunProgress) and event.run.spec.experiment.name == "linear" and event.progress.step == 20:
            (worker,) = [child for child in multiprocessing.active_children() if child.pid != os.getpid()]
            os.kill(worker.pid, signal.SIGKILL)

    plan = plan_study(config, tmp_path, file=tmp_path / "tiny.yaml")
    records = execute(plan.pending, tmp_path, kill_in_the_middle)
    assert [record.status for record in records] == ["failed", "done"]
    assert records[0].error == (
        "the worker process died (killed, or out of memory); run the same command again to retry"
    )
    assert sorted(read_records(tmp_path), key=lambda r: r.spec.run_id) == records
    kinds = [type(event) for event in events if not isinstance(event, RunProgress)]
    assert kinds == [RunStarted, RunEnded, RunStarted, RunEnded]
    seen = [e.progress.step for e in events if isinstance(e, RunProgress) and e.run.spec.experiment.name == "lora"]
    assert seen == [1, 2, 3, 3, 4, 5, 6, 6]
    again = plan_study(config, tmp_path, file=tmp_path / "tiny.yaml")
    assert [run.spec.experiment.name for run in again.pending] == ["linear"]


def no_worker(*_):
    raise AssertionError("a worker was started")


def test_nothing_to_do_starts_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(executor, "_start_pool", no_worker)
    assert execute((), tmp_path, no_worker) == []


def test_a_broken_image_shows_before_the_first_run(study, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(executor, "_start_pool", no_worker)
    for index in range(40):
        file = tmp_path / "images" / f"class_{index % 2}" / f"{index:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (index, 0, 0)).save(file)
    broken = tmp_path / "images" / "class_1" / "07.png"
    config = study("linear")
    data = config.data.model_copy(
        update={
            "dataset": "image-folder", "path": str(tmp_path / "images"), "train_images": 20, "validation_images": 10,
            "test_images": 10,
        }
    )  # fmt: skip
    plan = plan_study(config.model_copy(update={"data": data}), tmp_path / "out", file=tmp_path / "tiny.yaml")
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(UserError, match=r"07\.png: is not a readable image"):
        execute(plan.pending, tmp_path / "out", no_worker)
    assert list((tmp_path / "out").rglob("*.json")) == []


def test_a_folder_that_cannot_be_written_shows_before_the_first_run(study, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(executor, "_start_pool", no_worker)
    (tmp_path / "file").write_text("in the way")
    plan = plan_study(study("linear"), tmp_path / "file", file=tmp_path / "tiny.yaml")
    with pytest.raises(UserError, match=r"file: can't be written to \(.*\); choose another --output-dir"):
        execute(plan.pending, tmp_path / "file", no_worker)
