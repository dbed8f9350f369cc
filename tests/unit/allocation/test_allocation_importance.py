"""Scores of triplets against float64 NumPy written from the formulas."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from allocation_runs import config

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import SiteAdapter, site_adapters
from peft_vit.core.allocation import AdaLoRAController, ImportanceTracker
from peft_vit.core.allocation.importance import SCORES_OF_WEIGHTS, mean_per_triplet
from peft_vit.core.config import METRICS

pytestmark = pytest.mark.part("importance analysis")
BETA1, BETA2, RANK = 0.85, 0.7, 3
SMOOTHED = ("gradient_norm", "fisher", "sensitivity")
OF_TRIPLETS = [name for name in METRICS if name not in SCORES_OF_WEIGHTS]


def site(parametrization: str, seed: int = 0, rank: int = RANK, *, scale: float = 2.0, **settings: Any) -> SiteAdapter:
    generator = torch.Generator().manual_seed(seed)
    adapter = SiteAdapter(6, 5, rank, scale=scale, generator=generator, parametrization=parametrization, **settings)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return adapter


def set_gradients(adapter: SiteAdapter, seed: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.grad = factor * torch.randn(parameter.shape, generator=generator)


def tracker(metric: str, seed: int = 0) -> ImportanceTracker:
    generator = torch.Generator().manual_seed(seed)
    return ImportanceTracker(metric, sensitivity_beta=BETA1, uncertainty_beta=BETA2, generator=generator)


def by_triplet(adapter: SiteAdapter) -> list[tuple[list[np.ndarray], list[np.ndarray]]]:
    """Return (parameters, gradients) of each triplet: lambda_i if there is one, row i of A, column i of B."""
    result = []
    for i in range(adapter.rank):
        pick = {"lora_lambda": lambda t: t[i : i + 1], "lora_A": lambda t: t[i], "lora_B": lambda t: t[:, i]}  # noqa: B023
        named = [(pick[name], p) for name, p in adapter.named_parameters()]
        result.append(
            ([get(p.detach().double().numpy()) for get, p in named], [get(p.grad.double().numpy()) for get, p in named])
        )
    return result


def update_of(adapter: SiteAdapter, i: int) -> np.ndarray:
    """Return what one triplet adds to the weight, float64: the site's update with all others set to zero."""
    alone = copy.deepcopy(adapter).double()
    with torch.no_grad():
        alone.lora_B[:, np.arange(adapter.rank) != i] = 0
        return alone.delta().numpy()


@pytest.mark.parametrize(
    "settings",
    [
        {"parametrization": "product"},
        {"parametrization": "product", "lambda_gain": 50.0},  # has no lambda to act on
        {"parametrization": "product", "pool": 3},
        {"parametrization": "svd"},
        {"parametrization": "svd", "lambda_gain": 50.0},
    ],
)
def test_magnitude_is_the_norm_of_what_a_triplet_adds(settings) -> None:
    adapters = {name: site(seed=seed, scale=scale, **settings) for name, seed, scale in (("a", 0, 2.0), ("b", 1, 0.1))}
    scores = tracker("magnitude").update(adapters)
    for name, adapter in adapters.items():
        expected = [np.linalg.norm(update_of(adapter, i)) for i in range(RANK)]
        np.testing.assert_allclose(scores[name], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{"alpha_pattern": {"blocks.0.attn.qkv": 200}}, {"use_rslora": True, "rank_pattern": {"fc1": 6}}]
)
def test_magnitude_on_layers_that_peft_scales_unequally(tiny_vit, options) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["qkv", "fc1"], **options)
    model = peft.get_peft_model(tiny_vit(depth=1), config)
    generator, adapters = torch.Generator().manual_seed(0), site_adapters(model)
    with torch.no_grad():
        for adapter in adapters.values():
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    scores = tracker("magnitude").update(adapters)
    assert len({adapter.scale for adapter in adapters.values()}) == 2
    block = copy.deepcopy(model.base_model.model.blocks[0]).double()
    for name, layer in (("blocks.0.attn.qkv", block.attn.qkv), ("blocks.0.mlp.fc1", block.mlp.fc1)):
        weight = layer.lora_B["default"].weight
        assert len(scores[name]) == weight.shape[1]
        whole = weight.detach().clone()
        for i, score in enumerate(scores[name].tolist()):
            with torch.no_grad():
                weight.copy_(torch.where(torch.arange(weight.shape[1]) == i, whole, 0.0))
            assert score == pytest.approx(layer.get_delta_weight("default").norm().item(), rel=1e-5)


