"""Merging into quantized weights: exact into offsets, measured when quantized again, refused where it does not fit."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from covering_pairs import covering_pairs
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import (
    AdaptedLinear,
    adapted_modules,
    attach_adapters,
    current_ranks,
    merge_by_requantizing,
    merge_into_offsets,
    packed_weights,
    site_adapters,
)
from peft_vit.core.backbones import find_sites
from peft_vit.core.config import NUMBER_FORMATS
from peft_vit.core.quantization import QuantizationFormat, code_values, quantize

pytestmark = pytest.mark.part("quantization")
SCALE = 1.7
TYPES = tuple(NUMBER_FORMATS)


@pytest.fixture(scope="module")
def plain() -> VisionTransformer:
    """Return a model of width 128, so that groups of 128 fit; all its values are random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(
            img_size=24, patch_size=8, embed_dim=128, depth=2, num_heads=4, mlp_ratio=2, num_classes=5
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(6, 3, 24, 24, generator=torch.Generator().manual_seed(7))


def trained(
    plain: nn.Module, fill: Callable[..., None], format: QuantizationFormat, pool: int, parametrization: str = "product"
) -> nn.Module:
    """Return a quantized copy with adapters whose factors are random, none of them zero."""
    model = copy.deepcopy(plain)
    sites = find_sites(model)
    ranks = {site.name: 0 if site.kind == "key" else 1 + index % 3 for index, site in enumerate(sites)}
    attach_adapters(model, sites, ranks, scale=SCALE, seed=0, pool=pool, parametrization=parametrization)  # type: ignore[arg-type]
    for _, module in adapted_modules(model):
        assert module.weight is not None
        module.set_quantized(quantize(module.weight.detach(), format))
        module.drop_float()
    fill(model, std=0.05 if parametrization == "product" else 0.2)
    return model


def codes_in_numpy(module: AdaptedLinear) -> NDArray[np.int64]:
    """Unpack bit by bit, earlier inputs from lower bits."""
    assert module.quantized is not None
    bits = module.quantized.format.bits
    ones = np.unpackbits(module.quantized.codes.numpy(), axis=1, bitorder="little")
    return ones.reshape(len(ones), -1, bits).astype(np.int64) @ 2 ** np.arange(bits)


def merged_in_numpy(module: AdaptedLinear, pool: int) -> NDArray[np.float64]:
    """Return scale * value[c] + offset + update, from the stored numbers and the factors, in float64."""
    quantized = module.quantized
    assert quantized is not None
    codes, type = codes_in_numpy(module), quantized.format.type
    size = codes.shape[1] // quantized.scales.shape[1]
    if quantized.format.has_codebook:
        values = code_values(type).double().numpy()[codes]  # type: ignore[arg-type]
    else:
        values = codes - (0.0 if quantized.offsets is not None else 2.0 ** (quantized.format.bits - 1))
    weight = values * quantized.scales.double().numpy().repeat(size, 1)
    if quantized.offsets is not None:
        weight += quantized.offsets.double().numpy().repeat(size, 1)
    for site, adapter in module.adapters():
        factors = {name: p.detach().double().numpy() for name, p in adapter.named_parameters()}
        left = factors["lora_B"] * factors.get("lora_lambda", 1.0)
        weight[site.span] += SCALE * (left @ factors["lora_A"]).repeat(pool, 1)
    return weight


def reference(plain: nn.Module, model: nn.Module, images: Tensor, pool: int) -> Tensor:
    """Return float64 logits of the plain model with the weights merged in NumPy."""
    exact = copy.deepcopy(plain).double()
    with torch.no_grad():
        for name, module in adapted_modules(model):
            exact.get_submodule(name).weight.copy_(torch.from_numpy(merged_in_numpy(module, pool)))
        return exact(images.double())


def distance(logits: Tensor, expected: Tensor) -> float:
    return float((logits.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize(
    ("type", "group", "offset", "parametrization"),
    covering_pairs(TYPES, [16, 32, 64, 128], [True, False], ["product", "svd"]),
)
@torch.no_grad()
def test_merging_into_float32_offsets_is_exact(
    plain, images, fill_adapters, type, offset, group, parametrization
) -> None:
    model = trained(
        plain, fill_adapters, QuantizationFormat(type, group, offset, torch.float16), group, parametrization
    )
    codes = {name: module.quantized.codes.clone() for name, module in adapted_modules(model)}
    expected = reference(plain, model, images, group)
    before = model(images)
    without_updates = reference(plain, trained(plain, lambda *_, **__: None, model_format(model), group), images, group)
    assert distance(before, without_updates) > 0.02  # the updates matter
    errors = merge_into_offsets(model, offset_dtype=torch.float32)
    after = model(images)
    assert distance(before, expected) < 1e-5
    assert distance(after, expected) < 1e-5
    assert distance(after, before) < 1e-5
    assert errors.keys() == codes.keys()
    assert max(errors.values()) < 1e-6
    assert not site_adapters(model)
    for name, module in adapted_modules(model):
        assert torch.equal(module.quantized.codes, codes[name])
        assert module.quantized.scales.dtype is torch.float16
        assert module.quantized.offsets.dtype is torch.float32


def model_format(model: nn.Module) -> QuantizationFormat:
    _, module = next(adapted_modules(model))
    assert module.quantized is not None
    return module.quantized.format


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("type", TYPES)
@torch.no_grad()
def test_float16_offsets_round_and_say_by_how_much(plain, images, fill_adapters, type, offset) -> None:
    model = trained(plain, fill_adapters, QuantizationFormat(type, 32, offset, torch.float16), 32)
    exact = {name: merged_in_numpy(module, 32) for name, module in adapted_modules(model)}
    before = model(images)
    errors = merge_into_offsets(model)
    assert distance(model(images), before) <= 5e-3
    for name, module in adapted_modules(model):
        assert module.quantized.offsets.dtype is torch.float16
        difference = np.linalg.norm(merged_in_numpy(module, 32) - exact[name])
        assert errors[name] == pytest.approx(difference / np.linalg.norm(exact[name]), rel=0.01)
        assert 1e-6 < errors[name] < 5e-3


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("type", TYPES)
@torch.no_grad()
def test_requantizing_reports_its_error_and_keeps_the_format(plain, images, fill_adapters, type, group) -> None:
    format = QuantizationFormat(type, group, offset=False)
    model = trained(plain, fill_adapters, format, 1)
    exact = {name: merged_in_numpy(module, 1) for name, module in adapted_modules(model)}
    errors = merge_by_requantizing(model)
    assert not site_adapters(model)
    for name, module in adapted_modules(model):
        assert module.quantized.format == format
        expected = quantize(torch.from_numpy(exact[name]), format)
        # Float rounding before the codes are chosen may tip one that lies at the threshold.
        assert (module.quantized.codes != expected.codes).double().mean() < 1e-3
        torch.testing.assert_close(module.quantized.scales, expected.scales, rtol=1e-5, atol=0)
        difference = np.linalg.norm(merged_in_numpy(module, 1) - exact[name])
        assert errors[name] == pytest.approx(difference / np.linalg.norm(exact[name]), rel=1e-3)
        assert errors[name] > 1e-3  # quantizing again is never exact here
    assert model(images).isfinite().all()


NF4, INT4 = QuantizationFormat("nf4", 32, offset=True), QuantizationFormat("int4", 32, True, torch.float16)
REFUSED = [  # the merge, the format, inputs that share an update, the share of the packed weight, what is said
    (merge_by_requantizing, NF4, 32, 1.0, r"blocks\.0\.attn\.qkv act on groups of inputs; use merge_into_offsets"),
    (merge_into_offsets, NF4, 1, 1.0, "do not act on its 4 groups of inputs.* use merge_by_requantizing"),
    (merge_into_offsets, QuantizationFormat("nf4", 64, offset=True), 32, 1.0, "do not act on its 2 groups"),
    (merge_into_offsets, INT4, 32, 0.5, "still has its float weight; finish the quantization schedule"),
    (merge_by_requantizing, INT4, 1, 0.0, "still has its float weight"),
    (merge_into_offsets, INT4, 32, 1.0, r"offset_dtype: offset plus update is not finite in torch\.float16"),
    (merge_into_offsets, None, 1, 1.0, "no adapters of this package on quantized weights; nothing to merge"),
]


@pytest.mark.parametrize(("merge", "format", "pool", "share", "words"), REFUSED)
def test_a_refused_merge_changes_nothing(plain, fill_adapters, merge, format, pool, share, words) -> None:
    model = copy.deepcopy(plain) if format is None else trained(plain, fill_adapters, format, pool)
    with torch.no_grad():
        for _, module in adapted_modules(model):
            if share < 1:
                module.weight, module.quantized_share = nn.Parameter(module.frozen_weight()), share
        if "finite" in words:
            list(site_adapters(model).values())[-1].lora_B.fill_(1e6)
    before = current_ranks(model), packed_weights(model)
    with pytest.raises(UserError, match=words):
        merge(model)
    assert (current_ranks(model), packed_weights(model)) == before  # the very same tensors
