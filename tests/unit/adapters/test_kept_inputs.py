"""What can be computed again is not kept; gradients are those of what is kept, to the bit, whoever else hooks in."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from tiny_models import TINY_FAMILIES, loose_site, random_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from peft_vit.core.adapters import (
    AdaptedLinear,
    SiteAdapter,
    adapted_modules,
    adapted_product,
    attach_adapters,
    site_adapters,
)
from peft_vit.core.adapters.adapted_product import remember_sources, source_of_input
from peft_vit.core.backbones import find_sites
from peft_vit.core.quantization import QuantizationFormat, quantize

pytestmark = pytest.mark.part("trainer")
WIDTH = 64
Gradients = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapted_product, "LEAST_VALUES", 1)


def adapted(model: nn.Module, pool: int = 1, type: str | None = None) -> nn.Module:
    attach_adapters(model, find_sites(model), 3, scale=1.0, seed=0, pool=pool)
    remember_sources(model)
    for adapter in site_adapters(model).values():
        nn.init.normal_(adapter.lora_B, std=0.1)
    for _, module in adapted_modules(model):
        if type is not None:
            module.set_quantized(quantize(module.weight.detach(), QuantizationFormat(type, 16, True)))
            module.drop_float()
    return model.train()


@pytest.fixture
def model(tiny_vit) -> nn.Module:
    return adapted(tiny_vit())


def gradients(model: nn.Module, batch, bf16: bool = False) -> Gradients:
    model.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(batch[0])
    F.cross_entropy(logits.float(), batch[1]).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def activation_values(model: nn.Module, batch, bf16: bool = False) -> int:
    """Return the number of values of all activations that a forward pass keeps."""
    kept: dict[int, int] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.shape[:1] != torch.Size([3]):  # factors have rank 3
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(batch[0])
    assert logits.requires_grad  # held until here, or storages would be used again
    return sum(kept.values())


@contextmanager
def all_kept() -> Iterator[None]:
    """Let no layer know what its inputs were made from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapted_product, "source_of_input", lambda x: None)
        yield


def check_as_if_all_were_kept(run: Callable[[], Gradients]) -> None:
    ours = run()
    with all_kept():
        plain = run()
    assert any(gradient.any() for gradient in plain.values())
    assert ours.keys() == plain.keys()
    for name, gradient in plain.items():
        assert torch.equal(ours[name], gradient), name


def test_a_block_keeps_what_its_norms_attention_and_activation_need(tiny_vit, batch) -> None:
    """Of 2 inputs of norms, query, key, value, attention's output, and 2 an MLP's activation: its MLPs are 2 wide."""
    width, tokens, held = WIDTH, 17 * len(batch[0]), {}
    for depth in (2, 3):
        model = adapted(tiny_vit(depth=depth))
        held[depth] = [activation_values(model, batch)]
        with all_kept():
            held[depth].append(activation_values(model, batch))
    ours, plain = (three - two for two, three in zip(held[2], held[3], strict=True))
    small = 0.6 * width * tokens  # factors' products, the norms' means and deviations, attention's sums
    assert 8 * width * tokens <= ours < 8 * width * tokens + small
    assert 12 * width * tokens <= plain < 12 * width * tokens + small


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["test_vit", "tiny_swin"])
def test_gradients_are_the_same_to_the_bit(name, bf16, batch) -> None:
    model = adapted(random_model(name))
    check_as_if_all_were_kept(partial(gradients, model, batch, bf16))
    held = activation_values(model, batch, bf16)
    with all_kept():
        assert held < activation_values(model, batch, bf16)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "tiny_eva02" else pytest.mark.slow) for name in TINY_FAMILIES]
)
def test_gradients_of_every_family(name, batch) -> None:
    """Within rounding: where a norm feeds query, key and value apart, its backward pass is that of each, not of all."""
    model = adapted(random_model(name))
    held, ours = activation_values(model, batch), gradients(model, batch)
    with all_kept():
        assert held <= activation_values(model, batch)
        plain = gradients(model, batch)
    assert ours.keys() == plain.keys()
    for parameter, gradient in plain.items():
        assert float((ours[parameter] - gradient).norm() / gradient.norm()) < 1e-4, parameter


