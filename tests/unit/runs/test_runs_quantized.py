"""Runs on packed weights: bits chosen and weights rounded on images come back without; mapped files train alike."""

import json
from pathlib import Path

import pytest
import timm
import torch
from done_runs import do_one, restored, with_adaptive_bits, with_settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_vit.core.adapters import adapted_modules, current_ranks
from peft_vit.core.backbones import weights as tensor_file
from peft_vit.core.config import BackboneConfig
from peft_vit.core.training import Calibration
from peft_vit.runs import execute
from peft_vit.runs.records.storage import ADAPTER_FILE, run_folder
from peft_vit.runs.scheduling.plan import smoke_study

pytestmark = pytest.mark.part("quantization")


def no_images(*_: object) -> None:
    raise AssertionError("calibration images were read")


@pytest.mark.parametrize(
    "settings", [{}, {"total_byte_budget": 150_000, "ranks": False}, {"sensitivity": "loss", "calibration_images": 10}]
)
def test_a_run_keeps_its_bits_and_comes_back_without_measuring(study, tmp_path, settings, monkeypatch) -> None:
    record = do_one(with_adaptive_bits(study("adaptive_bits"), **settings), tmp_path)
    choice = record.bit_allocation
    assert choice.images == record.spec.experiment.qa_lora.adaptive_bits.calibration_images
    assert record.overhead_s["bit_allocation"] > 0
    assert len(set(choice.types.values())) > 1
    bits = {"int2": 4, "int4": 6, "int8": 10}  # with scale and offset of 16 bits each, shared by 16 weights
    assert record.bits_history[-1].bits_per_weight == {name: bits[type] for name, type in choice.types.items()}
    adapters = 4 * (record.parameters.final - record.parameters.head)
    ranks_chosen = record.spec.experiment.qa_lora.adaptive_bits.ranks
    assert record.quantization.quantized_bytes + ranks_chosen * adapters == choice.spent_bytes <= choice.budget_bytes
    assert (choice.ranks is not None) == ranks_chosen
    if ranks_chosen:
        assert record.rank_history[0].ranks == choice.ranks
        assert len(set(choice.ranks.values())) > 1
    with safe_open(run_folder(tmp_path, record.spec) / ADAPTER_FILE, framework="pt") as file:
        formats = json.loads(file.metadata()["peft_vit"])["formats"]
    assert {name: format["type"] for name, format in formats.items()} == choice.types
    monkeypatch.setattr(execute, "allocate_bits", None)  # nothing is measured from here on
    model = restored(record, tmp_path).model
    assert {name: module.quantized.format.type for name, module in adapted_modules(model)} == choice.types
    assert current_ranks(model) == record.rank_history[-1].ranks


SLOW = ["qa_linear", "qa_adalora", "adaptive_bits"]


@pytest.mark.parametrize("method", ["qa_lora", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_rounded_run_comes_back_from_its_file_without_images(study, tmp_path, method, monkeypatch) -> None:
    record = do_one(with_settings(study(method), "qa_lora", rounding="gptq"), tmp_path)
    assert record.overhead_s["rounding"] > 0
    in_all = record.bytes.adapter_file_bytes + record.quantization.quantized_bytes  # packed weights count as frozen
    assert (run_folder(tmp_path, record.spec) / ADAPTER_FILE).stat().st_size == in_all
    monkeypatch.setattr(Calibration, "batch", no_images)
    restored(record, tmp_path)


def test_smoke_measures_and_rounds_on_few_images(study) -> None:
    small = smoke_study(study("adaptive_bits"), patch_size=16)
    adaptive = small.experiments[0].qa_lora.adaptive_bits
    assert adaptive.calibration_images == small.data.train_images == 16
    assert adaptive.total_byte_budget == 170_000
    rounded = smoke_study(with_settings(study("qa_lora"), "qa_lora", rounding="gptq"), patch_size=16)
    assert rounded.experiments[0].qa_lora.calibration_images == 16
    assert smoke_study(study("qa_lora"), patch_size=16).experiments[0].qa_lora.calibration_images is None


@pytest.mark.parametrize(
    ("method", "schedule"),
    [("qa_lora", "constant"), ("qa_lora", "linear"), ("qa_adalora", "constant"), ("qa_linear", "constant")],
)
def test_mapped_weights_are_trained_on_as_copies_are(study, tmp_path, monkeypatch, method, schedule) -> None:
    torch.manual_seed(3)
    tensors = timm.create_model("test_vit", img_size=32).state_dict()
    torch.save(tensors, tmp_path / "copied.pth")
    save_file(tensors, tmp_path / "mapped.safetensors")
    monkeypatch.setattr(tensor_file, "_SMALLEST_MAPPED_BYTES", 1)
    config = with_settings(study(method), "qa_lora", quantization_schedule=schedule)
    results = []
    for name in ("copied.pth", "mapped.safetensors"):
        backbone = BackboneConfig(model="test_vit", weights="file", file=str(tmp_path / name))
        folder = tmp_path / Path(name).stem
        record = do_one(config.model_copy(update={"backbone": backbone}), folder)
        restored(record, folder)
        results.append((record, load_file(run_folder(folder, record.spec) / ADAPTER_FILE)))
    (copied, adapter), (mapped, same_adapter) = results
    assert adapter.keys() == same_adapter.keys()
    assert all(torch.equal(tensor, same_adapter[name]) for name, tensor in adapter.items())
    for field in ("test", "validation", "quantization"):
        assert getattr(copied, field) == getattr(mapped, field)
    assert [step.loss for step in copied.steps] == [step.loss for step in mapped.steps]
