"""The product with adapted weights, float or packed: nothing at the start, afterwards what the formula says in float64.

Gradients included; and no float copy of a packed weight stays.
"""

import gc

import pytest
import torch
from covering_pairs import covering_pairs
from tiny_models import loose_site
from torch import Tensor, nn
from torch.nn import functional as F

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import (
    AdaptedLinear,
    SiteAdapter,
    adapted_product,
    attach_adapters,
    merged_state_dict,
    save_memory,
)
from peft_vit.core.adapters.adapted_product import FrozenWeight
from peft_vit.core.backbones import find_sites
from peft_vit.core.quantization import QuantizationFormat, quantize

pytestmark = pytest.mark.part("quantization")
IN, HEAD, SCALE = 32, 8, 1.7
RANKS = {"query": 2, "key": 0, "value": 4}
FORMS = [("product", 1), ("svd", 1), ("product", 8), ("svd", 8)]
KINDS = {"none": [0], "equal": [3], "mixed": [0, 4, 1, 2, 0, 5, 3]}  # ranks of the sites in turn
FORMATS = [
    *(("nf4", True), ("nf4", False), ("int4", True), ("int4", False), ("int2", True), ("int8", False)),
    *(("int3", True), ("int3", False)),
]


def attached(model: nn.Module, parametrization: str = "product", pool: int = 1, kind: str = "mixed") -> nn.Module:
    sites = find_sites(model)
    ranks = {site.name: KINDS[kind][index % len(KINDS[kind])] for index, site in enumerate(sites)}
    attach_adapters(model, sites, ranks, scale=SCALE, seed=3, parametrization=parametrization, pool=pool)
    return model


@pytest.mark.parametrize(("form", "kind", "bf16"), covering_pairs(FORMS, [*KINDS], [False, True]))
def test_a_fresh_adapter_leaves_the_logits_bit_for_bit(tiny_vit, batch, form, kind, bf16) -> None:
    model = tiny_vit()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        before = model(batch[0])
        after = attached(model, *form, kind)(batch[0])
    assert torch.equal(before, after)
    assert before.abs().max() > 0.1  # there was something to change


@pytest.mark.parametrize("bias", [True, False])
def test_packed_weights_that_become_floats_piece_by_piece_give_the_same_product(monkeypatch, bias) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(IN, 200, bias=bias)
    module = AdaptedLinear(layer)
    module.set_quantized(quantize(layer.weight, QuantizationFormat("nf4", 16, bias, torch.float16)))
    module.drop_float()
    x = torch.randn(3, 5, IN, generator=generator)
    expected = F.linear(x, module.quantized.dequantize(), module.bias)
    pieces, rows = [], type(module.quantized).rows
    monkeypatch.setattr(type(module.quantized), "rows", lambda self, part: pieces.append(part) or rows(self, part))
    monkeypatch.setattr(adapted_product, "_WEIGHTS_AT_ONCE", 1)
    save_memory(module)
    with torch.inference_mode():
        torch.testing.assert_close(module(x), expected)
    assert [part.start for part in pieces] == [0, 64, 128, 192]


def test_activations_in_place_leave_the_logits(tiny_vit, batch) -> None:
    model = tiny_vit().eval()
    with torch.inference_mode():
        expected = model(batch[0])
        save_memory(model)
        torch.testing.assert_close(model(batch[0]), expected)
    assert not any(type(module.mlp.act) is nn.GELU for module in model.blocks)


@pytest.mark.parametrize(("parametrization", "pool"), FORMS)
def test_merged_equals_unmerged(tiny_vit, batch, fill_adapters, parametrization, pool) -> None:
    plain, model = tiny_vit(), attached(tiny_vit(), parametrization, pool)
    fill_adapters(model, std=0.2 if parametrization == "svd" else 0.1)
    images = batch[0]
    with torch.no_grad():
        untouched, unmerged = plain(images), model(images)
    assert (unmerged - untouched).abs().max() > 0.1  # the updates matter
    plain.load_state_dict(merged_state_dict(model), strict=True)
    with torch.no_grad():
        merged = plain(images)
    torch.testing.assert_close(merged, unmerged, rtol=0, atol=1e-5)


