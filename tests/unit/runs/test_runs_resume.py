"""A run that goes on from a checkpoint comes to the same end, and goes on only from one that is its own."""

import os
import warnings
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
from done_runs import with_data, with_settings
from written_runs import interrupted

from peft_vit.base.errors import UserError
from peft_vit.base.files import checkpoint_folders
from peft_vit.core.config import StartingRanksConfig
from peft_vit.core.training import Checkpoints, CheckpointWarning, StartingRanks
from peft_vit.core.training.checkpoint import write_checkpoint
from peft_vit.data import load_data
from peft_vit.runs import execute as run_module
from peft_vit.runs.execute import _MAY_DIFFER, _MUST_MATCH, run_one
from peft_vit.runs.records.run_rows import outcome_digest
from peft_vit.runs.scheduling.plan import plan_study

pytestmark = pytest.mark.part("runner")


@pytest.fixture
def spec_of(study, tmp_path):
    """Make the specification of one run of six steps."""

    def make(method: str, seed: int = 0, change=None, **training):
        config = study(method, seeds=(seed,), **training)
        config = config if change is None else change(config)
        return plan_study(config, tmp_path / "plan", file=tmp_path / "tiny.yaml").runs[0].spec

    return make


def resumed(spec, folder, first_step: int):
    """Carry a run on to its end, and check which step it did first."""
    steps = []
    finished = run_one(
        spec, checkpoints=Checkpoints(folder, 0), on_progress=lambda progress: steps.append(progress.step)
    )
    assert finished.record.error is None
    assert steps[0] == first_step
    return finished


PROBE_FIRST = {"head_start": "probe"}


def by_rule(config):
    rule = StartingRanksConfig(rule="stable_rank", budget=20)
    return with_settings(config, "lora", rank=None, ranks=rule)


def rounded(config):
    return with_settings(config, "qa_lora", rounding="gptq")


def unseen(config):
    return with_data(config, validation_images=0)


