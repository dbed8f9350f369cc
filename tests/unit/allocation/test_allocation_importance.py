"""Scores of triplets against float64 NumPy written from the formulas."""

import numpy as np
import pytest
import torch

from peft_vit.adapters import SiteAdapter
from peft_vit.allocation import ImportanceTracker
from peft_vit.errors import UserError

pytestmark = pytest.mark.part("importance analysis")
BETA1, BETA2, RANK = 0.85, 0.7, 3


def site(parametrization: str, seed: int = 0, rank: int = RANK) -> SiteAdapter:
    generator = torch.Generator().manual_seed(seed)
    adapter = SiteAdapter(6, 5, rank, scale=2.0, generator=generator, parametrization=parametrization)
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
        values = [get(p.detach().double().numpy()) for get, p in named]
        gradients = [get(p.grad.double().numpy()) if p.grad is not None else None for get, p in named]
        result.append((values, gradients))
    return result


@pytest.mark.parametrize("parametrization", ["product", "svd"])
def test_magnitude(parametrization) -> None:
    adapter = site(parametrization)
    scores = tracker("magnitude").update({"a": adapter})["a"]
    expected = [np.prod([np.linalg.norm(value) for value in values]) for values, _ in by_triplet(adapter)]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    # Which is the Frobenius norm of what the triplet adds, without the scale.
    for i, (left, right) in enumerate(zip(adapter.factors()[0].T, adapter.factors()[1], strict=True)):
        assert scores[i].item() == pytest.approx((torch.outer(left, right).norm() / 2.0).item(), rel=1e-5)


@pytest.mark.parametrize("parametrization", ["product", "svd"])
@pytest.mark.parametrize(("metric", "power"), [("gradient_norm", 1), ("fisher", 2)])
def test_smoothed_gradient_scores(parametrization, metric, power) -> None:
    adapter, scorer = site(parametrization), tracker(metric)
    smooth = np.zeros(RANK)
    for step in range(3):
        set_gradients(adapter, step)
        scores = scorer.update({"a": adapter})["a"]
        norms = [np.sqrt(sum((g**2).sum() for g in gradients)) for _, gradients in by_triplet(adapter)]
        smooth = BETA1 * smooth + (1 - BETA1) * np.array(norms) ** power
        np.testing.assert_allclose(scores, smooth, rtol=1e-5)


@pytest.mark.parametrize("parametrization", ["product", "svd"])
def test_sensitivity_over_three_steps(parametrization) -> None:
    adapter, scorer = site(parametrization), tracker("sensitivity")
    smooth = uncertain = None
    for step in range(3):
        set_gradients(adapter, step)
        scores = scorer.update({"a": adapter})["a"]
        raw = [[np.abs(w * g) for w, g in zip(*triplet, strict=True)] for triplet in by_triplet(adapter)]
        smooth = smooth or [[0 * part for part in triplet] for triplet in raw]
        uncertain = uncertain or [[0 * part for part in triplet] for triplet in raw]
        expected = []
        for i, triplet in enumerate(raw):
            for j, part in enumerate(triplet):
                smooth[i][j] = BETA1 * smooth[i][j] + (1 - BETA1) * part
                uncertain[i][j] = BETA2 * uncertain[i][j] + (1 - BETA2) * np.abs(part - smooth[i][j])
            expected.append(sum((s * u).mean() for s, u in zip(smooth[i], uncertain[i], strict=True)))
        np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_controls() -> None:
    adapters = {"a": site("product"), "b": site("product", 1)}
    assert all(torch.equal(scores, torch.ones(RANK)) for scores in tracker("uniform").update(adapters).values())
    first, again, other = (tracker("random", seed).update(adapters) for seed in (4, 4, 5))
    assert torch.equal(first["a"], again["a"])
    assert torch.equal(first["b"], again["b"])
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], other["a"])


@pytest.mark.parametrize("metric", ["gradient_norm", "fisher", "sensitivity"])
def test_without_gradients_it_says_when_to_call(metric) -> None:
    with pytest.raises(
        UserError, match=r"^blocks\.0: lora_A has no gradient; call update_importance_scores after backward"
    ):
        tracker(metric).update({"blocks.0": site("svd")})
    assert len(tracker(metric).update({"blocks.0": site("svd", rank=0)})["blocks.0"]) == 0


@pytest.mark.parametrize(
    ("metric", "power"), [("magnitude", 0), ("gradient_norm", 1), ("fisher", 2), ("sensitivity", 2)]
)
def test_a_factor_on_the_loss_is_a_power_in_the_scores(metric, power) -> None:
    adapter = site("svd")
    results = []
    for factor in (1.0, 8.0):
        scorer = tracker(metric)
        for step in range(2):
            set_gradients(adapter, step, factor)
            scores = scorer.update({"a": adapter})["a"]
        results.append(scores)
    torch.testing.assert_close(results[1], 8.0**power * results[0])


def test_state_follows_its_triplets() -> None:
    adapter, scorer = site("product"), tracker("gradient_norm")
    set_gradients(adapter, 0)
    before = scorer.update({"a": adapter})["a"]
    scorer.follow({"a": torch.tensor([0, 2])}, {"a": 3})
    state = scorer.state_dict()["a"]["gradient_norm"]
    torch.testing.assert_close(state, torch.stack([before[0], before[2], torch.tensor(0.0)]))