@pytest.mark.parametrize(("pool", "type"), [(1, None), (1, "nf4"), (16, "nf4"), (16, "int4"), (16, "int2"), (16, None)])
def test_pieces_of_columns_add_up(pool, type, tiny_vit, batch, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny_vit(), pool, type)
    whole, pieces = gradients(model, batch), []
    take = adapted_product._Layer.pieces
    monkeypatch.setattr(adapted_product, "_VALUES_AT_ONCE", 17 * len(batch[0]) * WIDTH)
    monkeypatch.setattr(adapted_product._Layer, "pieces", lambda *given: pieces.append(take(*given)) or pieces[-1])
    parts = gradients(model, batch)
    assert {len(columns) for columns in pieces} == {1, 2}  # the second matrix of an MLP has twice as many inputs
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-7)


def test_only_what_acts_on_rows_is_computed_again_and_for_one_pass(model, batch) -> None:
    seen, outputs = {}, []
    for name in ("blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc2", "head"):
        note = lambda _m, given, name=name: seen.update({name: source_of_input(given[0])})  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(note)
    model(batch[0])
    assert seen["blocks.1.attn.qkv"].function.module is model.blocks[1].norm1
    assert seen["blocks.1.mlp.fc2"].function.module is model.blocks[1].mlp.act
    assert seen["blocks.1.attn.proj"] is None
    assert seen["head"] is None  # after no block's norm
    with torch.no_grad():
        model(batch[0])
    assert seen["blocks.1.attn.qkv"] is None
    model.blocks[0].norm1.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    model(batch[0])
    assert all(isinstance(leaf, Tensor) for leaf in tree_leaves(outputs))
    again = copy.deepcopy(model)  # hooks are functions of a module: a model can be copied and saved
    assert len(again.blocks[0].norm1._forward_hooks) == len(model.blocks[0].norm1._forward_hooks)


@pytest.mark.parametrize("rows", [2, 400])
def test_few_rows_have_two_products_and_many_have_the_sum(rows, model, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, formed = model.blocks[0].mlp.fc1, []
    unpack = adapted_product.FrozenWeight.unpack
    monkeypatch.setattr(adapted_product.FrozenWeight, "unpack", lambda *given: formed.append(1) or unpack(*given))
    x = torch.randn(rows, 64, dtype=torch.float64, requires_grad=True)
    target = torch.randn(rows, 128, dtype=torch.float64)
    (layer(x.float()) * target.float()).sum().backward()
    ((_, adapter),) = layer.adapters()
    assert len(formed) == (2 if rows * (64 + 128) > 2 * 64 * 128 else 0)
    left, right = (factor.detach().double().requires_grad_() for factor in (adapter.lora_B, adapter.lora_A))
    again = x.detach().clone().requires_grad_()
    ((again @ (layer.weight.detach().double() + left @ right).T + layer.bias.double()) * target).sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-5)
    for ours, exact in ((adapter.lora_B, left), (adapter.lora_A, right)):
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


# --- beside others ----------------------------------------------------------------------------------------------------

HOOKS: dict[str, tuple[str, Callable[..., object], dict[str, bool]]] = {
    "inputs": ("register_forward_pre_hook", lambda _, given: (given[0] * 2 + 1,), {}),
    "outputs": ("register_forward_hook", lambda _, given, output: output * 2, {}),
    "outputs_first": ("register_forward_hook", lambda _, given, output: output + torch.randn(1), {"prepend": True}),
    "outputs_in_place": ("register_forward_hook", lambda _, given, output: output.mul_(2), {}),
}


