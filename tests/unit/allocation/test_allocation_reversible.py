"""prune: reversible: losers are zero, live on, may come back; the last decision resizes for real."""

import warnings

import pytest
import torch
from allocation_runs import STEPS, backward, config, scored, start, train, train_step

from peft_vit import AdaLoraConfig
from peft_vit.adapters import current_ranks, site_adapters
from peft_vit.errors import SilentNoEffectWarning, UserError
from peft_vit.evaluation import optimizer_bytes, trainable_parameters

pytestmark = pytest.mark.part("controller")


def reversible(model, parametrization="product", **settings):
    """Return controller and optimizer; decisions at 2, 4, 6 and, for good, at 7."""
    given = {"total_rank_budget": 12, "initial_budget": 36, "prune": "reversible", "parametrization": parametrization}
    return start(model, config(**{**given, **settings}))


def updates(model) -> dict[str, torch.Tensor]:
    """Return the norm of each triplet's update, (rank,) by site."""
    found = {}
    for name, adapter in site_adapters(model).items():
        left, right = adapter.factors()
        found[name] = (left.norm(dim=0) * right.norm(dim=1)).detach()
    return found


@pytest.mark.parametrize("parametrization", ["product", "svd"])
@pytest.mark.parametrize("strategy", ["proportional", "threshold", "top_k", "global"])
def test_losers_are_zero_until_the_last_decision_resizes(tiny_vit, batch, strategy, parametrization) -> None:
    model = tiny_vit()
    controller, optimizer = reversible(model, parametrization, allocation_strategy=strategy)
    first, parameters = current_ranks(model), trainable_parameters(model)
    for step in range(1, STEPS + 1):
        ranks = train_step(model, controller, optimizer, batch, step)
        assert sum(controller.ranks.values()) == controller.schedule.budget_at(step)
        assert all(ranks[name] <= first[name] for name in ranks)
        if step < 7:
            assert current_ranks(model) == first
            assert trainable_parameters(model) == parameters
        if step in (2, 4, 6):
            assert {name: int(norms.count_nonzero()) for name, norms in updates(model).items()} == ranks
    assert current_ranks(model) == controller.ranks
    assert sum(current_ranks(model).values()) == 12
    assert trainable_parameters(model) < parameters
    assert [entry["step"] for entry in controller.rank_history] == [0, 2, 4, 6, 7]
    assert controller.rank_history[-1]["ranks"] == current_ranks(model)
    assert optimizer_bytes(optimizer) < 2 * 4 * parameters
    assert controller.probe_history == []


def told(controller, monkeypatch, scores) -> None:
    """Let the controller see these scores of triplets from now on."""
    monkeypatch.setattr(controller.tracker, "update", lambda adapters, loss_scale: dict(scores))


@pytest.mark.parametrize("parametrization", ["product", "svd"])
def test_a_loser_receives_gradients_and_comes_back_with_its_moments(tiny_vit, batch, monkeypatch, parametrization):
    model = tiny_vit(depth=1)
    controller, optimizer = reversible(
        model, parametrization, total_rank_budget=6, initial_budget=12, allocation_strategy="global"
    )
    train_step(model, controller, optimizer, batch, 1)
    name = controller.names[2]
    kind = "lora_B" if parametrization == "product" else "lora_lambda"
    low = {site: torch.tensor([2.0, 1.0]) for site in controller.names}
    high = {**low, name: torch.tensor([0.1, 3.0])}
    for step in (2, 3):
        told(controller, monkeypatch, low)
        train_step(model, controller, optimizer, batch, step)
    told(controller, monkeypatch, {**low, name: torch.tensor([2.0, 0.5])})
    train_step(model, controller, optimizer, batch, 4)
    parameter = getattr(site_adapters(model)[name], kind)
    moments = optimizer.state[parameter]["exp_avg"]
    assert controller._active[name].tolist() == [True, False]
    assert not parameter.detach()[..., 1].any()
    backward(model, batch)
    assert parameter.grad[..., 1].any()
    optimizer.zero_grad()
    train_step(model, controller, optimizer, batch, 5)  # between decisions it moves
    assert parameter.detach()[..., 1].any()
    told(controller, monkeypatch, high)
    train_step(model, controller, optimizer, batch, 6)
    assert getattr(site_adapters(model)[name], kind) is parameter
    assert optimizer.state[parameter]["exp_avg"] is moments
    assert controller._active[name].tolist() == [False, True]
    assert parameter.detach()[..., 1].any()
    assert not parameter.detach()[..., 0].any()