def layer_of(
    type: str,
    offset: bool,
    *,
    pool: int,
    parametrization: str = "product",
    share: float = 1.0,
    ranks=RANKS,
    group: int | None = 8,
    bias: bool = True,
) -> AdaptedLinear:
    """Return a fused layer of three sites, all numbers random; at share 1 the float weight is gone."""
    generator = torch.Generator().manual_seed(0)
    layer = AdaptedLinear(nn.Linear(IN, 3 * HEAD, bias=bias))
    for index, (matrix, rank) in enumerate(ranks.items()):
        adapter = SiteAdapter(
            IN,
            HEAD,
            rank,
            scale=SCALE,
            generator=generator,
            parametrization=parametrization,
            pool=pool,
            lambda_gain=1.5,
        )
        layer.add_site(loose_site(matrix, (HEAD * index, HEAD * index + HEAD), IN), adapter)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    layer.set_quantized(quantize(layer.weight.detach(), QuantizationFormat(type, group, offset)))
    layer.quantized_share = share
    if share == 1.0:
        layer.drop_float()
    return layer


def reference(layer: AdaptedLinear, weight: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return float64 outputs by x W^T + s ((x pooled) A^T lambda) B^T, and leaves that took the parameters' place."""
    leaves = {name: p.detach().double().requires_grad_() for name, p in layer.sites.named_parameters()}
    parts = []
    for site, adapter in layer.adapters():
        inner = x.unflatten(-1, (-1, adapter.pool)).sum(-1) @ leaves[f"{site.kind}.lora_A"].T
        if adapter.lora_lambda is not None:
            inner = inner * leaves[f"{site.kind}.lora_lambda"] * adapter.lambda_gain
        parts.append(x @ weight[site.span].T + SCALE * inner @ leaves[f"{site.kind}.lora_B"].T)
    output = torch.cat(parts, -1)
    return output if layer.bias is None else output + layer.bias.double(), leaves


def input_and_target() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 5, IN, generator=generator), torch.randn(2, 5, 3 * HEAD, generator=generator)


def distance(ours: Tensor, exact: Tensor) -> float:
    return float(((ours.double() - exact).norm() / exact.norm()).detach())


@pytest.mark.parametrize(
    ("format", "share", "pool", "parametrization", "bf16", "bias"),
    covering_pairs(FORMATS, [0.0, 0.3, 1.0], [1, 8], ["product", "svd"], [False, True], [True, False]),
)
def test_outputs_and_gradients_equal_float64_autograd(format, share, pool, parametrization, bf16, bias) -> None:
    layer = layer_of(*format, pool=pool, parametrization=parametrization, share=share, bias=bias)
    x, target = input_and_target()
    weight = layer.quantized.dequantize().double()
    if share < 1:
        weight = (1 - share) * layer.weight.double() + share * weight
    theirs_x, ours_x = x.double().requires_grad_(), x.clone().requires_grad_()
    expected, leaves = reference(layer, weight, theirs_x)
    (expected - target).square().mean().backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = layer(ours_x)
    assert output.dtype == (torch.bfloat16 if bf16 else torch.float32)
    (output.float() - target).square().mean().backward()
    bound = 0.02 if bf16 else 1e-6
    assert distance(output, expected) < bound
    assert distance(ours_x.grad, theirs_x.grad) < bound
    compared = 0
    for name, parameter in layer.sites.named_parameters():
        if not parameter.numel():
            assert parameter.grad is None
            continue
        assert parameter.grad.dtype is torch.float32
        assert leaves[name].grad.norm() > 0.01
        assert distance(parameter.grad, leaves[name].grad) < bound
        compared += 1
    assert compared == (6 if parametrization == "svd" else 4)
    assert layer.bias is None or layer.bias.grad is None
    assert layer.weight is None or layer.weight.grad is None


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_layer_without_rank_passes_the_input_gradient(share) -> None:
    layer = layer_of("nf4", True, pool=8, share=share, ranks={"query": 0, "key": 0, "value": 0})
    x, target = input_and_target()
    leaf = x.clone().requires_grad_()
    output = layer(leaf)
    weight = layer.frozen_weight()
    expected = F.linear(x, weight, layer.bias)
    assert torch.equal(output, expected)
    (output * target).sum().backward()
    torch.testing.assert_close(leaf.grad, target @ weight)


