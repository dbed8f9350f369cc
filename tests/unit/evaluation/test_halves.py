"""Two halves of a batch on two threads: gradients and outputs are the whole's, and the same each time."""

import copy

import pytest
import torch
from tiny_models import TINY_FAMILIES, random_model
from torch import nn
from torch.nn import functional as F

from peft_vit.core.adapters import attach_adapters, use_int8_matmul
from peft_vit.core.backbones import Backbone, find_sites
from peft_vit.core.backbones.passes import class_token_alone
from peft_vit.core.training.halves import forward_in_halves, in_halves, loss_in_halves, takes_halves

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def gradients(model: nn.Module, batch, halves: bool) -> dict[str, torch.Tensor]:
    images, labels = batch
    model.zero_grad()

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x), y) * (len(x) / len(images))

    loss = loss_in_halves(loss_of, images, labels) if halves else loss_of(images, labels)
    loss.backward()
    return {"loss": loss.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("count", [2, 5, 6])
def test_gradients_are_those_of_the_whole_and_repeat_to_the_bit(two_threads, tiny_vit, batch, integers, count) -> None:
    model = tiny_vit()
    attach_adapters(model, find_sites(model), 2, scale=1.0, seed=0)
    if integers:
        use_int8_matmul(model)
    some = batch[0][:count], batch[1][:count]
    whole, first = gradients(model, some, halves=False), gradients(model, some, halves=True)
    assert whole.keys() == first.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(first[name], gradient, rtol=1e-3, atol=2e-3 * float(gradient.abs().max()))
    for _ in range(10):
        again = gradients(model, some, halves=True)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_every_family_passes_in_halves_and_in_integers(two_threads, name, batch) -> None:
    model = random_model(name).train()
    attach_adapters(model, find_sites(model), 2, scale=1.0, seed=0)
    in_float = model(batch[0]).detach()
    assert use_int8_matmul(model).bits in (7, 8)
    assert (model(batch[0]) - in_float).norm() < 0.2 * in_float.norm()
    with class_token_alone(model):
        whole, first = gradients(model, batch, halves=False), gradients(model, batch, halves=True)
        again = gradients(model, batch, halves=True)
    assert all(torch.equal(again[parameter], gradient) for parameter, gradient in first.items())
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    for parameter, gradient in whole.items():
        torch.testing.assert_close(first[parameter], gradient, rtol=0.02, atol=5e-3 * largest)


def test_threads_have_their_share_and_the_caller_keeps_its_own(two_threads) -> None:
    torch.set_num_threads(4)
    assert in_halves(lambda part: (part, torch.get_num_threads()), ["a", "b"]) == [("a", 2), ("b", 2)]
    assert torch.get_num_threads() == 4


def test_outputs_and_features_are_the_whole_s_in_their_order(two_threads, tiny_vit, batch) -> None:
    model = tiny_vit().eval()
    images = torch.cat([batch[0], batch[0].flip(-1)])[:11]
    with torch.no_grad():
        expected = model(images), Backbone(model).features(images)
    got = forward_in_halves(model, images, CPU), forward_in_halves(Backbone(model).features, images, CPU)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not got[0].requires_grad


def test_an_error_in_one_half_is_the_callers(two_threads) -> None:
    def fail(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        if float(x[0]) == 1:
            raise ValueError("of the second half")
        return x.sum().requires_grad_()

    with pytest.raises(ValueError, match="of the second half"):
        loss_in_halves(fail, torch.arange(2.0), torch.zeros(2))


def test_what_draws_and_one_thread_take_no_halves(two_threads, tiny_vit) -> None:
    model = tiny_vit()
    assert takes_halves(model, CPU)
    assert not takes_halves(model, torch.device("meta"))
    dropping = copy.deepcopy(model)
    dropping.blocks[0].attn.proj_drop.p = 0.1
    assert not takes_halves(dropping, CPU)
    torch.set_num_threads(1)
    assert not takes_halves(model, CPU)
