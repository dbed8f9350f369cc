"""Probes: temporary triplets that change nothing, feel the gradient, and score sites without rank."""

import numpy as np
import pytest
import torch
from allocation_runs import backward, config, start, train, train_step
from torch.nn import functional as F

from peft_vit.core.adapters import GradientProbe, current_ranks, merged_state_dict, set_ranks, site_adapters
from peft_vit.core.adapters.footprint import trainable_parameters
from peft_vit.core.allocation import AdaLoRAController
from peft_vit.core.allocation.importance import PROBE_TRIPLETS, attach_probes, probed_scores, take_probes
from peft_vit.core.backbones import find_sites

pytestmark = pytest.mark.part("importance analysis")


def adapted(tiny_vit, fill_adapters, pool=1):
    """Return a model of one block whose sites have several ranks, its factors filled, and its adapters."""
    model = tiny_vit(depth=1)
    controller = AdaLoRAController(model, config(), 9, pool=pool)
    set_ranks(model, dict(zip(controller.names, (3, 0, 1, 0, 2, 4), strict=True)))
    fill_adapters(model)
    return model, site_adapters(model)


def plain_gradients(tiny_vit, model, batch) -> dict[str, np.ndarray]:
    """Return dL/dW of each site from the plain timm model with the updates merged, float64."""
    plain = tiny_vit(depth=1)
    plain.load_state_dict(merged_state_dict(model))
    backward(plain.double(), (batch[0].double(), batch[1]))
    return {site.name: plain.get_submodule(site.module).weight.grad[site.span].numpy() for site in find_sites(plain)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_outputs_stay_bit_for_bit_and_nothing_new_is_trained(tiny_vit, batch, fill_adapters, precision) -> None:
    model, adapters = adapted(tiny_vit, fill_adapters)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        logits = model(batch[0])
        names, parameters = list(model.state_dict()), trainable_parameters(model)
        attach_probes(adapters, seed=0, step=1)
        probed = model(batch[0])
    assert torch.equal(probed, logits)
    assert list(model.state_dict()) == names
    assert trainable_parameters(model) == parameters
    F.cross_entropy(probed.float(), batch[1]).backward()
    assert all(adapter.probe.gradient() > 0 for adapter in adapters.values())
    held = {id(p) for p in model.parameters()}
    assert not any(id(adapter.probe.lambdas) in held for adapter in adapters.values())


@pytest.mark.parametrize("pool", [1, 16])
def test_each_lambda_feels_the_gradient_along_its_directions(tiny_vit, batch, fill_adapters, pool) -> None:
    """Inputs that are summed in groups before an adapter sum their gradients."""
    model, adapters = adapted(tiny_vit, fill_adapters, pool)
    expected = plain_gradients(tiny_vit, model, batch)
    attach_probes(adapters, seed=0, step=1)
    backward(model, batch)
    for name, adapter in adapters.items():
        left, right = adapter.probe._left.double().numpy(), adapter.probe._right.double().numpy()
        np.testing.assert_allclose(np.linalg.norm(left, axis=0), 1, rtol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(right, axis=1), 1, rtol=1e-6)
        pooled = expected[name].reshape(adapter.out_features, -1, pool).sum(2)
        along = np.einsum("ok,oi,ki->k", left, pooled, right)
        assert adapter.probe.values == PROBE_TRIPLETS * (sum(pooled.shape) + 1)
        np.testing.assert_allclose(adapter.probe.lambdas.grad.numpy(), along, rtol=1e-3, atol=1e-7)
        assert adapter.probe.gradient().item() == pytest.approx(np.sqrt(np.mean(along**2)), rel=1e-3)


def test_the_root_mean_square_estimates_the_size_of_the_gradient(tiny_vit, batch, fill_adapters) -> None:
    model, adapters = adapted(tiny_vit, fill_adapters)
    expected = {name: np.sqrt(np.mean(g**2)) for name, g in plain_gradients(tiny_vit, model, batch).items()}
    squares = {name: [] for name in adapters}
    for step in range(200):
        attach_probes(adapters, seed=step // 20, step=step % 20)
        backward(model, batch)
        for name, size in take_probes(adapters)[0].items():
            squares[name].append(size**2)
    for name, values in squares.items():
        assert len({round(value, 12) for value in values}) > 190  # other directions with each seed and at each step
        assert np.sqrt(np.mean(values)) == pytest.approx(expected[name], rel=0.15)


def test_a_score_is_set_in_relation_to_sites_that_have_both() -> None:
    gradients = {"a": 2.0, "b": 1.0, "c": 4.0, "d": 0.0, "e": 1.0}
    measured = {"a": 6.0, "b": 1.0, "d": 0.0, "e": 100.0}  # e has learned: the others are not measured by it
    assert probed_scores("gradient_norm", gradients, measured, ["c", "x"]) == {"c": 4.0 * 3.0}
    assert probed_scores("fisher", gradients, {"a": 6.0, "b": 1.0}, ["c"]) == {"c": 16.0 * (1.5 + 1.0) / 2}  # squared
    assert probed_scores("magnitude", gradients, {"d": 0.0}, ["c"]) == {}


def without_rank(tiny_vit, **settings):
    """Return model, controller, optimizer of 12 sites that share 8 ranks, with decisions at 3, 5, 7."""
    model = tiny_vit()
    settings = {"budget_schedule": "constant", "total_rank_budget": 8, "warmup_steps": 3, **settings}
    return model, *start(model, config(**settings))


@pytest.mark.parametrize("metric", ["gradient_norm", "fisher", "sensitivity", "magnitude"])
def test_sites_without_rank_are_scored_at_decisions(tiny_vit, batch, metric) -> None:
    model, controller, optimizer = without_rank(tiny_vit, importance_metric=metric)
    train(model, controller, optimizer, batch, (1, 2))
    ranks, adapters = current_ranks(model), site_adapters(model)
    backward(model, batch)
    size = {name: adapter.probe.lambdas.grad.square().mean().sqrt().item() for name, adapter in adapters.items()}
    values = sum(PROBE_TRIPLETS * (a.in_features + a.out_features + 1) for a in adapters.values())
    scores = controller.update_importance_scores(model, 3)
    power = 2 if metric in ("fisher", "sensitivity") else 1
    ratio = np.median([scores[name] / size[name] ** power for name, rank in ranks.items() if rank])
    sought = [name for name, rank in ranks.items() if not rank]
    assert len(sought) == 4
    for name in sought:
        assert scores[name] == pytest.approx(size[name] ** power * ratio, rel=1e-5)
    assert controller.probe_history == [{"step": 3, "sites": sought, "values": values}]
    assert controller.export_importance_data()["probes"] == controller.probe_history
    assert all(adapter.probe is None for adapter in adapters.values())


@pytest.mark.parametrize(
    ("settings", "probed"),
    [
        ({}, [3, 5, 7]),
        ({"update_frequency": 1, "warmup_steps": 1, "final_steps": 0}, list(range(1, 10))),
        ({"importance_metric": "random"}, []),
        ({"importance_metric": "uniform"}, []),
        ({"allocation_strategy": "global", "budget_schedule": "cubic"}, []),  # ranks triplets that exist
        ({"total_rank_budget": 13, "minimum_rank": 1}, []),  # no site is without rank
    ],
)
@pytest.mark.filterwarnings("ignore::peft_vit.base.errors.SilentNoEffectWarning")
def test_steps_are_probed_that_lead_to_a_decision_of_which_something_can_come(
    tiny_vit, batch, settings, probed
) -> None:
    model, controller, optimizer = without_rank(tiny_vit, **settings)
    controller.attach(model, optimizer)
    seen = []
    for step in range(1, 10):
        if any(adapter.probe is not None for adapter in site_adapters(model).values()):
            seen.append(step)
        train_step(model, controller, optimizer, batch, step)
        assert [entry["step"] for entry in controller.probe_history] == seen
    assert seen == probed
    assert sum(current_ranks(model).values()) == controller.config.total_rank_budget


def test_without_a_pass_through_the_probes_a_site_keeps_its_score(tiny_vit, batch) -> None:
    model, controller, optimizer = without_rank(tiny_vit)
    train(model, controller, optimizer, batch, (1, 2))
    adapters, sought = site_adapters(model), [name for name, rank in controller.ranks.items() if rank == 0]
    probes = {name: adapter.probe for name, adapter in adapters.items()}
    for adapter in adapters.values():
        adapter.probe = None  # as in a pass under a copy of the model
    backward(model, batch)
    for name, adapter in adapters.items():
        adapter.probe = probes[name]
    scores = controller.update_importance_scores(model, 3)
    measured = [score for name, score in scores.items() if name not in sought]
    assert [scores[name] for name in sought] == pytest.approx([np.mean(measured)] * 4)  # never scored: an average site
    assert controller.probe_history == []
    assert all(adapter.probe is None for adapter in adapters.values())


def test_the_loss_scale_its_overflow_and_accumulation_leave_probed_scores(tiny_vit, batch) -> None:
    results = []
    for scale, parts in ((1.0, 1), (1024.0, 1), (1.0, 2), (torch.inf, 1)):
        model, controller, optimizer = without_rank(tiny_vit)
        train(model, controller, optimizer, batch, (1, 2))
        for images, labels in zip(batch[0].chunk(parts), batch[1].chunk(parts), strict=True):
            (scale * F.cross_entropy(model(images), labels) / parts).backward()
        results.append(controller.update_importance_scores(model, 3, loss_scale=min(scale, 65536.0)))
        assert len(controller.probe_history) == (scale < torch.inf)
    assert results[1] == pytest.approx(results[0], rel=1e-4)
    assert results[2] == pytest.approx(results[0], rel=1e-3)
    assert np.isfinite(list(results[3].values())).all()


def test_evaluation_between_two_steps_does_not_carry_the_probes(tiny_vit, batch, monkeypatch) -> None:
    model, controller, optimizer = without_rank(tiny_vit)
    train(model, controller, optimizer, batch, (1, 2))
    probed = []
    factors = GradientProbe.factors
    monkeypatch.setattr(GradientProbe, "factors", lambda probe: probed.append(probe) or factors(probe))
    with torch.no_grad():
        plain = model(batch[0])
    assert not probed
    assert torch.equal(model(batch[0]), plain)
    assert len(probed) == 12
