"""Runs whose weights are rounded on training images come back from their files and their checkpoints without these."""

import done_runs
import pytest
import torch
from done_runs import with_settings

from peft_vit.data import load_data
from peft_vit.evaluation import measure, predict
from peft_vit.records import ADAPTER_FILE, run_folder
from peft_vit.runs.restore import restore_run
from peft_vit.studies.plan import smoke_study
from peft_vit.training import Calibration

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


def test_smoke_rounds_on_few_images(study) -> None:
    small = smoke_study(with_settings(study("qa_lora"), "qa_lora", rounding="gptq"), patch_size=16)
    assert small.experiments[0].qa_lora.calibration_images == small.data.train_images == 16
    assert smoke_study(study("qa_lora"), patch_size=16).experiments[0].qa_lora.calibration_images is None
