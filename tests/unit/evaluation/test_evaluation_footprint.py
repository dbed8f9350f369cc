"""Bytes are those of live storages, each counted once; logits come without gradients, in order."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from qa_lora_settings import config

from peft_vit.core.adapters import adapted_modules, freeze_backbone
from peft_vit.core.adapters.footprint import (
    available_memory_bytes,
    frozen_bytes,
    head_parameters,
    optimizer_bytes,
    peak_memory_bytes,
    peak_memory_of,
    reset_peak_memory,
    storage_bytes,
    trainable_parameters,
)
from peft_vit.core.training import QALoRATrainer
from peft_vit.core.training.metrics import predict

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
