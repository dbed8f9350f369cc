"""A run that is saved, loaded and continued equals one that was not interrupted, bit for bit."""

import json
from itertools import pairwise

import pytest
import torch
from allocation_runs import config, optimizer_of, train, train_step
from safetensors.torch import load, save
from torch.utils._pytree import tree_map

from peft_vit import AdaLoRAController
from peft_vit.base.errors import UserError
from peft_vit.core.adapters import current_ranks, set_ranks, site_adapters

pytestmark = pytest.mark.part("controller")
STEPS = 12
RUNS = {
    # 12 sites share 18 ranks: sites without rank, probes, growth
    "probed": {"budget_schedule": "constant", "total_rank_budget": 18, "importance_metric": "fisher"},
    "sensitivity": {"importance_metric": "sensitivity", "parametrization": "svd", "initial_budget": 30},
    "random": {"importance_metric": "random"},
    "global": {"importance_metric": "sensitivity", "parametrization": "svd", "allocation_strategy": "global"},
}


def stored(state):
    """Send a controller's state through the files that it is meant for."""
    return {"values": json.loads(json.dumps(state["values"])), "tensors": load(save(state["tensors"]))}


def resumed(tiny_vit, settings, model, optimizer, controller):
    """Build everything again, from what a checkpoint would hold."""
    other = tiny_vit()
    again = AdaLoRAController(other, settings, STEPS, seed=3)
    set_ranks(other, current_ranks(model))
    other.load_state_dict(model.state_dict())
    fresh = optimizer_of(other)
    fresh.load_state_dict(optimizer.state_dict())
    again.load_state_dict(stored(controller.state_dict()))
    again.attach(other, fresh)
    return other, fresh, again


def contents(model, optimizer, controller):
    """Return all that a run holds, with lists in the place of tensors: equal where every bit is."""
    states = [model.state_dict(), optimizer.state_dict(), controller.state_dict()]
    return current_ranks(model), tree_map(lambda leaf: leaf.tolist() if torch.is_tensor(leaf) else leaf, states)


@pytest.mark.parametrize("kind", RUNS)
def test_resize_then_resume_equals_resume_then_resize(tiny_vit, batch, kind) -> None:
    settings = config(update_frequency=3, warmup_steps=3, **RUNS[kind])  # decisions at 3, 6, 9, 10

    def run(interruptions=()):
        model = tiny_vit()
        controller = AdaLoRAController(model, settings, STEPS, seed=3)
        state = (model, optimizer_of(model), controller)
        controller.attach(model, state[1])
        for step in range(1, STEPS + 1):
            train_step(state[0], state[2], state[1], batch, step)
            if step in interruptions:
                state = resumed(tiny_vit, settings, *state)
        return state

    whole = run()
    controller = whole[2]
    ranks = [entry["ranks"] for entry in controller.rank_history]
    assert len(ranks) == 5
    assert any(after != before for before, after in pairwise(ranks))
    if kind == "probed":
        assert controller.probe_history
        assert any(ranks[3][name] > ranks[2][name] for name in ranks[3])  # it grew
    for interruptions in ([5], [6], range(1, STEPS)):  # before a decision (probes are there), after it, always
        assert contents(*run(interruptions)) == contents(*whole)


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
    controller.load_state_dict(state)
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
