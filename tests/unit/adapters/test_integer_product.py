"""A frozen weight multiplied in integers under adapters: the formula in float64 on rounded values, and gradients."""

import copy
import re
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tiny_models import loose_site
from torch import nn

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import AdaptedLinear, SiteAdapter, adapted_modules, attach_adapters, merged_state_dict
from peft_vit.core.adapters import integer_product as integer_product_module
from peft_vit.core.adapters.adapted_model import use_int8_matmul
from peft_vit.core.adapters.adapted_product import remember_sources
from peft_vit.core.adapters.integer_product import int8_linear
from peft_vit.core.adapters.matmuls import fastest_matmul
from peft_vit.core.backbones import find_sites
from peft_vit.core.quantization import QuantizationFormat, quantize
from peft_vit.core.quantization.integers import Int8Matmul, Int8Weight, exact_matmuls, quantize_rows

SPANS = (slice(0, 24), slice(40, 64))


def adapters(pool: int, parametrization: str = "product", ranks: tuple[int, int] = (4, 3)) -> list[SiteAdapter]:
    """Return two adapters (24, 32) with random factors."""
    made = []
    for seed, rank in enumerate(ranks):
        generator = torch.Generator().manual_seed(seed)
        adapter = SiteAdapter(32, 24, rank, scale=1.7, generator=generator, pool=pool, parametrization=parametrization)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        made.append(adapter)
    return made


@pytest.mark.parametrize("product", exact_matmuls(32, "cpu") + exact_matmuls(64, "cpu", 7), ids=str)
@pytest.mark.parametrize("rows", [1, 7, 12_000])
@pytest.mark.parametrize(("pool", "parametrization"), [(1, "product"), (8, "product"), (1, "svd"), (8, "svd")])
def test_outputs_and_gradients_are_the_formulas(rows, pool, parametrization, product) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = Int8Weight.from_float(torch.randn(64, 32, generator=generator), product)
    bias = torch.randn(64, generator=generator)
    x = torch.randn(rows, 32, generator=generator, requires_grad=True)
    direction = torch.randn(rows, 64, generator=generator)
    updates = list(zip(SPANS, adapters(pool, parametrization), strict=True))
    parameters = [parameter for _, adapter in updates for parameter in adapter.parameters()]
    y = int8_linear(x, weight, bias, updates, pool=pool)
    got = torch.autograd.grad(y, [x, *parameters], direction)

    codes, scales = quantize_rows(x.detach())
    rounded = (codes.double() * scales.double()).requires_grad_()
    exact = [copy.deepcopy(adapter).double() for _, adapter in updates]
    total = weight.codes.double() * weight.scales.double().unsqueeze(1)
    total = total + torch.cat([exact[0].delta(), torch.zeros(16, 32), exact[1].delta()])
    expected = rounded @ total.T + bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    of_exact = [parameter for adapter in exact for parameter in adapter.parameters()]
    to_x, *to_parameters = torch.autograd.grad(expected, [rounded, *of_exact], direction.double())
    for mine, true in zip(got[1:], to_parameters, strict=True):
        assert (mine - true).norm() < 1e-5 * true.norm()
    # The gradient's rows are rounded: half a step of the largest value of a row at most, times |codes|.
    scaled = direction * weight.scales
    step = scaled.abs().amax(1, keepdim=True) / 127
    bound = step / 2 * weight.codes.double().abs().sum(0) + 1e-3
    assert ((got[0] - to_x).abs() <= bound).all()
    assert (got[0] - to_x).norm() < 0.02 * to_x.norm()


def test_under_autocast_outputs_have_its_type_and_are_near() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = Int8Weight.from_float(torch.randn(64, 32, generator=generator), fastest_matmul(torch.device("cpu")))
    updates = list(zip(SPANS, adapters(1), strict=True))
    x = torch.randn(2, 9, 32, generator=generator, requires_grad=True)
    exact = int8_linear(x, weight, None, updates)
    with torch.autocast("cpu", torch.bfloat16):
        y = int8_linear(x, weight, None, updates)
    assert y.dtype == torch.bfloat16
    assert y.shape == (2, 9, 64)
    torch.testing.assert_close(y.float(), exact, rtol=0.03, atol=0.3)
    y.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def linear(pool: int = 1) -> AdaptedLinear:
    layer = AdaptedLinear(nn.Linear(32, 48))
    adapter = SiteAdapter(32, 48, 2, scale=1.0, generator=torch.Generator().manual_seed(0), pool=pool)
    layer.add_site(loose_site("query", (0, 48), 32), adapter)
    layer.matmul = Int8Matmul("int_mm", 7)
    return layer


