"""Bytes are those of live storages, each counted once, of low-bit models too; logits come without gradients."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from qa_lora_settings import config
from tiny_models import CARD
from torch import nn

from peft_vit.core.adapters import adapted_modules, freeze_backbone, merge_into_offsets
from peft_vit.core.adapters.footprint import (
    available_memory_bytes,
    frozen_bytes,
    head_parameters,
    model_size,
    optimizer_bytes,
    peak_memory_bytes,
    peak_memory_of,
    reset_peak_memory,
    storage_bytes,
    trainable_parameters,
)
from peft_vit.core.backbones import Architecture
from peft_vit.core.backbones.catalog import create_model
from peft_vit.core.training import QALoRATrainer
from peft_vit.core.training.metrics import predict
from peft_vit.deploy import save_low_bit

pytestmark = pytest.mark.part("trainer")


def test_storages_are_counted_once() -> None:
    whole = torch.zeros(10, 10)
    assert storage_bytes([whole, whole[:2], whole.T]) == 400
    assert storage_bytes([whole, torch.zeros(3, dtype=torch.uint8), torch.zeros(0)]) == 403


def test_a_model_of_which_the_head_is_trained(tiny_vit) -> None:
    model = tiny_vit()
    everything = sum(p.numel() for p in model.parameters())
    assert trainable_parameters(model) == everything
    freeze_backbone(model)
    assert trainable_parameters(model) == head_parameters(model) == 5 * 64 + 5
    assert frozen_bytes(model) == 4 * (everything - 5 * 64 - 5)


@pytest.mark.part("quantization")
def test_packed_weights_are_counted_with_their_scales(tiny_vit) -> None:
    model = tiny_vit()
    plain = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("head"))
    QALoRATrainer(model, config(quantization_type="fp4", rank=1), 4)
    weights = sum(module.in_features * module.out_features for _, module in adapted_modules(model))
    assert weights == 2 * 64 * (3 * 64 + 64 + 2 * 128)
    assert frozen_bytes(model) == 4 * (plain - weights) + weights // 2 + 2 * 2 * weights // 16


def test_optimizer_state() -> None:
    parameter = torch.nn.Parameter(torch.ones(100))
    for optimizer, expected in (
        (torch.optim.AdamW([parameter]), 2 * 400 + 4),  # two moments and a step count
        (torch.optim.SGD([parameter], 0.1, momentum=0.9), 400),
        (torch.optim.SGD([parameter], 0.1), 0),
    ):
        parameter.grad = torch.ones(100)
        optimizer.step()
        assert optimizer_bytes(optimizer) == expected


def test_peak_memory_follows_an_allocation() -> None:
    reset_peak_memory()
    before = peak_memory_bytes()
    torch.ones(50_000_000)  # 200 MB, touched and freed
    assert peak_memory_bytes() - before > 150e6


def test_windows_tells_the_peak_of_a_process(monkeypatch) -> None:
    known = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=5))
    monkeypatch.setattr("psutil.Process", {None: known, 7: known}.__getitem__)
    monkeypatch.setattr("sys.platform", "win32")
    assert (peak_memory_bytes(), peak_memory_of(7)) == (5, 5)
    assert available_memory_bytes() > 0


def test_predictions_in_order_without_gradients(tiny_vit, batch) -> None:
    model = tiny_vit()
    model.pos_drop = torch.nn.Dropout(0.5)  # shows whether the model is in evaluation mode
    images, labels = batch
    batches = list(zip(images.split(4), labels.split(4), strict=True))
    model.train()
    logits, targets = predict(model, batches, precision="fp32")
    assert model.training
    np.testing.assert_array_equal(targets, labels)
    model.eval()
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(images), rtol=1e-5, atol=1e-5)
    reduced, _ = predict(model, batches, precision="bf16")
    assert not model.training
    assert reduced.dtype == np.float32
    assert 0 < np.abs(reduced - logits).max() < 0.2


WIDTH, DEPTH, PATCH = 64, 2, 8  # of the tiny model, for 32 px
WEIGHTS = DEPTH * WIDTH * (3 * WIDTH + WIDTH + 2 * 2 * WIDTH)  # of its matrices


def quantized(model: nn.Module, **settings) -> nn.Module:
    QALoRATrainer(model, config(rank=1, **settings), 4)
    return model


@pytest.mark.parametrize(
    ("settings", "code_bits", "numbers_a_group", "group"),
    [
        ({}, 4, 2, 16),
        ({"group_size": 32}, 4, 2, 32),
        ({"quantization_bits": 8, "quantization_type": "int8"}, 8, 2, 16),
        ({"quantization_bits": 2, "quantization_type": "int2"}, 2, 2, 16),
        ({"quantization_offset": False}, 4, 1, 16),
    ],
)
@pytest.mark.part("quantization")
def test_every_byte_is_counted_where_it_belongs(
    tiny_vit, settings: dict, code_bits: int, numbers_a_group: int, group: int
) -> None:
    plain = sum(p.numel() for p in tiny_vit().parameters())
    size = model_size(quantized(tiny_vit(), **settings))
    assert size.weights == plain
    assert size.float_bytes == {
        "patch embedding": 4 * (3 * PATCH**2 * WIDTH + WIDTH),
        "position embedding": 4 * WIDTH * (1 + (32 // PATCH) ** 2),
        "norms": 4 * 2 * WIDTH * (2 * DEPTH + 1),
        "biases": 4 * DEPTH * (3 * WIDTH + WIDTH + 2 * WIDTH + WIDTH),
        "head": 4 * (5 * WIDTH + 5),
        "other": 4 * WIDTH,  # the class token
    }
    assert len(size.layers) == 4 * DEPTH
    stored = sum(layer.stored_bytes for layer in size.layers.values())
    assert 8 * stored / WEIGHTS == code_bits + 16 * numbers_a_group / group
    assert size.live_bytes == stored + sum(size.float_bytes.values())
    assert size.merging_bytes == (0 if numbers_a_group == 2 else 2 * WEIGHTS // group)


@pytest.mark.part("quantization")
def test_matrices_that_no_adapter_targets_stay_in_float_and_are_named(tiny_vit) -> None:
    size = model_size(quantized(tiny_vit(), targets=("fc1",)))
    assert set(size.layers) == {f"blocks.{block}.mlp.fc1" for block in range(DEPTH)}
    assert size.float_bytes["matrices"] == 4 * (WEIGHTS - DEPTH * 2 * WIDTH * WIDTH)


@pytest.mark.part("quantization")
def test_a_float_copy_beside_the_codes_is_not_hidden(tiny_vit) -> None:
    model = quantized(tiny_vit(), quantization_schedule="linear")
    both = model_size(model)
    assert both.float_bytes["matrices"] == 4 * WEIGHTS
    for _, module in adapted_modules(model):
        module.drop_float()
    alone = model_size(model)
    assert both.live_bytes - alone.live_bytes == 4 * WEIGHTS
    assert both.weights == alone.weights


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.part("quantization")
def test_merging_leaves_what_was_announced(tiny_vit, fill_adapters, offset: bool) -> None:
    model = quantized(tiny_vit(), quantization_offset=offset)
    fill_adapters(model)
    before = model_size(model)
    merge_into_offsets(model)
    after = model_size(model)
    assert (after.live_bytes, after.merging_bytes) == (before.live_bytes + before.merging_bytes, 0)
    assert after.weights == before.weights


@pytest.mark.part("quantization")
def test_the_files_have_the_bytes_of_the_live_storages(tmp_path: Path) -> None:
    plain = create_model(Architecture("timm", "vit_tiny_patch16_224"), 112, 2)
    weights = sum(parameter.numel() for parameter in plain.parameters())
    model = quantized(plain, group_size=32)
    size = model_size(model)
    assert size.file_bytes == pytest.approx(size.live_bytes, rel=0.02)
    assert 5.0 < 8 * size.live_bytes / weights < 8.0  # what is called 4-bit
    card = CARD.model_copy(update={"model": "vit_tiny_patch16_224", "image_size": 112, "class_names": ("a", "b")})
    merge_into_offsets(model)
    save_low_bit(model, tmp_path / "model.safetensors", card)
    assert (tmp_path / "model.safetensors").stat().st_size == pytest.approx(size.live_bytes, rel=0.02)
