"""Runs by two processes: as by one, stopped and continued with another number, killed; and what can't be asked for."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from at_work import PATIENCE_S, alive, at_work, events_of, of
from small_methods import EXPERIMENTS, study_mapping
from written_runs import planned

from peft_vit.base.errors import UserError
from peft_vit.base.files import checkpoint_folders
from peft_vit.core.config import study_from_mapping
from peft_vit.core.training import processes
from peft_vit.fit.request import TrainRequest
from peft_vit.runs import execute
from peft_vit.runs.execute import run_one
from peft_vit.runs.executors import RunEnded, RunInterrupted, RunProgress, RunStarted, local, torchrun
from peft_vit.runs.executors.local import LocalExecutor
from peft_vit.runs.records.scan import read_records
from peft_vit.runs.records.storage import run_folder
from peft_vit.runs.this_machine import machine

pytestmark = pytest.mark.part("runner")


@pytest.fixture
def two_processors(monkeypatch) -> None:
    monkeypatch.setattr(machine, "cpu_count", lambda: 2)


@pytest.mark.slow
def test_two_processes_do_the_runs_of_one(study, tmp_path) -> None:
    plan = planned(study("linear", "adalora", "qa_lora"), tmp_path)
    with at_work(LocalExecutor(1, tmp_path, 30, devices=2), *plan.runs) as executor:
        events = events_of(executor, lambda events: len(of(events, RunEnded)) == 3)
    for run in plan.runs:
        name = run.spec.experiment.name
        (ended,), alone = of(events, RunEnded, name), run_one(run.spec).record
        record = ended.record
        assert record.status == "done", record.error
        assert record.provenance.devices == (1 if name == "linear" else 2)  # a probe takes no steps
        assert record.provenance.nodes == 1
        assert record.spec_digest == alone.spec_digest
        assert record.rank_history == alone.rank_history
        assert record.bits_history == alone.bits_history
        assert [row.loss for row in record.steps] == pytest.approx([row.loss for row in alone.steps], rel=1e-3)
        assert record.test.n == alone.test.n
    assert '"devices"' not in alone.model_dump_json()  # as records were before


@pytest.mark.slow
def test_what_two_have_begun_one_continues_and_back(study, tmp_path) -> None:
    (run,) = planned(study("adalora"), tmp_path).runs
    alone = run_one(run.spec).record
    for devices in (2, 1):
        with at_work(LocalExecutor(1, tmp_path, 0, devices=devices), run) as executor:
            events = events_of(executor, lambda events: of(events, RunProgress))
            executor.stop()
            events += events_of(executor, lambda events: of(events, RunInterrupted) or of(events, RunEnded))
            (stopped,) = of(events, RunInterrupted)
            assert executor.next_event(0.2) is None
        assert max(checkpoint_folders(run_folder(tmp_path, run.spec))) == stopped.step > 0
    with at_work(LocalExecutor(1, tmp_path, 0, devices=2), run) as executor:
        (ended,) = of(events_of(executor, lambda events: of(events, RunEnded)), RunEnded)
    record = ended.record
    assert record.status == "done", record.error
    assert record.rank_history == alone.rank_history
    assert [row.loss for row in record.steps] == pytest.approx([row.loss for row in alone.steps], rel=1e-3)
    assert any("devices 1 instead of 2" in text for text in record.warnings)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_killed_ends_all_in_one_line(study, tmp_path, rank) -> None:
    (run,) = planned(study("lora"), tmp_path).runs
    with at_work(LocalExecutor(1, tmp_path, 0, devices=2), run) as executor:
        events_of(executor, lambda events: any(event.progress.step > 1 for event in of(events, RunProgress)))
        pids = [worker.process.pid for worker in sorted(executor._workers, key=lambda worker: worker.rank)]
        os.kill(pids[rank], signal.SIGKILL)
        (ended,) = of(events_of(executor, lambda events: of(events, RunEnded)), RunEnded)
        assert not any(map(alive, pids))
        assert ended.record.failure == "killed"
        assert len(ended.record.error.splitlines()) == 1
        assert checkpoint_folders(run_folder(tmp_path, run.spec))
        executor.submit(run)  # the driver's next attempt
        (ended,) = of(events_of(executor, lambda events: of(events, RunEnded)), RunEnded)
    assert ended.record.status == "done", ended.record.error


def test_more_processes_than_processors_are_refused(two_processors) -> None:
    machine.check_devices(2, "cpu")
    with pytest.raises(UserError) as refused:
        machine.check_devices(3, "cpu")
    assert refused.value.field == "devices"


@pytest.mark.parametrize(
    "asked", [{"devices": 3, "batch_size": 2}, {"devices": 2, "method": "linear"}, {"devices": 0}], ids=str
)
def test_what_train_refuses(asked) -> None:
    with pytest.raises(UserError) as refused:
        TrainRequest.of(images=".", **asked)
    assert refused.value.field == "--devices"


def test_a_study_refuses_a_batch_smaller_than_devices(study, tmp_path) -> None:
    mapping = study("linear", "lora").model_dump(mode="json", exclude_unset=True)
    mapping["execution"] = {"devices": 9}  # batches are of 8
    with pytest.raises(UserError, match="'lora'"):
        study_from_mapping(mapping, file=tmp_path / "study.yaml")


@pytest.mark.parametrize("change", [{"data_sha256": "0" * 64}, {"python": "3.12.0"}, {"packages": {"torch": "1.0"}}])
def test_a_process_that_differs_is_refused_everywhere(study, tmp_path, monkeypatch, change) -> None:
    (run,) = planned(study("linear"), tmp_path).runs
    own = run_one(run.spec).record.provenance
    other = own.model_copy(update=change)
    monkeypatch.setattr(processes, "gathered", lambda value: [value, (other, "elsewhere")])
    with pytest.raises(
        UserError, match=f"process 1 on elsewhere has {'torch' if 'packages' in change else next(iter(change))}"
    ):
        execute._same_everywhere(own)
    monkeypatch.setattr(processes, "gathered", lambda value: [value, (own, "elsewhere"), value])
    everywhere = execute._same_everywhere(own)
    assert (everywhere.devices, everywhere.nodes) == (3, 2)
    assert platform.node() != "elsewhere"


def test_torchrun_is_seen_in_the_environment(study, tmp_path, monkeypatch) -> None:
    assert torchrun.launch() is None
    told = {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 29500}
    for name, value in {**told, "MASTER_ADDR": "here", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, str(value))
    assert torchrun.launch() == torchrun.Launch(3, 4, 1, 2, "here", 29500)
    config = study("lora")
    config = config.model_copy(update={"execution": config.execution.model_copy(update={"devices": 2})})
    with pytest.raises(UserError, match="torchrun"):  # a script that calls peft_vit is no command
        local.open_executor(planned(config, tmp_path), tmp_path, None)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError) as refused:
        local.open_executor(planned(config, tmp_path), tmp_path, None)
    assert refused.value.field == "execution.devices"


@pytest.mark.slow
def test_torchrun_starts_a_command_whose_other_processes_help(cache, tmp_path) -> None:
    training = {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3}
    study = study_mapping([{"name": name, "training": training, **EXPERIMENTS[name]} for name in ("lora", "adaptive")])
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "peft_vit.cli"]
    call = [*run, "run", str(tmp_path / "study.yaml"), "--output", str(tmp_path / "out")]
    done = subprocess.run(call, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    records = read_records(tmp_path / "out")
    assert [record.provenance.devices for record in records] == [2, 2]


@pytest.mark.slow
def test_all_end_when_torchrun_is_killed_and_can_continue(cache, tmp_path) -> None:
    training = {"epochs": 3000, "batch_size": 8, "learning_rate": 3e-3}
    study = study_mapping([{"name": "lora", "training": training, **EXPERIMENTS["lora"]}])
    study["execution"] = {"checkpoint_every_s": 0}
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "peft_vit.cli"]
    call = [*run, "run", str(tmp_path / "study.yaml"), "--output", str(tmp_path / "out")]
    started = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE_S
    while not (steps := list((tmp_path / "out").glob("**/checkpoint-*"))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert steps
    started.kill()
    told = started.communicate(timeout=PATIENCE_S)[1]  # until the last process that could write has ended
    assert told.count("error: ") == 1
    assert "error: torchrun: " in told
    assert list((tmp_path / "out").glob("**/checkpoint-*"))


@pytest.mark.slow
def test_torchrun_ends_all_when_the_command_refuses(tmp_path) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "peft_vit.cli"]
    done = subprocess.run(
        [*run, "train", str(tmp_path / "none")], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert Path(tmp_path).exists()


def test_started_runs_name_how_many_processes_they_have(study, tmp_path, monkeypatch) -> None:
    (run,) = planned(study("lora"), tmp_path).runs
    with at_work(LocalExecutor(1, tmp_path, 30, devices=2), run) as executor:
        started = executor.next_event(0)
        assert isinstance(started, RunStarted)
        assert started.worker.endswith("with 1 more")
        executor.stop()  # they are still starting
        assert executor.next_event(0) == RunInterrupted(run, 0)
        assert not executor._workers
