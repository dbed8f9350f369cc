"""Runs in worker processes: as in this one, several at a time; a worker that dies costs its own run only."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
from types import ModuleType

import psutil
import pytest
from at_work import alive, at_work, events_of, left_by_killed_driver, of
from PIL import Image
from written_runs import planned

from peft_vit.base.errors import UserError
from peft_vit.runs.execute import run_one
from peft_vit.runs.executors import RunEnded, RunInterrupted, RunProgress, RunStarted, local, open_executor
from peft_vit.runs.executors.local import LocalExecutor
from peft_vit.runs.records.run_rows import outcome_digest
from peft_vit.runs.scheduling.plan import plan_study

pytestmark = pytest.mark.part("runner")


def endless(config, *names):
    """Return the study with some experiments that train until they are stopped."""
    training = {own.name: own.training.model_copy(update={"epochs": 100_000}) for own in config.experiments}
    changed = [
        own.model_copy(update={"training": training[own.name]}) if own.name in names else own
        for own in config.experiments
    ]
    return config.model_copy(update={"experiments": tuple(changed)})


def worker_of(events, name):
    return int(of(events, RunStarted, name)[-1].worker.split()[1])


def workers_alive(events):
    return [pid for pid in {int(event.worker.split()[1]) for event in of(events, RunStarted)} if alive(pid)]


@pytest.mark.slow
def test_any_number_of_workers_gives_what_this_process_gives(study, tmp_path) -> None:
    plan = planned(study("linear", "lora", "adalora"), tmp_path)
    expected = {run.spec.run_id: outcome_digest(run_one(run.spec).record) for run in plan.runs}
    for workers in (1, 2):
        with at_work(LocalExecutor(workers, tmp_path, 30), *plan.runs) as executor:
            events = events_of(executor, lambda events: len(of(events, RunEnded)) == 3)
        assert {event.run.spec.run_id: outcome_digest(event.record) for event in of(events, RunEnded)} == expected
        assert len({event.worker for event in of(events, RunStarted)}) == workers
        assert all(event.adapter for event in of(events, RunEnded))
        steps = [event.progress.step for event in of(events, RunProgress, "lora")]
        assert steps == [1, 2, 3, 3, 4, 5, 6, 6]  # nothing is lost on the way
        assert not workers_alive(events)


def test_a_stop_does_not_wait_for_workers_that_are_still_starting(study, tmp_path) -> None:
    plan = planned(study("linear", "lora"), tmp_path)
    (tmp_path / "tiny" / "linear" / "seed_0" / "checkpoint-3").mkdir(parents=True)
    with at_work(LocalExecutor(2, tmp_path, 30), *plan.runs) as executor:
        events = [executor.next_event(0), executor.next_event(0)]
        assert [type(event) for event in events] == [RunStarted, RunStarted]
        assert len(workers_alive(events)) == 2
        executor.stop()
        assert not workers_alive(events)
        stopped = [executor.next_event(0), executor.next_event(0)]
        assert stopped == [RunInterrupted(plan.runs[0], 3), RunInterrupted(plan.runs[1], 0)]


@pytest.mark.slow
def test_a_killed_worker_costs_its_own_run_and_is_replaced(study, tmp_path) -> None:
    config = endless(study("qa_lora", "lora", "full"), "qa_lora", "lora")
    plan = planned(config, tmp_path)
    with at_work(LocalExecutor(2, tmp_path, 30), *plan.runs) as executor:
        both = events_of(executor, lambda e: of(e, RunProgress, "qa_lora") and of(e, RunProgress, "lora"))
        assert {event.run.spec.experiment.name for event in of(both, RunStarted)} == {"qa_lora", "lora"}
        os.kill(worker_of(both, "lora"), signal.SIGINT)  # which is not for workers
        os.kill(worker_of(both, "qa_lora"), signal.SIGKILL)
        rest = events_of(executor, lambda e: of(e, RunEnded, "full"))
        (lost,) = of(rest, RunEnded, "qa_lora")
        assert (lost.record.status, lost.record.failure, lost.adapter) == ("failed", "killed", None)
        assert lost.record.error == (
            "the worker process was killed (SIGKILL: by somebody, or by the system, which was out of memory)"
        )
        assert worker_of(rest, "full") not in (worker_of(both, "qa_lora"), worker_of(both, "lora"))
        assert of(rest, RunEnded, "full")[0].record.status == "done"
        before = (of(both, RunProgress, "lora") + of(rest, RunProgress, "lora"))[-1].progress.step
        executor.submit(plan.runs[0])  # for the free worker
        executor.submit(plan.runs[2])  # waits
        events_of(executor, lambda e: of(e, RunProgress, "qa_lora"))
        executor.stop()
        last = events_of(executor, lambda e: len(of(e, RunInterrupted)) == 2)
        (stopped,) = of(last, RunInterrupted, "lora")
        assert stopped.step > before
        assert (tmp_path / "tiny" / "lora" / "seed_0" / f"checkpoint-{stopped.step}").is_dir()
        assert executor.next_event(0.3) is None  # the run that waited is forgotten
        assert not of(last, RunStarted)
    assert not workers_alive(both + rest)


@pytest.mark.slow
def test_without_a_process_for_it_a_run_waits_for_another_worker(study, tmp_path, monkeypatch) -> None:
    plan = planned(study("linear", "lora"), tmp_path)
    start = local._start_worker
    asked = []

    def limited():
        asked.append(1)
        if len(asked) > 1:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return start()

    monkeypatch.setattr(local, "_start_worker", limited)
    with at_work(LocalExecutor(2, tmp_path, 30), *plan.runs) as executor:
        events = events_of(executor, lambda events: len(of(events, RunEnded)) == 2)
    assert [event.record.error for event in of(events, RunEnded)] == [None, None]
    assert len({event.worker for event in of(events, RunStarted)}) == 1
    assert len(asked) > 1


def test_a_study_without_any_process_for_it_is_one_line(study, tmp_path, monkeypatch) -> None:
    def refused(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    (run,) = planned(study("linear"), tmp_path).runs
    monkeypatch.setattr(multiprocessing.get_context("spawn").Process, "start", refused)
    before = psutil.Process().num_fds()
    executor = LocalExecutor(1, tmp_path, 30)
    executor.submit(run)
    with pytest.raises(UserError, match=r"^execution\.workers: no worker process can be started \(Too many open files"):
        executor.next_event(0)
    executor.close()
    monkeypatch.undo()
    assert psutil.Process().num_fds() <= before + 2  # Python's own resource tracker may have come


@pytest.mark.slow
def test_a_worker_that_dies_between_runs_costs_none(study, tmp_path) -> None:
    (run,) = planned(study("linear"), tmp_path).runs
    with at_work(LocalExecutor(1, tmp_path, 30), run) as executor:
        first = events_of(executor, lambda events: of(events, RunEnded))
        dead = worker_of(first, "linear")
        os.kill(dead, signal.SIGKILL)
        executor._workers[0].process.join()  # until its last thread, and with it its end of the pipe, is gone
        executor.submit(run)
        again = events_of(executor, lambda events: of(events, RunEnded))
        assert [event.record.error for event in of(first + again, RunEnded)] == [None, None]
        assert worker_of(again, "linear") != dead


@pytest.mark.slow
def test_a_killed_driver_leaves_no_worker_behind(tmp_path, cache) -> None:
    make = "from peft_vit.runs.executors.local import LocalExecutor; executor = LocalExecutor(1, folder, 30)"
    started, left = left_by_killed_driver(tmp_path, make)
    assert started >= 1
    assert left == []


def test_a_broken_image_shows_before_the_first_run(study, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(local, "_start_worker", lambda *_: pytest.fail("a worker was started"))
    for index in range(40):
        file = tmp_path / "images" / f"class_{index % 2}" / f"{index:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (index, 0, 0)).save(file)
    broken = tmp_path / "images" / "class_1" / "07.png"
    config = study("linear")
    sizes = {"train_images": 20, "validation_images": 10, "test_images": 10}
    data = config.data.model_copy(update={"dataset": "image-folder", "path": str(tmp_path / "images"), **sizes})
    plan = plan_study(config.model_copy(update={"data": data}), tmp_path / "out", file=tmp_path / "tiny.yaml")
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(UserError, match=r"07\.png: is not a readable image"):
        open_executor("local", plan, tmp_path / "out")
    assert list((tmp_path / "out").rglob("*.json")) == []


def test_workers_take_no_module_from_the_working_directory_and_do_not_run_the_script_that_starts_them(
    tmp_path, monkeypatch
) -> None:
    """That directory may be a folder of images that somebody has put a program into."""
    made = f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n"
    for name in ("pickle", "selectors", "struct", "tempfile", "torch", "yaml", "train"):
        (tmp_path / f"{name}.py").write_text(made)
    main = ModuleType("__main__")
    main.__file__ = str(tmp_path / "train.py")
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.chdir(tmp_path)
    worker = local._start_worker()
    worker.pipe.close()  # there is nothing to do
    worker.process.join(timeout=60)
    assert sys.modules["__main__"] is main
    assert not (tmp_path / "ran").exists()
    assert "PYTHONSAFEPATH" not in os.environ


def test_collections_of_a_run_look_at_what_it_made_alone() -> None:
    code = (
        "import gc, weakref\n"
        "from peft_vit.runs.executors.local import prepare_process\n"
        "prepare_process()\n"
        "class Cycle: pass\n"
        "cycle = Cycle()\n"
        "cycle.itself, gone = cycle, weakref.ref(cycle)\n"
        "del cycle\n"
        "print(gc.get_freeze_count() > 100 * len(gc.get_objects()), gc.collect() > 0, gone() is None)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "True True True\n"