@pytest.mark.parametrize("pool", [1, 8])
def test_a_trained_bias_and_an_input_without_gradient(pool) -> None:
    layer = layer_of("int4", True, pool=pool)
    layer.bias.requires_grad_(True)
    x, target = input_and_target()
    (layer(x) * target).sum().backward()
    torch.testing.assert_close(layer.bias.grad, target.sum((0, 1)))
    assert all(p.grad is not None for p in layer.sites.parameters() if p.numel())


def test_a_float_weight_is_dropped_for_a_packed_one_alone_and_what_a_layer_refuses() -> None:
    layer = layer_of("int4", True, pool=8, share=0.25)
    full, packed = layer.weight.detach().clone(), layer.quantized
    assert layer.set_quantized(packed) == pytest.approx(float((full - packed.dequantize()).norm() / full.norm()))
    layer.drop_float()
    assert layer.weight is None
    assert torch.equal(layer.frozen_weight(), packed.dequantize())
    trained = layer_of("int4", True, pool=1, share=0.0)
    trained.weight.requires_grad_(True)
    with pytest.raises(UserError, match="a weight under an adapter is frozen"):
        trained(torch.zeros(1, IN))


def live_floats_of(shape: tuple[int, int]) -> int:
    """Count the live float tensors of this shape, or of any view of as many numbers."""
    gc.collect()
    tensors = (item for item in gc.get_objects() if type(item) in (Tensor, nn.Parameter))
    return sum(tensor.is_floating_point() and tensor.numel() == shape[0] * shape[1] for tensor in tensors)


@pytest.mark.parametrize(("pool", "bf16"), [(1, False), (8, True)])
def test_no_float_weight_is_kept_between_forward_and_backward_or_after(pool, bf16) -> None:
    adapted = [layer_of("nf4", True, pool=pool) for _ in range(3)]
    back = nn.Sequential(nn.GELU(), nn.ZeroPad1d((0, IN - 3 * HEAD)))
    layers = nn.Sequential(adapted[0], back, adapted[1], back, adapted[2])
    before = live_floats_of((3 * HEAD, IN))
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(7, IN, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = layers(x).float().square().mean()
    assert saved
    assert [t.shape for t in saved if t.numel() >= 3 * HEAD * IN] == []
    assert live_floats_of((3 * HEAD, IN)) == before  # between forward and backward
    loss.backward()
    assert live_floats_of((3 * HEAD, IN)) == before
    held = adapted[0].frozen_weight()
    assert (live_floats_of((3 * HEAD, IN)), held.shape) == (before + 1, (3 * HEAD, IN))  # a copy would be seen


def test_a_backward_pass_uses_the_share_of_its_forward_pass() -> None:
    layer = layer_of("int2", True, pool=8, share=0.5)
    x, target = input_and_target()
    leaf = x.clone().requires_grad_()
    mixed = layer.merged_weight().detach()
    output = layer(leaf)
    layer.quantized_share = 0.75
    (output * target).sum().backward()
    torch.testing.assert_close(leaf.grad, target @ mixed)


def test_unpacked_weights_are_copies_and_take_what_is_added() -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    packed = quantize(weight, QuantizationFormat("int4", 3, offset=False))
    low, added = packed.dequantize(), torch.tensor([[1.0, -1.0]] * 4)
    each = added.repeat_interleave(3, 1)
    for share, expected in ((0.0, weight), (0.25, 0.75 * weight + 0.25 * low), (1.0, low)):
        frozen = FrozenWeight(weight, packed, share)
        torch.testing.assert_close(frozen.unpack(), expected)
        torch.testing.assert_close(frozen.unpack(added), expected + each)
        assert frozen.unpack().data_ptr() != weight.data_ptr()
        assert frozen.is_float == (share == 0)
    assert torch.equal(FrozenWeight(None, packed).unpack(added), packed.dequantize(added=added))
    assert not FrozenWeight(None, packed).is_float
    assert FrozenWeight(None, packed).shape == FrozenWeight(weight).shape == weight.shape
