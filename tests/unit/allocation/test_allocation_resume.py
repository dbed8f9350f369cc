"""What a controller saves: plain values and tensors, a copy, of one run; `test_training_resume` continues from it."""

import json

import pytest
import torch
from allocation_runs import config, optimizer_of, train, train_step
from safetensors.torch import load, save

from peft_vit import AdaLoRAController
from peft_vit.base.errors import UserError
from peft_vit.core.adapters import site_adapters

pytestmark = pytest.mark.part("controller")
STEPS = 12


def stored(state):
    """Send a controller's state through the files that it is meant for."""
    return {"values": json.loads(json.dumps(state["values"])), "tensors": load(save(state["tensors"]))}


def test_a_state_is_a_copy(tiny_vit, batch) -> None:
    model = tiny_vit()
    controller = AdaLoRAController(model, config(), STEPS)
    optimizer = optimizer_of(model)
    train_step(model, controller, optimizer, batch, 1)
    state = controller.state_dict()
    text, tensors = json.dumps(state["values"]), {name: tensor.clone() for name, tensor in state["tensors"].items()}
    train(model, controller, optimizer, batch, range(2, 7))
    assert json.dumps(state["values"]) == text
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in state["tensors"].items())
    controller.load_state_dict(stored(state))
    assert controller.state_dict()["values"] == state["values"]
    assert controller._scored == 1
    assert len(controller.rank_history) == 1


@pytest.mark.parametrize(
    ("changed", "field"), [({"seed": 1}, "seed"), ({"steps": 13}, "total_steps"), ({"minimum_rank": 1}, "config")]
)
def test_a_state_of_another_run_is_refused(tiny_vit, changed, field) -> None:
    def make(seed=0, steps=STEPS, **settings):
        return AdaLoRAController(tiny_vit(), config(**settings), steps, seed=seed)

    with pytest.raises(UserError, match=f"^{field}: the state was made with another one"):
        make(**changed).load_state_dict(make().state_dict())


def test_adapters_of_other_ranks_than_the_state_are_refused(tiny_vit, batch) -> None:
    model = tiny_vit()
    controller = AdaLoRAController(model, config(), STEPS)
    optimizer = optimizer_of(model)
    train(model, controller, optimizer, batch, (1, 2))
    other = tiny_vit()
    again = AdaLoRAController(other, config(), STEPS)
    again.load_state_dict(controller.state_dict())
    name = next(name for name, adapter in site_adapters(other).items() if adapter.rank != controller.ranks[name])
    with pytest.raises(UserError, match=rf"{name}: has rank \d+ where the controller has {controller.ranks[name]}"):
        again.attach(other, optimizer_of(other))