def test_resizing_at_the_end_leaves_the_function_that_the_mask_would(tiny_vit, batch) -> None:
    model = tiny_vit()
    controller, optimizer = reversible(model)
    train(model, controller, optimizer, batch, range(1, 7))
    scores = scored(model, controller, batch, 7)
    triplets = {name: values.clone() for name, values in controller._triplet_scores.items()}
    optimizer.step()
    ranks = controller.reallocate_ranks(scores, 7)
    deltas = {}
    for name, adapter in site_adapters(model).items():
        left, right = adapter.factors()
        best = triplets[name].argsort(descending=True)[: ranks[name]]
        deltas[name] = (left[:, best] @ right[best]).detach()
    controller.apply_ranks(model, optimizer, ranks)
    for name, adapter in site_adapters(model).items():
        assert adapter.rank == ranks[name]
        torch.testing.assert_close(adapter.delta().detach(), deltas[name], rtol=1e-5, atol=1e-7)


def test_a_sites_score_is_the_mean_over_its_active_triplets(tiny_vit, batch) -> None:
    model = tiny_vit()
    controller, optimizer = reversible(model)
    train(model, controller, optimizer, batch, range(1, 5))
    scores = scored(model, controller, batch, 5)
    assert 0 < sum(controller.ranks.values()) < sum(current_ranks(model).values())
    for name, active in controller._active.items():
        triplets = controller._triplet_scores[name]
        expected = triplets[active].mean() if active.any() else triplets.mean()
        assert scores[name] == pytest.approx(expected.item(), rel=1e-6)


def test_the_missed_last_decision_is_taken_late(tiny_vit, batch) -> None:
    model = tiny_vit()
    controller, optimizer = reversible(model)
    train(model, controller, optimizer, batch, (1, 2, 9))
    assert sum(current_ranks(model).values()) == 12


def test_it_can_not_grow(tiny_vit, batch) -> None:
    model = tiny_vit()
    controller, optimizer = reversible(model)
    scored(model, controller, batch, 1)
    name = controller.names[0]
    lower = dict.fromkeys(controller.names, 2)
    with pytest.raises(UserError, match=rf"{name}: prune: reversible can't grow beyond the 3 of the start"):
        controller.apply_ranks(model, optimizer, {**lower, name: 4})


def test_settings_without_effect_are_said_or_refused(tiny_vit) -> None:
    with pytest.warns(SilentNoEffectWarning, match="prune: reversible has no effect: the adapters start with 12 ranks"):
        reversible(tiny_vit(), initial_budget=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reversible(tiny_vit(), initial_budget=13)
    with pytest.raises(ValueError, match="prune: reversible has no effect with budget_schedule: constant"):
        config(prune="reversible", budget_schedule="constant")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "needs a penalty: parametrization: svd"),
        ({"parametrization": "svd", "orthogonality_weight": 0.0}, "needs a penalty"),
        ({"parametrization": "svd", "importance_metric": "magnitude"}, "no effect with importance_metric: magnitude"),
        ({"parametrization": "svd", "importance_metric": "random"}, "no effect with importance_metric: random"),
        ({"parametrization": "svd", "importance_metric": "uniform"}, "no effect with importance_metric: uniform"),
    ],
)
def test_the_penaltys_gradient_is_scored_only_where_there_is_one(settings, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        config(importance_gradient="task_and_penalty", **settings)
    good = config(importance_gradient="task_and_penalty", parametrization="svd")
    assert good.importance_gradient == "task_and_penalty"
    assert AdaLoraConfig(**config().model_dump()).importance_gradient == "task"
    assert config().prune == "physical"
