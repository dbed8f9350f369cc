"""A limit of memory is met by what measured steps take; the choice is part of the study from its start on."""

import functools
from types import SimpleNamespace

import pytest
import torch
import yaml

from peft_vit.base.errors import UserError
from peft_vit.lab.request import RunRequest
from peft_vit.lab.run_studies import run_studies
from peft_vit.runs.costs.memory_limit import StepCost
from peft_vit.runs.records.storage import read_record, read_study_file, write_study_file
from peft_vit.runs.scheduling import profiling
from peft_vit.runs.scheduling.plan import plan_study, spec_of
from peft_vit.runs.scheduling.profiling import measure_step
from peft_vit.runs.scheduling.scheduler import study_file

pytestmark = pytest.mark.part("runner")


class Steps:
    """Say that a process takes 400 MB, and 10 for each image and block; a pass of a step takes 0.1 s."""

    def __init__(self) -> None:
        self.asked = []

    def __call__(self, spec) -> StepCost:
        training = spec.experiment.training
        self.asked.append(training)
        kept = 6 - training.recomputed_blocks
        seconds = 1 + 0.1 * training.batch_size / training.images_at_once + 0.05 * training.recomputed_blocks
        return StepCost(seconds, int(400e6 + 10e6 * training.images_at_once * kept), int(1e6))


@pytest.fixture
def planned(tmp_path):
    return functools.partial(plan_study, results_dir=tmp_path / "out", file=tmp_path / "tiny.yaml")


def begin(plan, folder) -> None:
    folder.mkdir(parents=True)
    write_study_file(folder, study_file(plan.study, (), smoke=False, data_sha256=plan.data_sha256))


def test_the_choice_is_in_every_run_and_the_price_is_said(study, planned) -> None:
    steps = Steps()
    plan = planned(study("lora", seeds=(0, 1), memory_limit="650MB"), measure_step=steps)
    training = plan.study.experiments[0].training
    assert (training.micro_batch_size, training.recomputed_blocks) == (4, 0)
    assert (training.memory_limit, training.activation_checkpointing) == ("650MB", "adaptive")
    assert [run.spec.experiment for run in plan.runs] == [plan.study.experiments[0]] * 2
    assert [run.estimate.peak_memory_bytes for run in plan.runs] == [640e6] * 2
    assert plan.memory == (
        "lora, memory_limit 650MB: 4 images at a time, no block computed again. Measured: 640 MB in all, 1.20 s a "
        "step, 1.09 of that with 8 images at a time, no block computed again, which takes 880 MB.",
    )
    assert (4, 0) in [(training.micro_batch_size, training.recomputed_blocks) for training in steps.asked]
    (free,) = planned(study("lora", memory_limit="1GB"), measure_step=Steps()).memory
    assert free.endswith("1.10 s a step; the limit is not reached.")


TOO_LARGE = StepCost(1.0, 10**9)


def test_it_is_measured_as_the_runs_will_be(study, planned) -> None:
    config, specs = study("qa_lora", memory_limit="410MB", head_start="probe"), []
    with pytest.raises(UserError, match="too little"):
        planned(config, measure_step=lambda spec: specs.append(spec) or TOO_LARGE)
    for spec in specs:
        assert spec.experiment.qa_lora.rank == config.experiments[0].qa_lora.rank
        assert (spec.backbone, spec.precision, spec.threads) == (config.backbone, config.precision, config.threads)
        assert spec.data.image_size == config.data.image_size
        assert spec.experiment.training.head_start == "probe"  # features are computed in batches of their own
        assert spec.experiment.total_steps(spec.data.train_images) == 3


def test_what_was_chosen_stays_and_is_not_measured_again(study, planned, tmp_path) -> None:
    config = study("lora", "full", memory_limit="580MB")
    plan = planned(config, measure_step=Steps())
    begin(plan, tmp_path / "out" / "tiny")
    again = planned(config)  # on another machine, say
    assert again.study == plan.study
    assert [run.spec for run in again.runs] == [run.spec for run in plan.runs]
    assert again.memory == ()
    assert read_study_file(tmp_path / "out" / "tiny").configuration == plan.study
    more = Steps()
    added = planned(study("lora", "full", "qa_lora", memory_limit="580MB"), measure_step=more)
    assert added.study.experiments[:2] == plan.study.experiments
    assert len(added.memory) == 1
    assert len(more.asked) > 0
    with pytest.raises(UserError, match="was begun with another configuration") as caught:
        planned(study("lora", "full", memory_limit="900MB"))
    assert "+experiments.full.training.memory_limit: 900MB" in caught.value.details
    assert "recomputed" not in caught.value.details
    with pytest.raises(UserError, match="was begun with another configuration"):
        planned(study("lora", "full", memory_limit="580MB", micro_batch_size=1))