def reference(metric: str, states: list[dict], adapter: SiteAdapter) -> list[float]:
    """Move each triplet's state on by one step and return the scores: the formulas, one number at a time."""
    scores = []
    for state, (values, gradients) in zip(states, by_triplet(adapter), strict=True):
        if metric == "sensitivity":
            raw = [np.abs(w * g) for w, g in zip(values, gradients, strict=True)]
            smooth, uncertain = state.setdefault("s", [0.0] * len(raw)), state.setdefault("u", [0.0] * len(raw))
            for j, part in enumerate(raw):
                smooth[j] = BETA1 * smooth[j] + (1 - BETA1) * part
                uncertain[j] = BETA2 * uncertain[j] + (1 - BETA2) * np.abs(part - smooth[j])
            scores.append(sum(np.mean(s * u) for s, u in zip(smooth, uncertain, strict=True)))
        else:
            squared = sum((g**2).sum() for g in gradients)
            new = squared if metric == "fisher" else np.sqrt(squared)
            state["v"] = BETA1 * state.get("v", 0.0) + (1 - BETA1) * new
            scores.append(state["v"])
    return scores


@pytest.mark.parametrize("parametrization", ["product", "svd"])
@pytest.mark.parametrize("metric", SMOOTHED)
def test_scores_over_steps_and_through_a_change_of_rank(metric, parametrization) -> None:
    adapters = {"a": site(parametrization), "empty": site(parametrization, rank=0), "b": site(parametrization, 5, 2)}
    scorer = tracker(metric)
    states = {name: [{} for _ in range(adapter.rank)] for name, adapter in adapters.items()}
    returned, copies = [], []
    for step in range(6):
        if step == 3:  # a loses its second triplet and gains two; b stays
            states["a"] = [states["a"][0], states["a"][2], {}, {}]
            adapters["a"] = site(parametrization, 9, rank=4)
            scorer.follow({"a": torch.tensor([0, 2])}, {"a": 4, "b": 2})
        for seed, adapter in enumerate(adapters.values()):
            set_gradients(adapter, 10 * step + seed)
        scores = scorer.update(adapters)
        assert list(scores) == list(adapters)
        for name, adapter in adapters.items():
            np.testing.assert_allclose(scores[name], reference(metric, states[name], adapter), rtol=1e-5)
        returned += [*scores.values(), *scorer.state_dict().values()]
        copies += [tensor.clone() for tensor in returned[len(copies) :]]
    assert all(map(torch.equal, returned, copies))  # what was returned does not change later


def test_controls() -> None:
    adapters = {"a": site("product"), "b": site("product", 1)}
    assert all(torch.equal(scores, torch.ones(RANK)) for scores in tracker("uniform").update(adapters).values())
    assert len(tracker("fisher").update({"empty": site("svd", rank=0)})["empty"]) == 0
    first, again, other = (tracker("random", seed).update(adapters) for seed in (4, 4, 5))
    assert torch.equal(first["a"], again["a"])
    assert torch.equal(first["b"], again["b"])
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], other["a"])


@pytest.mark.parametrize("loss_scale", [65536.0, 3.0])
@pytest.mark.parametrize("metric", OF_TRIPLETS)
def test_loss_scaling_changes_no_score(metric, loss_scale) -> None:
    adapter, plain, scaled = site("svd"), tracker(metric), tracker(metric)
    for step in range(3):
        set_gradients(adapter, step)
        expected = plain.update({"a": adapter})["a"]
        set_gradients(adapter, step, loss_scale)
        torch.testing.assert_close(scaled.update({"a": adapter}, loss_scale)["a"], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("metric", "power"), [("gradient_norm", 0.5), ("fisher", 1)])
