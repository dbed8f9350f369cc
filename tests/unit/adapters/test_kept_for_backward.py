"""What a layer keeps of its inputs stays right where others' hooks, operations in place and swapped weights come in."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from tiny_models import loose_site
from torch import Tensor, nn

from peft_vit.adapters import AdaptedLinear, SiteAdapter, adapted_product, attach_adapters
from peft_vit.backbones import find_sites

pytestmark = pytest.mark.part("trainer")
WIDTH = 64


@pytest.fixture
def model(tiny_vit, fill_adapters, monkeypatch) -> nn.Module:
    """Return a model whose layers compute all inputs again that they can."""
    monkeypatch.setattr(adapted_product, "_LEAST_VALUES", 0)
    model = tiny_vit()
    attach_adapters(model, find_sites(model), 2, scale=1.5, seed=3)
    fill_adapters(model, std=0.1)
    return model


def gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    model(images).square().sum().backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def check_as_if_all_were_kept(run: Callable[[], dict[str, Tensor]], monkeypatch) -> None:
    found = run()
    monkeypatch.setattr(adapted_product, "source_of", lambda x: None)
    expected = run()
    assert any(one.abs().max() > 0 for one in expected.values())
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert torch.equal(found[name], one), name


HOOKS = {
    "inputs": ("register_forward_pre_hook", lambda _, given: (given[0] * 2 + 1,), {}),
    "outputs": ("register_forward_hook", lambda _, given, output: output * 2, {}),
    "outputs_first": ("register_forward_hook", lambda _, given, output: output + torch.randn(1), {"prepend": True}),
    "outputs_in_place": ("register_forward_hook", lambda _, given, output: output.mul_(2), {}),
}


@pytest.mark.parametrize("place", ["norm2", "mlp.act"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_others_count_once(model, batch, monkeypatch, kind, place) -> None:
    register, hook, named = HOOKS[kind]
    getattr(model.blocks[1].get_submodule(place), register)(hook, **named)
    check_as_if_all_were_kept(partial(gradients, model, batch[0]), monkeypatch)


@pytest.mark.parametrize("place", ["norm2", "mlp.act"])
def test_hooks_that_look_on_see_each_output_and_its_whole_gradient_once(model, batch, place) -> None:
    outputs, passed = [], []

    def look(_: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
        outputs.append(output)
        output.register_hook(passed.append)

    model.blocks[1].get_submodule(place).register_forward_hook(look)
    gradients(model, batch[0])
    assert len(outputs) == len(passed) == 1
    assert passed[0].shape == outputs[0].shape


@pytest.mark.parametrize("place", ["fc1", "fc2"])
def test_inputs_changed_in_place_after_they_were_made(model, batch, monkeypatch, place) -> None:
    layer = model.blocks[1].mlp.get_submodule(place)
    layer.register_forward_pre_hook(lambda _, given: (given[0].mul_(1.5),))
    check_as_if_all_were_kept(partial(gradients, model, batch[0]), monkeypatch)


def test_dropout_in_place_after_the_activation(model, batch, monkeypatch) -> None:
    for block in model.train().blocks:
        block.mlp.drop1 = nn.Dropout(0.5, inplace=True)
    check_as_if_all_were_kept(partial(gradients, model, batch[0]), monkeypatch)


def test_weights_swapped_for_a_forward_pass(model, batch, monkeypatch) -> None:
    def run() -> dict[str, Tensor]:
        theirs = {
            name: (one.detach() * 1.5).requires_grad_(one.requires_grad) for name, one in model.named_parameters()
        }
        torch.func.functional_call(model, theirs, (batch[0],)).square().sum().backward()
        return {name: one.grad for name, one in theirs.items() if one.grad is not None}

    check_as_if_all_were_kept(run, monkeypatch)


def test_a_replica_s_trained_norm_gets_its_gradient(model, batch, monkeypatch) -> None:
    norm = model.blocks[1].norm2
    norm.weight.requires_grad_(True)
    replica = norm._replicate_for_data_parallel()  # as DataParallel does: its parameters are plain attributes
    replica.weight, replica.bias = norm.weight * 1, norm.bias * 1
    model.blocks[1].norm2 = replica

    def run() -> dict[str, Tensor]:
        replica.weight = norm.weight * 1
        norm.weight.grad = None
        gradients(model, batch[0])
        return {"weight": norm.weight.grad}

    check_as_if_all_were_kept(run, monkeypatch)


def layer(pool: int = 1) -> AdaptedLinear:
    layer = AdaptedLinear(nn.Linear(WIDTH, WIDTH))
    adapter = SiteAdapter(WIDTH, WIDTH, 2, scale=1.5, generator=torch.Generator().manual_seed(0), pool=pool)
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
        sum(one.square().sum() for one in first).backward()


def test_a_compiled_model_is_one_graph_with_the_same_gradients(model, batch) -> None:
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found, expected = gradients(compiled, batch[0]), gradients(model, batch[0])
    for name, one in expected.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"], one)