def test_a_micro_batch_that_is_given_stays(study, planned) -> None:
    steps = Steps()
    plan = planned(study("lora", memory_limit="560MB", micro_batch_size=4), measure_step=steps)
    training = plan.study.experiments[0].training
    assert (training.micro_batch_size, training.recomputed_blocks) == (4, 2)
    assert {training.micro_batch_size for training in steps.asked} == {4}
    both = study(
        "lora", memory_limit="560MB", micro_batch_size=4, activation_checkpointing="adaptive", recomputed_blocks=1
    )
    assert planned(both).study.experiments == both.experiments  # nothing is left to choose


@pytest.mark.parametrize(
    ("limit", "measure", "named"),
    [
        ("401MB", Steps(), "410MB"),  # the least that fits
        ("1GB", None, "measured"),
        ("1GB", lambda spec: None, "1 image at a time"),
        ("1GB", "a GPU", "cuda"),
    ],
)
def test_what_does_not_fit_or_can_not_be_measured_is_refused(
    study, planned, monkeypatch, limit, measure, named
) -> None:
    if measure == "a GPU":
        monkeypatch.setattr("peft_vit.runs.scheduling.plan.resolve_device", lambda device: torch.device("cuda"))
        monkeypatch.setattr("peft_vit.runs.scheduling.plan.choose_precision", lambda *_: SimpleNamespace(chosen="fp32"))
    with pytest.raises(UserError, match=named) as caught:
        planned(study("lora", memory_limit=limit), measure_step=measure)
    assert caught.value.field == "experiments[0].training.memory_limit"


def test_a_smoke_study_measures_nothing(study, planned) -> None:
    plan = planned(study("lora", memory_limit="1GB"), smoke=True)
    training = plan.study.experiments[0].training
    assert (training.micro_batch_size, training.recomputed_blocks, training.memory_limit) == (None, 5, "1GB")


def test_a_study_is_measured_once_and_its_runs_say_what_was_chosen(study, tmp_path, capsys) -> None:
    """The command measures in a process of its own; the same command, given again, goes on with the choice."""
    config = study("lora", memory_limit="4GB")
    file, out = tmp_path / "tiny.yaml", tmp_path / "out"
    content = config.model_dump(mode="json", exclude_none=True)
    experiment = content["experiments"][0]
    del experiment["training"]["activation_checkpointing"]  # spelled out: none, which does not go with a limit
    file.write_text(yaml.safe_dump(content))
    request = RunRequest.of(configs=[file], output=out)
    assert run_studies(request) == {}
    printed = capsys.readouterr().out
    assert printed.count("measuring ") == 1
    assert "lora, memory_limit 4GB: 8 images at a time, no block computed again. Measured: " in printed
    (record,) = (read_record(file) for file in out.glob("tiny/lora/*/record.json"))
    assert record.status == "done"
    training = record.spec.experiment.training
    assert (training.memory_limit, training.micro_batch_size, training.recomputed_blocks) == ("4GB", None, 0)
    assert read_study_file(out / "tiny").configuration.experiments[0].training == training
    assert run_studies(request) == {}
    printed = capsys.readouterr().out
    assert "measuring" not in printed
    assert "1 already done and skipped" in printed


@pytest.mark.parametrize("failure", ["killed", "out_of_memory", "io"])
def test_a_step_without_enough_memory_is_no_error(study, monkeypatch, failure) -> None:
    spec = spec_of(study("lora"), 0, 0)
    record = SimpleNamespace(status="failed", failure=failure, error="no room")
    monkeypatch.setattr(profiling, "_carried_out", lambda *_: (record, []))
    told: list[str] = []
    if failure == "io":
        with pytest.raises(UserError, match=r"training.memory_limit: a step could not be measured \(no room\)"):
            measure_step(spec, told.append)
    else:
        assert measure_step(spec, told.append) is None