def test_gradients_count_at_loras_own_size_whatever_the_rank_has_made_of_it(metric, power) -> None:
    adapter = site("product")
    adapter.reference_rank = 4.0 * RANK
    set_gradients(adapter, 0)
    size, (A, B) = adapter.start_size(RANK), (adapter.lora_A.grad.numpy(), adapter.lora_B.grad.numpy())
    assert size != 1
    expected = (1 - BETA1) * (size**2 * (A**2).sum(1) + (B**2).sum(0) / size**2) ** power
    np.testing.assert_allclose(tracker(metric).update({"a": adapter})["a"], expected, rtol=1e-5)


@pytest.mark.parametrize("loss_scale", [0.0, -1.0, np.nan, np.inf])
def test_an_impossible_loss_scale_is_refused(loss_scale) -> None:
    with pytest.raises(UserError, match=r"^loss_scale: expected a positive number, got"):
        tracker("uniform").update({"a": site("svd")}, loss_scale)


@pytest.mark.parametrize("metric", SMOOTHED)
def test_gradients_that_overflowed_under_a_scale_are_left_out(metric) -> None:
    adapter, scorer = site("product"), tracker(metric)
    courses = []
    for broken, scale in ((True, 1024.0), (False, 1024.0), (True, 1024.0), (True, 1.0)):
        set_gradients(adapter, 0, 1024.0)
        if broken:
            adapter.lora_B.grad[0, 0] = torch.inf
        courses.append(scorer.update({"a": adapter}, scale)["a"])
    assert not courses[0].any()  # nothing was taken in so far
    assert (courses[1] > 0).all()
    assert torch.equal(courses[2], courses[1])
    assert not courses[3].isfinite().all()  # without a scaler nothing leaves the step out, so nothing is hidden


def test_a_site_scores_the_mean_over_its_triplets() -> None:
    scores = {"a": torch.tensor([1.0, 2.0, 6.0]), "without": torch.zeros(0), "b": torch.tensor([0.5])}
    assert mean_per_triplet(scores) == {"a": 3.0, "b": 0.5}
    assert mean_per_triplet({}) == {}


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_stable_rank_of_the_frozen_weight_decides_without_gradients(tiny_vit, wrapped) -> None:
    plain, model = tiny_vit(), tiny_vit()
    with torch.no_grad():
        for vit in (plain, model):
            vit.blocks[1].mlp.fc2.weight.zero_()
    settings = config(total_rank_budget=6, budget_schedule="constant", importance_metric="stable_rank", warmup_steps=1)
    if wrapped:
        peft = pytest.importorskip("peft")
        targets = r".*blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
        model = peft.get_peft_model(model, peft.LoraConfig(r=1, lora_alpha=2, target_modules=targets))
        settings = settings.model_copy(update={"total_rank_budget": 9, "minimum_rank": 1})
    controller = AdaLoRAController(model, settings, 4)
    scores = controller.update_importance_scores(model, 1)  # of sites without rank, too
    assert scores.keys() == {site.name for site in controller.sites}
    for site in controller.sites:
        rows = {"query": slice(0, 64), "key": slice(64, 128), "value": slice(128, 192)}.get(site.matrix, slice(None))
        module = {"out": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}.get(site.matrix, "attn.qkv")
        weight = plain.get_submodule(f"blocks.{site.block}.{module}").weight[rows].detach().double().numpy()
        singular = np.linalg.svd(weight, compute_uv=False)
        expected = (singular**2).sum() / singular[0] ** 2 if singular[0] else 0.0
        assert scores[site.name] == pytest.approx(expected, rel=1e-4)
    ranks = controller.reallocate_ranks(scores, 1)
    assert ranks["blocks.1.mlp.fc2"] == wrapped  # the least that it may have
