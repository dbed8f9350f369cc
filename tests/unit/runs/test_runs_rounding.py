"""Runs whose weights are rounded on training images come back from their files and their checkpoints without these."""

import done_runs
import pytest
import torch
from done_runs import with_settings

from peft_vit.data import load_data
from peft_vit.errors import UserError
from peft_vit.evaluation import measure, predict
from peft_vit.records import ADAPTER_FILE, checkpoint_folders, outcome_digest, run_folder
from peft_vit.runs import run_one
from peft_vit.runs.restore import restore_run
from peft_vit.studies.plan import plan_study, smoke_study
from peft_vit.training import Calibration, Checkpoints, Interrupted

pytestmark = pytest.mark.part("quantization")


def no_images(*_: object) -> None:
    raise AssertionError("calibration images were asked for")


SLOW = ["qa_linear", "qa_adalora", "adaptive_bits"]
METHODS = ["qa_lora", *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW)]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_comes_back_from_its_file_without_images(study, tmp_path, method, monkeypatch) -> None:
    (record,) = done_runs.do(with_settings(study(method), "qa_lora", rounding="gptq"), tmp_path)
    assert record.overhead_s["rounding"] > 0
    folder = run_folder(tmp_path, record.spec)
    in_all = record.bytes.adapter_file_bytes + record.quantization.quantized_bytes  # packed weights count as frozen
    assert (folder / ADAPTER_FILE).stat().st_size == in_all
    monkeypatch.setattr(Calibration, "batch", no_images)
    run = restore_run(folder)
    images = load_data(record.spec.data, 0).test.open().ordered_batches(32, run.backbone.mean, run.backbone.std)
    assert measure(*predict(run.model, images, device=torch.device("cpu"), precision="fp32")) == record.test


def test_stopped_it_comes_to_the_same_end(study, tmp_path) -> None:
    spec = done_runs.specs(with_settings(study("qa_lora"), "qa_lora", rounding="gptq"), tmp_path)[0]
    whole = run_one(spec)
    with pytest.raises(Interrupted):
        run_one(spec, checkpoints=Checkpoints(tmp_path / "run", 0), should_stop=iter([False] * 3 + [True]).__next__)
    assert checkpoint_folders(tmp_path / "run")
    again = run_one(spec, checkpoints=Checkpoints(tmp_path / "run", 0))
    assert again.record.error is None
    assert outcome_digest(again.record) == outcome_digest(whole.record)
    assert again.adapter == whole.adapter


@pytest.mark.part("configuration")
def test_the_plan_refuses_more_images_than_there_are(study, tmp_path) -> None:
    config = with_settings(study("qa_lora"), "qa_lora", rounding="gptq", calibration_images=25)
    problem = r"qa_lora\.calibration_images: 25 are more than the 24 training images; lower it"
    with pytest.raises(UserError, match=problem):
        plan_study(config, tmp_path, file=tmp_path / "tiny.yaml")


def test_smoke_rounds_on_few_images(study) -> None:
    small = smoke_study(with_settings(study("qa_lora"), "qa_lora", rounding="gptq"), patch_size=16)
    assert small.experiments[0].qa_lora.calibration_images == small.data.train_images == 16
    assert smoke_study(study("qa_lora"), patch_size=16).experiments[0].qa_lora.calibration_images is None
