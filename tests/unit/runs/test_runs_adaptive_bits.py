"""A run chooses its bits and ranks on training images, records how, and comes back from its file without measuring."""

import json

import done_runs
import pytest
import torch
from done_runs import with_settings
from safetensors import safe_open

from peft_vit.adapters import adapted_modules, current_ranks
from peft_vit.data import load_data
from peft_vit.evaluation import measure, predict
from peft_vit.records import ADAPTER_FILE, RunRecord, run_folder
from peft_vit.runs import execute
from peft_vit.runs.restore import restore_run
from peft_vit.studies.plan import smoke_study

pytestmark = pytest.mark.part("quantization")


def with_adaptive_bits(config, **settings):
    (experiment,) = config.experiments
    adaptive = experiment.qa_lora.adaptive_bits.model_copy(update=settings)
    return with_settings(config, "qa_lora", adaptive_bits=adaptive, rank=None if adaptive.ranks else 2)


def do(config, folder) -> RunRecord:
    (record,) = done_runs.do(config, folder)
    return record


@pytest.mark.parametrize(
    "settings", [{}, {"total_byte_budget": 150_000, "ranks": False}, {"sensitivity": "loss", "calibration_images": 10}]
)
def test_a_run_keeps_its_choice_and_comes_back_without_measuring(study, tmp_path, settings, monkeypatch) -> None:
    record = do(with_adaptive_bits(study("adaptive_bits"), **settings), tmp_path)
    found = record.bit_allocation
    assert found.images == record.spec.experiment.qa_lora.adaptive_bits.calibration_images
    assert record.overhead_s["bit_allocation"] > 0
    assert len(set(found.types.values())) > 1
    bits = {"int2": 4, "int4": 6, "int8": 10}  # with scale and offset of 16 bits each, shared by 16 weights
    assert record.bits_history[-1].bits_per_weight == {name: bits[type] for name, type in found.types.items()}
    adapters = 4 * (record.parameters.final - record.parameters.head)
    ranks_chosen = record.spec.experiment.qa_lora.adaptive_bits.ranks
    assert record.quantization.quantized_bytes + ranks_chosen * adapters == found.spent_bytes <= found.budget_bytes
    assert (found.ranks is not None) == ranks_chosen
    if ranks_chosen:
        assert record.rank_history[0].ranks == found.ranks
        assert len(set(found.ranks.values())) > 1
    folder = run_folder(tmp_path, record.spec)
    with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
        formats = json.loads(file.metadata()["peft_vit"])["formats"]
    assert {name: one["type"] for name, one in formats.items()} == found.types

    monkeypatch.setattr(execute, "allocate_bits", None)  # nothing is measured from here on
    run = restore_run(folder)
    assert {name: module.quantized.format.type for name, module in adapted_modules(run.model)} == found.types
    assert current_ranks(run.model) == record.rank_history[-1].ranks
    images = load_data(record.spec.data, 0).test.open().ordered_batches(32, run.backbone.mean, run.backbone.std)
    assert measure(*predict(run.model, images, device=torch.device("cpu"), precision="fp32")) == record.test


def test_it_is_measured_on_training_images_alone(study, tmp_path, monkeypatch) -> None:
    seen = []
    allocate = execute.allocate_bits

    def watching(model, config, images, labels, **rest):
        seen.append((images, labels))
        return allocate(model, config, images, labels, **rest)

    monkeypatch.setattr(execute, "allocate_bits", watching)
    record = do(study("adaptive_bits"), tmp_path)
    ((images, labels),) = seen
    train = load_data(record.spec.data, 0).train
    mean, std = restore_run(run_folder(tmp_path, record.spec)).backbone.mean, (0.5, 0.5, 0.5)
    ((expected, expected_labels),) = train.ordered_batches(24, mean, std)
    order = train.order(0, 0)
    assert torch.equal(images, expected[order])
    assert torch.equal(labels, expected_labels[order])


def test_smoke_measures_on_few_images(study) -> None:
    small = smoke_study(study("adaptive_bits"), patch_size=16)
    adaptive = small.experiments[0].qa_lora.adaptive_bits
    assert adaptive.calibration_images == small.data.train_images == 16
    assert adaptive.total_byte_budget == 170_000