def test_integers_follow_the_weight_in_use() -> None:
    layer = linear()
    first = layer.int8_weight()
    assert layer.int8_weight() is first
    with torch.no_grad():
        layer.weight.mul_(2)
    torch.testing.assert_close(layer.int8_weight().scales, 2 * first.scales)
    layer.set_quantized(quantize(layer.weight, QuantizationFormat("int2", group_size=None, offset=False)))
    for share in (0.25, 0.5):
        layer.quantized_share = share
        assert torch.equal(layer.int8_weight().codes, Int8Weight.from_float(layer.frozen_weight(), layer.matmul).codes)
    layer.set_quantized(quantize(layer.weight, QuantizationFormat("int8", group_size=None, offset=False)))
    layer.drop_float()
    layer.matmul = Int8Matmul("qlinear", 8)  # now the codes are those of the weight
    assert layer.int8_weight().codes.abs().max() == 127
    torch.testing.assert_close(layer.int8_weight().dequantize(), layer.quantized.dequantize(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("pool", [1, 8])
def test_a_model_multiplies_integers_in_all_blocks_and_learns(tiny_vit, batch, pool) -> None:
    model = tiny_vit()
    sites = [site for site in find_sites(model) if site.kind != "mlp_fc1"]
    attach_adapters(model, sites, 2, scale=1.0, seed=0, pool=pool)
    images, labels = batch
    expected = model(images)
    use_int8_matmul(model)
    assert all(module.matmul for _, module in adapted_modules(model))
    assert len(list(adapted_modules(model))) == 8  # fc1 without an adapter, too
    logits = model(images)
    assert 0 < (logits - expected).abs().max() < 0.1 * expected.abs().max()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    merged = tiny_vit()
    merged.load_state_dict(merged_state_dict(model))
    assert (merged(images) - model(images)).abs().max() < 0.1 * logits.abs().max()


def resident_bytes(tensor: torch.Tensor) -> int:
    """Return how much of the mapping that a tensor stands in is in memory."""
    smaps = Path("/proc/self/smaps").read_text()
    for start, stop, entry in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) (.*?)^VmFlags", smaps, re.MULTILINE | re.DOTALL):
        if int(start, 16) <= tensor.data_ptr() < int(stop, 16):
            return 1024 * int(re.search(r"^Rss: +(\d+)", entry, re.MULTILINE)[1])
    raise LookupError


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is in memory")
def test_float_weights_take_no_memory_until_they_are_read(tiny_vit, batch) -> None:
    model = tiny_vit()
    attach_adapters(model, find_sites(model), 2, scale=1.0, seed=0)
    before = {name: module.weight.clone() for name, module in adapted_modules(model)}
    use_int8_matmul(model)
    model(batch[0]).sum().backward()
    adapted = dict(adapted_modules(model))
    assert all(resident_bytes(module.weight) == 0 for module in adapted.values())
    assert before.keys() == adapted.keys()
    assert all(torch.equal(before[name], module.weight) for name, module in adapted.items())
    assert resident_bytes(adapted["blocks.0.attn.qkv"].weight) > 0
    with torch.no_grad():
        adapted["blocks.0.attn.qkv"].weight.mul_(2)  # they are a tensor like any other
    assert torch.equal(copy.deepcopy(model).blocks[0].attn.qkv.weight, 2 * before["blocks.0.attn.qkv"])


def test_without_room_for_a_file_float_weights_stay(tiny_vit, batch, monkeypatch) -> None:
    model, other = tiny_vit(), tiny_vit()
    use_int8_matmul(other.requires_grad_(False))
    place = model.requires_grad_(False).blocks[0].attn.qkv.weight.data_ptr()

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    use_int8_matmul(model)
    assert model.blocks[0].attn.qkv.weight.data_ptr() == place
    assert torch.equal(model(batch[0]), other(batch[0]))


@pytest.mark.parametrize("bf16", [False, True])
def test_codes_that_are_made_again_give_the_same_gradients_and_are_not_kept(tiny_vit, batch, monkeypatch, bf16) -> None:
    monkeypatch.setattr(integer_product_module, "LEAST_VALUES", 1)
    model = tiny_vit()
    attach_adapters(model, find_sites(model), 2, scale=1.0, seed=0)
    use_int8_matmul(model)

    def gradients() -> tuple[list[torch.Tensor], int]:
        codes: list[int] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            codes.extend([tensor.numel()] * (tensor.dtype == torch.int8))
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(batch[0]).float().square().sum()
        return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])), sum(codes)

    expected, kept = gradients()
    remember_sources(model)
    again, left = gradients()
    assert all(torch.equal(mine, true) for mine, true in zip(again, expected, strict=True))
    # A block has three inputs of one width and one of two. Left are attention's outputs, and the first block's inputs,
    # which have no gradient.
    assert 10 * left == 3 * kept
    assert any(gradient.abs().max() > 0 for gradient in expected)


def test_images_do_not_depend_on_the_batch(tiny_vit, batch) -> None:
    model = tiny_vit()
    attach_adapters(model, find_sites(model), 2, scale=1.0, seed=0)
    use_int8_matmul(model)
    with torch.no_grad():
        torch.testing.assert_close(model(batch[0])[:1], model(batch[0][:1]), rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_trained_is_refused(tiny_vit) -> None:
    with pytest.raises(UserError, match="is trained itself") as caught:
        use_int8_matmul(tiny_vit())
    assert caught.value.field == "training.compute"
