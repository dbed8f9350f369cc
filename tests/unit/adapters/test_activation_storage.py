"""Activations in 8 bits: exact forward passes, gradients near the exact ones, a quarter of the bytes."""

import numpy as np
import pytest
import torch
from tiny_models import random_model
from torch import Tensor, nn
from torch.nn import functional as F

from peft_vit.adapters import adapted_product, attach_adapters, site_adapters
from peft_vit.adapters.activation_storage import EightBits, stored_in_eight_bits
from peft_vit.backbones import find_sites

pytestmark = pytest.mark.part("trainer")


def in_numpy(values: np.ndarray) -> np.ndarray:
    """Return what 8 bits leave of values in groups of 64, written from the formula, without the scale's rounding."""
    groups = values.astype(np.float64).reshape(-1, 64)
    step = np.abs(groups).max(1, keepdims=True) / 127
    return (np.round(groups / np.where(step == 0, 1, step)) * step).reshape(values.shape)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e4])
def test_values_are_off_by_half_a_step_at_most(scale) -> None:
    values = torch.randn(7, 5, 128, generator=torch.Generator().manual_seed(0)) * scale
    values[0] = 0
    again = EightBits.of(values).restored()
    step = values.view(-1, 64).abs().amax(1, keepdim=True) / 127
    error = (again - values).view(-1, 64).abs()
    assert again.shape == values.shape
    assert bool((error <= 0.51 * step).all())  # the scale is up to 1.6 % larger than the formula's
    assert bool((again[0] == 0).all())
    exact = in_numpy(values.numpy())
    np.testing.assert_allclose(again.numpy(), exact, rtol=0, atol=float(1.05 * step.max()))


@pytest.mark.parametrize("shape", [(3, 10), (2, 3, 100), (1,), (5, 4, 7, 64), (4000, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape(shape, dtype) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    again = EightBits.of(values).restored()
    assert (again.shape, again.dtype) == (values.shape, dtype)
    assert float((again.float() - values.float()).abs().max()) < 0.04


def test_of_a_view_and_of_columns() -> None:
    values = torch.randn(6, 3, 4, 64, generator=torch.Generator().manual_seed(2))
    turned = values.transpose(1, 2)[:, :2]
    torch.testing.assert_close(EightBits.of(turned).restored(), turned, rtol=0, atol=0.04)
    for width in (256, 96):
        matrix = torch.randn(9, width)
        packed = EightBits.of(matrix)
        for columns in (slice(0, 64), slice(32, 96), slice(0, width)):
            assert torch.equal(packed[:, columns], packed.restored()[:, columns])


def test_a_quarter_of_the_bytes() -> None:
    packed = EightBits.of(torch.randn(100, 128))
    assert packed.codes.nbytes + packed.scales.nbytes == 100 * 128 * (8 + 16 / 64) / 8


def adapted(name: str) -> nn.Module:
    model = random_model(name).train()
    attach_adapters(model, find_sites(model), 3, scale=1.0, seed=0)
    for adapter in site_adapters(model).values():
        nn.init.normal_(adapter.lora_B, std=0.1)
    return model


def passes(model: nn.Module, batch, *, eight_bits: bool) -> tuple[Tensor, Tensor, int]:
    """Return logits, all gradients in a row, and how many values were kept in 8 bits."""
    model.zero_grad()
    stored = lambda: 0  # noqa: E731
    if eight_bits:
        with stored_in_eight_bits() as stored:
            logits = model(batch[0])
    else:
        logits = model(batch[0])
    F.cross_entropy(logits, batch[1]).backward()
    gradients = [one.grad.flatten() for one in model.parameters() if one.grad is not None]
    return logits.detach(), torch.cat(gradients), stored()


@pytest.mark.parametrize("name", ["test_vit", "tiny_swin", "tiny_eva02"])
def test_forward_passes_are_exact_and_gradients_are_near(name, batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapted_product, "_LEAST_VALUES", 1)
    model = adapted(name)
    logits, exact, none = passes(model, batch, eight_bits=False)
    same, near, stored = passes(model, batch, eight_bits=True)
    assert torch.equal(logits, same)
    assert none == 0
    assert stored > 0
    assert not torch.equal(exact, near)
    assert float((near - exact).norm() / exact.norm()) < 0.02


def test_a_mask_and_sums_of_softmax_stay_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 9, 32, generator=generator, requires_grad=True) for _ in range(3))
    mask = torch.zeros(9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -1e4)
    found = []
    for eight_bits in (False, True):
        if eight_bits:
            with stored_in_eight_bits() as stored:
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            assert stored() == 4 * q.numel()  # query, key, value and the output
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        found.append(torch.autograd.grad(y.square().sum(), (q, k, v)))
    for exact, near in zip(*found, strict=True):
        assert float((near - exact).norm() / exact.norm()) < 0.03
    assert bool((found[1][1][:, :, -1, :] != 0).any())
