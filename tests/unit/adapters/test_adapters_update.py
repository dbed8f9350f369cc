"""The update of a site: nothing at the start, afterwards exactly what its formula says, gradients included."""

import copy

import numpy as np
import pytest
import torch
from loose_sites import loose_site
from torch import Tensor, nn
from torch.nn import functional as F

from peft_vit.adapters import AdaptedLinear, SiteAdapter, adapted_modules, attach_adapters, merged_state_dict
from peft_vit.adapters.adapted_product import adapted_product
from peft_vit.adapters.frozen_weight import FrozenWeight
from peft_vit.backbones import find_sites
from peft_vit.errors import UserError
from peft_vit.quantization import QuantizationFormat, quantize

FORMS = [("product", 1), ("svd", 1), ("product", 8), ("svd", 8)]
SCALE = 1.7


def ranks_of(sites, kind: str) -> dict[str, int]:
    given = {"none": [0], "equal": [3], "mixed": [0, 4, 1, 2, 0, 5, 3]}[kind]
    return {site.name: given[index % len(given)] for index, site in enumerate(sites)}


def attached(model: nn.Module, parametrization: str = "product", pool: int = 1, kind: str = "mixed") -> nn.Module:
    sites = find_sites(model)
    attach_adapters(
        model, sites, ranks_of(sites, kind), scale=SCALE, seed=3, parametrization=parametrization, pool=pool
    )
    return model


@pytest.mark.part("quantization")
@pytest.mark.parametrize("kind", ["none", "equal", "mixed"])
@pytest.mark.parametrize(("parametrization", "pool"), FORMS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_leaves_the_logits_bit_for_bit(tiny_vit, batch, parametrization, pool, kind, precision) -> None:
    model = tiny_vit()
    images = batch[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        before = model(images)
        after = attached(model, parametrization, pool, kind)(images)
    assert torch.equal(before, after)
    assert before.abs().max() > 0.1  # there was something to change


def by_hooks(plain: nn.Module, adapted: nn.Module, images: Tensor) -> Tensor:
    """Return float64 logits with each site's update added to its module's output: x W^T + s ((x A^T) lambda) B^T."""
    plain = copy.deepcopy(plain).double()
    width = plain.embed_dim
    rows = {"query": slice(0, width), "key": slice(width, 2 * width), "value": slice(2 * width, 3 * width)}

    def add_updates(module: AdaptedLinear):
        def hook(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            output = output.clone()
            for matrix, adapter in module.sites.items():
                x = inputs[0].unflatten(-1, (-1, adapter.pool)).sum(-1)
                inner = x @ adapter.lora_A.detach().double().T
                if adapter.lora_lambda is not None:
                    inner = inner * adapter.lora_lambda.detach().double()
                output[..., rows.get(matrix, slice(None))] += SCALE * inner @ adapter.lora_B.detach().double().T
            return output

        return hook

    for name, module in adapted_modules(adapted):
        plain.get_submodule(name).register_forward_hook(add_updates(module))
    with torch.no_grad():
        return plain(images.double())


@pytest.mark.parametrize(("parametrization", "pool"), FORMS)
def test_merged_equals_unmerged_equals_the_formula(tiny_vit, batch, fill_adapters, parametrization, pool) -> None:
    plain, model = tiny_vit(), attached(tiny_vit(), parametrization, pool)
    fill_adapters(model, std=0.2 if parametrization == "svd" else 0.1)
    images = batch[0]
    with torch.no_grad():
        untouched, unmerged = plain(images), model(images)
    expected = by_hooks(plain, model, images)
    assert (unmerged - untouched).abs().max() > 0.1  # the updates matter
    torch.testing.assert_close(unmerged.double(), expected, rtol=0, atol=1e-5)
    plain.load_state_dict(merged_state_dict(model), strict=True)
    with torch.no_grad():
        merged = plain(images)
    torch.testing.assert_close(merged, unmerged, rtol=0, atol=1e-5)


def one_layer(parametrization: str, pool: int, *, bias: bool = True) -> AdaptedLinear:
    """Return a layer of 12 rows with sites on rows 0:4 (rank 2), 4:8 (rank 0) and 8:12 (rank 3)."""
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(8, 12, bias=bias)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    layer = AdaptedLinear(base)
    for index, (matrix, rank) in enumerate({"query": 2, "key": 0, "value": 3}.items()):
        adapter = SiteAdapter(8, 4, rank, scale=SCALE, generator=generator, parametrization=parametrization, pool=pool)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        layer.add_site(loose_site(matrix, (4 * index, 4 * index + 4), 8), adapter)
    return layer


def plain_formula(layer: AdaptedLinear, x: Tensor) -> Tensor:
    output = F.linear(x, layer.weight, layer.bias)
    parts = []
    for site, adapter in layer.adapters():
        inner = x.unflatten(-1, (-1, adapter.pool)).sum(-1) @ adapter.lora_A.T
        if adapter.lora_lambda is not None:
            inner = inner * adapter.lora_lambda
        parts.append(output[..., site.span] + SCALE * inner @ adapter.lora_B.T)
    return torch.cat(parts, -1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("parametrization", "pool"), [("product", 1), ("svd", 1), ("product", 4), ("svd", 4)])
def test_gradients_equal_those_of_the_plain_formula(parametrization, pool, bias) -> None:
    layer = one_layer(parametrization, pool, bias=bias)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    trained = [p for adapter in layer.sites.values() for p in adapter.parameters() if p.numel()]
    target = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(2))
    results = []
    for function in (layer, lambda x: plain_formula(layer, x)):
        leaf = x.clone().requires_grad_()
        output = function(leaf)
        results.append((output, *torch.autograd.grad((output - target).square().mean(), [leaf, *trained])))
    assert len(trained) == (6 if parametrization == "svd" else 4)
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("parametrization", "pool"), [("product", 1), ("svd", 2)])
def test_gradcheck(parametrization, pool) -> None:
    layer = one_layer(parametrization, pool).double()
    updates = [(site.span, adapter) for site, adapter in layer.adapters() if adapter.rank]
    trained = [p for _, adapter in updates for p in adapter.parameters()]

    def function(x: Tensor, *_: Tensor) -> Tensor:
        return adapted_product(x, FrozenWeight(layer.weight), layer.bias, updates, pool=pool)

    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *trained), atol=1e-5, rtol=1e-5)