@pytest.mark.parametrize("place", ["norm2", "mlp.act"])
def test_hooks_that_look_on_see_each_output_and_its_whole_gradient_once(model, batch, place) -> None:
    outputs, passed = [], []

    def look(_: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
        outputs.append(output)
        output.register_hook(passed.append)

    model.blocks[1].get_submodule(place).register_forward_hook(look)
    gradients(model, batch)
    assert len(outputs) == len(passed) == 1
    assert passed[0].shape == outputs[0].shape


def hooked(place: str, register: str, hook: Callable[..., object], named: dict[str, bool]) -> Callable[..., object]:
    return lambda model: getattr(model.blocks[1].get_submodule(place), register)(hook, **named)


def with_dropout(model: nn.Module) -> None:
    for block in model.blocks:
        block.mlp.drop1 = nn.Dropout(0.5, inplace=True)


def with_trained_norms(model: nn.Module) -> None:
    for block in model.blocks:
        block.norm2.weight.requires_grad_(True)


IN_PLACE = ("register_forward_pre_hook", lambda _, given: (given[0].mul_(1.5),), {})
CHANGES = {
    **{f"{kind} of {place}": hooked(place, *hook) for kind, hook in HOOKS.items() for place in ("norm2", "mlp.act")},
    **{f"inputs of {place} changed in place": hooked(place, *IN_PLACE) for place in ("mlp.fc1", "mlp.fc2")},
    "dropout in place after the activation": with_dropout,
    "a norm that is trained": with_trained_norms,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_hooked_changed_or_trained_gets_its_gradient_once(model, batch, change) -> None:
    CHANGES[change](model)
    check_as_if_all_were_kept(partial(gradients, model, batch))


def test_weights_swapped_for_a_forward_pass(model, batch) -> None:
    def run() -> Gradients:
        other = {name: (p.detach() * 1.5).requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
        torch.func.functional_call(model, other, (batch[0],)).square().sum().backward()
        return {name: p.grad for name, p in other.items() if p.grad is not None}

    check_as_if_all_were_kept(run)


def test_a_replica_s_trained_norm_gets_its_gradient(model, batch) -> None:
    norm = model.blocks[1].norm2
    norm.weight.requires_grad_(True)
    replica = norm._replicate_for_data_parallel()  # as DataParallel does: its parameters are plain attributes
    replica.weight, replica.bias = norm.weight * 1, norm.bias * 1
    model.blocks[1].norm2 = replica

    def run() -> Gradients:
        replica.weight = norm.weight * 1
        norm.weight.grad = None
        gradients(model, batch)
        return {"weight": norm.weight.grad}

    check_as_if_all_were_kept(run)


def layer() -> AdaptedLinear:
    layer = AdaptedLinear(nn.Linear(WIDTH, WIDTH))
    adapter = SiteAdapter(WIDTH, WIDTH, 2, scale=1.5, generator=torch.Generator().manual_seed(0))
    layer.add_site(loose_site("query", (0, WIDTH), WIDTH), adapter)
    nn.init.normal_(adapter.lora_B)
    return layer


@pytest.mark.parametrize("shape", [(WIDTH,), (0, WIDTH), (2, 0, WIDTH), (2, 3, 5, WIDTH)])
def test_inputs_of_any_shape(shape) -> None:
    adapted = layer()
    x = torch.randn(shape, requires_grad=True)
    y = adapted(x)
    torch.testing.assert_close(y, x @ adapted.merged_weight().T + adapted.bias)
    y.sum().backward()
    torch.testing.assert_close(x.grad, adapted.merged_weight().sum(0).expand(shape))


def test_second_derivatives_are_refused() -> None:
    adapted, x = layer(), torch.randn(3, WIDTH, requires_grad=True)
    first = torch.autograd.grad(adapted(x).square().sum(), [*adapted.sites["query"].parameters()], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        sum(gradient.square().sum() for gradient in first).backward()


def test_a_compiled_model_is_one_graph_with_the_same_gradients(model, batch) -> None:
    compiled = gradients(torch.compile(model, backend="eager", fullgraph=True), batch)
    for name, gradient in gradients(model, batch).items():
        torch.testing.assert_close(compiled[f"_orig_mod.{name}"], gradient)
