"""AdaLoRAController in a plain loop: budget kept, ranks go where the gradient is; what it saves is of one run."""

import json
import warnings

import numpy as np
import pytest
import torch
from allocation_runs import config, optimizer_of, scored, start, train, train_step
from safetensors.torch import load, save
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from peft_vit import AdaLoRAController
from peft_vit.base.errors import SilentNoEffectWarning, UserError
from peft_vit.core.adapters import current_ranks, site_adapters

pytestmark = pytest.mark.part("controller")

STRATEGIES = ("proportional", "threshold", "top_k", "global")


def planted_model() -> VisionTransformer:
    """Return a model in which only the last block's MLP reaches the logits: all other layer scales are 0."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, mlp_ratio=2, num_classes=5, init_values=1.0
    )
    with torch.no_grad():
        model.head.weight.normal_()
        for scale in (model.blocks[0].ls1, model.blocks[0].ls2, model.blocks[1].ls1):
            scale.gamma.zero_()
    return model


@pytest.mark.part("importance analysis")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("metric", ["magnitude", "gradient_norm", "fisher", "sensitivity"])
def test_ranks_go_to_the_only_site_that_matters(batch, metric, strategy) -> None:
    model = planted_model()
    settings = config(
        allocation_strategy=strategy,
        importance_metric=metric,
        targets=("query", "value", "out", "fc1"),
        total_rank_budget=8,
        top_k=1 if strategy == "top_k" else None,
    )
    controller, optimizer = start(model, settings)
    train(model, controller, optimizer, batch)
    ranks = current_ranks(model)
    planted = "blocks.1.mlp.fc1"
    if strategy == "global":  # it keeps the best triplets there are; new ones come only to a growing budget
        assert ranks[planted] == controller.rank_history[0]["ranks"][planted]
    else:
        assert ranks == {name: 8 if name == planted else 0 for name in ranks}
    scores = controller.score_history[-1]["scores"]
    assert max(scores, key=scores.__getitem__) == planted
    assert all(score == 0 for name, score in scores.items() if name != planted)
    summary = controller.get_layer_importance_summary()
    assert summary["blocks.1"]["mean"] > 0 == summary["blocks.0"]["mean"]


def test_a_site_without_rank_keeps_its_score_and_can_come_back(tiny_vit, batch) -> None:
    model = tiny_vit(depth=1)
    settings = config(budget_schedule="constant", total_rank_budget=6, warmup_steps=3)
    controller, optimizer = start(model, settings)
    names = list(controller.names)
    first = scored(model, controller, batch, 1)
    controller.apply_ranks(model, optimizer, dict(zip(names, [6, 0, 0, 0, 0, 0], strict=True)))
    optimizer.zero_grad()
    second = scored(model, controller, batch, 2)  # no decision follows, so nothing was probed
    assert {name: second[name] for name in names[1:]} == {name: first[name] for name in names[1:]}
    assert second[names[0]] != first[names[0]]
    controller.update_importance_scores(model, 3)
    back = controller.reallocate_ranks({name: float(name == names[3]) for name in names}, 3)
    assert back[names[3]] == 6
    controller.apply_ranks(model, optimizer, back)
    assert site_adapters(model)[names[3]].lora_A.shape == (6, 64)


@pytest.mark.part("importance analysis")
def test_summary_and_export(tiny_vit, batch) -> None:
    model = tiny_vit()
    controller, optimizer = start(model, config())
    empty = controller.get_layer_importance_summary()
    assert empty["overall"] == {"mean": 0.0, "std": 0.0, "trend": 0.0, "rank": 22.0}
    train(model, controller, optimizer, batch)
    exported = controller.export_importance_data()
    assert json.loads(json.dumps(exported)) == exported
    assert [entry["step"] for entry in exported["scores"]] == [2, 4, 6, 7]
    assert [site["name"] for site in exported["sites"]] == list(controller.names)
    summary = controller.get_layer_importance_summary()
    groups = {
        "blocks.1.mlp.fc2": ["blocks.1.mlp.fc2"],
        "blocks.0": [name for name in controller.names if name.startswith("blocks.0.")],
        "value": ["blocks.0.attn.value", "blocks.1.attn.value"],
        "overall": list(controller.names),
    }
    assert summary.keys() == {*controller.names, "blocks.0", "blocks.1", "overall"} | set(controller.config.targets)
    for key, members in groups.items():
        course = np.array([np.mean([entry["scores"][name] for name in members]) for entry in exported["scores"]])
        time = np.arange(4) - 1.5
        expected = {"mean": course.mean(), "std": course.std(ddof=1), "trend": (time * course).sum() / (time**2).sum()}
        expected["rank"] = sum(current_ranks(model)[name] for name in members)
        assert summary[key] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("settings", "is_said"),
    [
        ({"initial_budget": 15}, True),
        ({"total_rank_budget": 18, "maximum_rank": 3}, True),  # 1.5 times as much is cut to what the sites can hold
        ({"total_rank_budget": None, "total_parameter_budget": 2000, "initial_budget": 2050}, True),  # 128 a rank
        ({"initial_budget": 16}, False),
        ({"allocation_strategy": "proportional", "initial_budget": 15}, False),  # moves ranks under any budget
    ],
)
def test_a_global_ranking_whose_budget_holds_the_start_says_so(tiny_vit, batch, settings, is_said) -> None:
    model = tiny_vit(depth=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        controller, optimizer = start(model, config(**{"allocation_strategy": "global", **settings}))
    assert [entry.category for entry in caught] == [SilentNoEffectWarning] * is_said
    assert all("global has no effect: the adapters start with" in str(entry.message) for entry in caught)
    train(model, controller, optimizer, batch)
    first = controller.rank_history[0]["ranks"]
    assert all(entry["ranks"] == first for entry in controller.rank_history) == is_said


def test_a_bar_that_no_site_reaches_is_said_once(tiny_vit, batch) -> None:
    model = tiny_vit(depth=1)
    controller, optimizer = start(model, config(allocation_strategy="threshold", threshold_tau=5.9))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, controller, optimizer, batch)
    assert [str(entry.message)[:35] for entry in caught] == ["threshold_tau 5.9 has no effect: no"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        controller, optimizer = start(model := tiny_vit(depth=1), config(allocation_strategy="threshold"))
        train(model, controller, optimizer, batch)


@pytest.mark.part("importance analysis")
def test_scores_out_of_order_are_refused_and_a_missed_decision_is_taken_late(tiny_vit, batch) -> None:
    model = tiny_vit(depth=1)
    controller, optimizer = start(model, config())
    last = controller.schedule.last_update
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.query: lora_A has no gradient; call .* after backward"):
        controller.update_importance_scores(model, 1)
    with pytest.raises(UserError, match="call update_importance_scores first"):
        controller.apply_ranks(model, optimizer, dict.fromkeys(controller.names, 1))
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    with pytest.raises(UserError, match="step 0 follows step 0"):
        controller.update_importance_scores(model, 0)
    scores = controller.update_importance_scores(model, last + 1)  # every step before was left out
    with pytest.raises(UserError, match="score once a step"):
        controller.update_importance_scores(model, last + 1)
    controller.apply_ranks(model, optimizer, controller.reallocate_ranks(scores, last + 1))
    assert sum(current_ranks(model).values()) == controller.config.total_rank_budget
    assert controller.rank_history[-1]["step"] == last + 1
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    adapters = site_adapters(model)
    name = max(adapters, key=lambda name: adapters[name].rank)
    adapters[name].lora_B.grad[0, 0] = torch.nan
    with pytest.raises(UserError, match=rf"{name}: its importance at step {last + 2} is not finite"):
        controller.update_importance_scores(model, last + 2)


def test_a_refused_change_leaves_everything_as_it_was(tiny_vit, batch) -> None:
    model = tiny_vit(depth=1)
    controller, optimizer = start(model, config(total_rank_budget=90, budget_schedule="constant"))
    scores = scored(model, controller, batch, 2)
    controller.reallocate_ranks(scores, 2)
    ranks, before = current_ranks(model), json.dumps(controller.state_dict()["values"])
    none, name = dict.fromkeys(controller.names, 0), controller.names[0]
    for changes, words in (
        (none | {name: 70}, r"ranks\[blocks\.0\.attn\.query\]: expected 0 to 64, got 70"),
        ({"blocks.7.attn.query": 1}, r"the model has no adapter on blocks\.7\.attn\.query"),
        (dict.fromkeys(none, 60), r"ranks: 360 ranks exceed the 90 of step 2"),
    ):
        with pytest.raises(UserError, match=words):
            controller.apply_ranks(model, optimizer, changes)
    assert current_ranks(model) == ranks
    assert json.dumps(controller.state_dict()["values"]) == before
    controller.apply_ranks(model, optimizer, none | {name: 60})
    assert controller.ranks == current_ranks(model)
    assert controller.ranks[name] == 60
    with pytest.raises(UserError, match="no scores since the last change"):
        controller.apply_ranks(model, optimizer, none)


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