RUNS = [  # methods' own states: test_training_resume.py
    ("qa_adalora", {}, None),
    ("lora", PROBE_FIRST, by_rule),
    ("qa_lora", {}, rounded),
    ("lora", {}, unseen),
    pytest.param("qa_adalora", {}, unseen, marks=pytest.mark.slow),
    pytest.param("full", {}, None, marks=pytest.mark.slow),
    pytest.param("adaptive_bits", {}, None, marks=pytest.mark.slow),
    pytest.param("qa_lora", PROBE_FIRST, None, marks=pytest.mark.slow),
    pytest.param("adalora", PROBE_FIRST | {"learning_rate": 1.0}, None, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("method", "settings", "change"), RUNS)
def test_stopped_twice_it_comes_to_the_same_end(spec_of, tmp_path, monkeypatch, method, settings, change) -> None:
    spec = spec_of(method, change=change, **settings)
    whole = run_one(spec)
    assert (whole.record.head_fit is None) == (settings == {})
    interrupted(spec, tmp_path / "run", 2)
    monkeypatch.setattr(StartingRanks, "begin", lambda *_: pytest.fail("ranks stand in the checkpoint"))
    monkeypatch.setattr(run_module, "allocate_bits", lambda *_: pytest.fail("bits stand in the checkpoint"))
    interrupted(spec, tmp_path / "run", 4)
    again = resumed(spec, tmp_path / "run", 5)
    assert outcome_digest(again.record) == outcome_digest(whole.record)
    assert again.adapter == whole.adapter
    assert [row.step for row in again.record.steps] == list(range(1, 7))
    assert again.record.overhead_s["checkpoints"] > 0
    assert again.record.warnings == whole.record.warnings


def test_the_past_counts(spec_of, tmp_path, monkeypatch) -> None:
    """Start, seconds and the largest memory are those of all attempts, as far as checkpoints know."""
    spec = spec_of("lora")
    clock = count(0, 1000.0)  # a thousand seconds from one look at it to the next
    with monkeypatch.context() as patch:
        patch.setattr("peft_vit.runs.execute.time.perf_counter", lambda: next(clock))
        seen = SimpleNamespace(prepared=lambda: None, peak_bytes=1 << 50, own_bytes=1 << 49)
        patch.setattr("peft_vit.runs.execute.MemoryWatch", lambda: seen)
        interrupted(spec, tmp_path, 2)
    record = resumed(spec, tmp_path, 3).record
    assert record.seconds >= 1000
    assert (record.peak_memory_bytes, record.own_memory_bytes) == (1 << 50, 1 << 49)


OTHERS = [("full", 0, {}), ("lora", 1, {}), ("lora", 0, {"epochs": 3})]


@pytest.mark.parametrize(("method", "seed", "settings"), OTHERS)
def test_a_checkpoint_of_another_configuration_is_refused(spec_of, tmp_path, method, seed, settings) -> None:
    interrupted(spec_of("lora"), tmp_path, 2)
    record = run_one(spec_of(method, seed, **settings), checkpoints=Checkpoints(tmp_path)).record
    assert (record.status, record.failure) == ("failed", "error")
    assert record.error.startswith(f"{tmp_path}: spec_digest: the run can't continue from the checkpoint of step 2: ")
    assert sorted(checkpoint_folders(tmp_path)) == [1, 2]  # they are still there


def test_a_checkpoint_of_other_images_is_refused(spec_of, tmp_path, monkeypatch) -> None:
    spec = spec_of("lora")
    interrupted(spec, tmp_path, 2)

    def others(*arguments, **named):
        return replace(load_data(*arguments, **named), data_sha256="0" * 64)

    monkeypatch.setattr(run_module, "load_data", others)
    record = run_one(spec, checkpoints=Checkpoints(tmp_path)).record
    assert "data_sha256: the run can't continue from the checkpoint of step 2: " in record.error


@pytest.fixture
def other_provenance(monkeypatch):
    """Let runs find another value of one field where they start."""
    provenance = run_module.provenance_of

    def set_to(field: str, value) -> None:
        def changed(*arguments):
            return provenance(*arguments).model_copy(update={field: value})

        monkeypatch.setattr(run_module, "provenance_of", changed)

    return set_to


@pytest.mark.parametrize("field", [field for field in _MUST_MATCH if field != "data_sha256"])
def test_a_checkpoint_of_another_start_is_refused(spec_of, tmp_path, other_provenance, field) -> None:
    spec = spec_of("full")
    interrupted(spec, tmp_path, 2)
    other_provenance(field, "another")
    record = run_one(spec, checkpoints=Checkpoints(tmp_path)).record
    assert f"{tmp_path}: {field}: the run can't continue from the checkpoint of step 2: " in record.error


@pytest.mark.parametrize("field", ["packages", *(name for name in _MAY_DIFFER if name != "devices")])
def test_other_tools_are_said_and_kept_in_the_record(spec_of, tmp_path, other_provenance, field) -> None:
    spec = spec_of("full")
    interrupted(spec, tmp_path, 2)
    other_provenance(field, {"torch": "99.0"} if field == "packages" else "another")
    with pytest.warns(CheckpointWarning, match="the run continued from step 2 with "):
        record = resumed(spec, tmp_path, 3).record
    (warning,) = record.warnings
    assert ("torch 99.0" if field == "packages" else f"{field} another") in warning
    assert record.provenance is not None
    assert getattr(record.provenance, field) not in ("another", {"torch": "99.0"})  # it is where the run began


@pytest.mark.filterwarnings("ignore:a damaged checkpoint is left aside")
def test_a_warning_that_quotes_an_odd_name_can_be_written(spec_of, monkeypatch) -> None:
    def warns(*arguments, **named):
        warnings.warn("no file \udcff", CheckpointWarning, stacklevel=2)
        raise UserError("x")

    monkeypatch.setattr(run_module, "load_data", warns)
    with pytest.warns(CheckpointWarning):
        record = run_one(spec_of("full")).record
    assert record.warnings == ["no file \\udcff"]
    assert b"no file" in record.model_dump_json().encode()


def test_a_damaged_checkpoint_costs_a_step(spec_of, tmp_path) -> None:
    spec = spec_of("lora")
    whole = outcome_digest(run_one(spec).record)
    interrupted(spec, tmp_path, 4)
    os.truncate(tmp_path / "checkpoint-4" / "tensors.safetensors", 1000)
    with pytest.warns(CheckpointWarning, match="left aside"):
        record = resumed(spec, tmp_path, 4).record
    assert outcome_digest(record) == whole
    assert len(record.warnings) == 1


@pytest.mark.parametrize("values", [{}, {"run": {}}, {"run": {"spec_digest": 1}}, {"run": 5}, {"run": None}])
def test_what_is_no_state_of_a_run_is_refused_in_one_line(spec_of, tmp_path, values) -> None:
    write_checkpoint(tmp_path, 3, values)
    record = run_one(spec_of("full"), checkpoints=Checkpoints(tmp_path)).record
    assert record.failure == "error"
    assert "the run can't continue from the checkpoint of step 3: " in record.error
    assert len(record.error.splitlines()) == 1


def test_an_unforeseen_error_of_a_resumed_run_names_its_checkpoint(spec_of, tmp_path, monkeypatch) -> None:
    def broken(*_, **__):
        raise TypeError("'int' and 'str'")

    spec = spec_of("full")
    interrupted(spec, tmp_path, 4)
    monkeypatch.setattr(run_module, "train", broken)
    assert run_one(spec).record.error == "TypeError: 'int' and 'str'"
    error = run_one(spec, checkpoints=Checkpoints(tmp_path)).record.error
    assert error.startswith(f"TypeError: 'int' and 'str' (the run had continued from {tmp_path / 'checkpoint-4'}; if ")
    assert error.endswith("remove the checkpoint-* folders there, and it starts again)")


def test_what_no_record_can_hold_is_a_failure_and_ends_no_worker(spec_of, monkeypatch) -> None:
    monkeypatch.setattr(run_module, "_class_counts", lambda _: {"test": [2.5]})
    finished = run_one(spec_of("full"))
    assert finished.record.status == "failed"
    assert "class_counts" in finished.record.error
    assert finished.adapter is None