def test_frozen_parts_get_no_gradient_and_the_input_only_if_wanted() -> None:
    layer = one_layer("product", 1)
    layer(torch.randn(3, 8)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    assert layer.sites["query"].lora_A.grad is not None
    assert layer.sites["key"].lora_A.grad is None  # rank 0 takes no part


@pytest.mark.parametrize(("parametrization", "pool"), FORMS)
def test_bf16_autocast_trains_in_float32_factors(tiny_vit, batch, fill_adapters, parametrization, pool) -> None:
    model = attached(tiny_vit(), parametrization, pool)
    fill_adapters(model)
    images, labels = batch
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(images)
        assert logits.dtype == (torch.bfloat16 if enabled else torch.float32)
        F.cross_entropy(logits.float(), labels).backward()
        values = [p.grad for name, p in model.named_parameters() if "lora" in name and p.grad is not None]
        assert all(value.dtype == torch.float32 for value in values)
        gradients.append(torch.cat([value.flatten() for value in values]))
    exact, rounded = gradients
    assert (rounded - exact).norm() < 0.05 * exact.norm()  # 8 bits of mantissa through two blocks
    assert not torch.equal(rounded, exact)


def test_orthogonality_and_delta_against_numpy() -> None:
    adapter = one_layer("svd", 1).sites["value"]
    A, B, lam = (p.detach().double().numpy() for p in (adapter.lora_A, adapter.lora_B, adapter.lora_lambda))
    expected = np.linalg.norm(B.T @ B - np.eye(3)) + np.linalg.norm(A @ A.T - np.eye(3))
    assert adapter.orthogonality().item() == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(adapter.delta().detach(), SCALE * B @ np.diag(lam) @ A, rtol=1e-5, atol=1e-6)


@pytest.mark.part("quantization")
def test_a_share_of_the_quantized_weight_is_in_use() -> None:
    layer = one_layer("product", 4)
    full = layer.weight.detach().clone()
    packed = quantize(full, QuantizationFormat("int4", 4, offset=True))
    error = layer.set_quantized(packed)
    assert error == pytest.approx(float((full - packed.dequantize()).norm() / full.norm()), rel=1e-5)
    assert torch.equal(layer.frozen_weight(), full)
    layer.quantized_share = 0.25
    torch.testing.assert_close(layer.frozen_weight(), 0.75 * full + 0.25 * packed.dequantize())
    layer.drop_float()
    assert layer.weight is None
    assert torch.equal(layer.frozen_weight(), packed.dequantize())
    with pytest.raises(RuntimeError, match="float weight is gone"):
        layer.set_quantized(packed)
    with pytest.raises(RuntimeError, match="no quantized weight"):
        one_layer("product", 1).drop_float()


def test_a_bias_may_be_trained_and_a_weight_under_an_adapter_may_not(tiny_vit, batch, fill_adapters) -> None:
    model = tiny_vit()
    sites = find_sites(model)
    attach_adapters(model, sites, dict.fromkeys((site.name for site in sites), 2), scale=SCALE, seed=0)
    fill_adapters(model)
    module = dict(adapted_modules(model))["blocks.0.mlp.fc1"]
    module.bias.requires_grad_(True)
    x = torch.randn(3, module.in_features)
    module(x).square().sum().backward()
    with torch.no_grad():
        expected = (2 * (x @ module.merged_weight().T + module.bias)).sum(0)
    torch.testing.assert_close(module.bias.grad, expected, rtol=1e-4, atol=1e-4)
    module.weight.requires_grad_(True)
    with pytest.raises(UserError, match="a weight under an adapter is frozen"):
        module(x)
