"""What can be computed again is not kept, and gradients are those of what is kept, to the bit."""

import copy

import pytest
import torch
from tiny_models import TINY_FAMILIES, random_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from peft_vit.adapters import adapted_modules, adapted_product, attach_adapters, site_adapters
from peft_vit.adapters.adapted_product import source_of
from peft_vit.backbones import find_sites
from peft_vit.quantization import QuantizationFormat, quantize

pytestmark = pytest.mark.part("trainer")


@pytest.fixture(autouse=True)
def _however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapted_product, "_LEAST_VALUES", 1)


def adapted(model: nn.Module, pool: int = 1, type: str | None = None) -> nn.Module:
    attach_adapters(model, find_sites(model), 3, scale=1.0, seed=0, pool=pool)
    for adapter in site_adapters(model).values():
        nn.init.normal_(adapter.lora_B, std=0.1)
    for _, module in adapted_modules(model):
        if type is not None:
            module.set_quantized(quantize(module.weight.detach(), QuantizationFormat(type, 16, True)))
            module.drop_float()
    return model.train()


def forgetful(model: nn.Module) -> nn.Module:
    """Return a copy whose layers don't know what their inputs were made from."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module._forward_hooks.clear()
    return model


def kept_and_gradients(model: nn.Module, batch, bf16: bool = False) -> tuple[int, dict[str, Tensor]]:
    """Return the values of all activations that the forward pass kept, and the gradients by name."""
    kept: dict[int, int] = {}
    own = {one.untyped_storage().data_ptr() for one in [*model.parameters(), *model.buffers()]}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.shape[:1] != torch.Size([3]):  # factors have rank 3
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    model.zero_grad()
    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(batch[0])
        held = sum(kept.values())
    F.cross_entropy(logits.float(), batch[1]).backward()
    return held, {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def test_a_block_keeps_what_its_norms_attention_and_activation_need(tiny_vit, batch) -> None:
    """Of 2 inputs of norms, query, key, value, attention's output, and 2 an MLP's activation: its MLPs are 2 wide."""
    width, tokens = 64, 17 * len(batch[0])
    held = {}
    for depth in (2, 3):
        model = adapted(tiny_vit(depth=depth))
        held[depth] = [kept_and_gradients(one, batch)[0] for one in (model, forgetful(model))]
    ours, plain = (three - two for two, three in zip(held[2], held[3], strict=True))
    small = 0.6 * width * tokens  # factors' products, the norms' means and deviations, attention's sums
    assert 8 * width * tokens <= ours < 8 * width * tokens + small
    assert 12 * width * tokens <= plain < 12 * width * tokens + small


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["test_vit", "tiny_swin"])
def test_gradients_are_the_same_to_the_bit(name, bf16, batch) -> None:
    model = adapted(random_model(name))
    held, ours = kept_and_gradients(model, batch, bf16)
    more, plain = kept_and_gradients(forgetful(model), batch, bf16)
    assert held < more
    assert ours.keys() == plain.keys()
    assert len(ours) > 2 * len(site_adapters(model))
    for parameter, gradient in plain.items():
        assert torch.equal(ours[parameter], gradient), parameter


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "tiny_eva02" else pytest.mark.slow) for name in TINY_FAMILIES]
)
def test_gradients_of_every_family(name, batch) -> None:
    """Within rounding: where a norm feeds query, key and value apart, its backward pass is that of each, not of all."""
    model = adapted(random_model(name))
    held, ours = kept_and_gradients(model, batch)
    more, plain = kept_and_gradients(forgetful(model), batch)
    assert held <= more
    assert ours.keys() == plain.keys()
    for parameter, gradient in plain.items():
        error = (ours[parameter] - gradient).norm() / gradient.norm()
        assert float(error) < 1e-4, parameter


@pytest.mark.parametrize(("pool", "type"), [(1, None), (1, "nf4"), (16, "nf4"), (16, "int4"), (16, "int2"), (16, None)])
def test_pieces_of_columns_add_up(pool, type, tiny_vit, batch, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny_vit(), pool, type)
    _, whole = kept_and_gradients(model, batch)
    pieces = []
    take = adapted_product._Layer.pieces
    monkeypatch.setattr(adapted_product, "_VALUES_AT_ONCE", 17 * len(batch[0]) * 64)
    monkeypatch.setattr(adapted_product._Layer, "pieces", lambda *one: pieces.append(take(*one)) or pieces[-1])
    _, parts = kept_and_gradients(model, batch)
    assert {len(one) for one in pieces} == {1, 2}  # the second matrix of an MLP has twice as many inputs
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-7)


def test_a_norm_that_is_trained_gets_its_gradient(tiny_vit, batch) -> None:
    model = adapted(tiny_vit())
    for block in model.blocks:
        block.norm2.weight.requires_grad_(True)
    _, ours = kept_and_gradients(model, batch)
    _, plain = kept_and_gradients(forgetful(model), batch)
    assert torch.equal(ours["blocks.0.norm2.weight"], plain["blocks.0.norm2.weight"])
    assert ours["blocks.0.norm2.weight"].any()


def test_only_what_acts_on_rows_is_computed_again(tiny_vit, batch) -> None:
    model = adapted(tiny_vit())
    seen = {}
    for name in ("blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc2", "head"):
        note = lambda _m, given, name=name: seen.update({name: source_of(given[0])})  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(note)
    model(batch[0])
    assert seen["blocks.1.attn.qkv"].function.module is model.blocks[1].norm1
    assert seen["blocks.1.mlp.fc2"].function.module is model.blocks[1].mlp.act
    assert seen["blocks.1.attn.qkv"].function.is_norm
    assert not seen["blocks.1.mlp.fc2"].function.is_norm
    assert seen["blocks.1.attn.proj"] is None
    assert seen["head"] is None  # after no block's norm
    with torch.no_grad():
        model(batch[0])
    assert seen["blocks.1.attn.qkv"] is None


@pytest.mark.parametrize("rows", [2, 400])
def test_few_rows_have_two_products_and_many_have_the_sum(rows, tiny_vit, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny_vit())
    layer = model.blocks[0].mlp.fc1
    formed = []
    unpack = adapted_product.FrozenWeight.unpack
    monkeypatch.setattr(adapted_product.FrozenWeight, "unpack", lambda *one: formed.append(1) or unpack(*one))
    x = torch.randn(rows, 64, dtype=torch.float64, requires_grad=True)
    target = torch.randn(rows, 128, dtype=torch.float64)
    (layer(x.float()) * target.float()).sum().backward()
    ((_, adapter),) = layer.adapters()
    assert len(formed) == (2 if rows * (64 + 128) > 2 * 64 * 128 else 0)
    leaves = [one.detach().double().requires_grad_() for one in (adapter.lora_B, adapter.lora_A)]
    again = x.detach().clone().requires_grad_()
    total = layer.weight.detach().double() + leaves[0] @ leaves[1]
    ((again @ total.T + layer.bias.double()) * target).sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-5)
    for ours, exact in zip((adapter.lora_B, adapter.lora_A), leaves, strict=True):
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


def test_sources_do_not_outlive_a_pass(tiny_vit, batch) -> None:
    model = adapted(tiny_vit())
    outputs = []
    model.blocks[0].norm1.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    model(batch[0])
    assert all(isinstance(leaf, Tensor) for leaf in tree_leaves(outputs))
    again = copy.deepcopy(model)  # hooks are functions of a module: a model can be copied and saved
    assert len(again.blocks[0].norm1._forward_hooks) == len(model.blocks[0].norm1._forward_hooks)
