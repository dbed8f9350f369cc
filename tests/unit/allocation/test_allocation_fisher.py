"""Minibatch and per-sample empirical Fisher against gradients of the plain model's whole weights, in float64."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from peft_vit.adapters import attach_adapters, merged_state_dict, site_adapters
from peft_vit.allocation import check_fisher
from peft_vit.backbones import find_sites
from peft_vit.errors import UserError

pytestmark = pytest.mark.part("importance analysis")
WEIGHTS = torch.tensor([0.2, 3.0, 1.0, 0.5, 1.5])


def squares(adapter, gradient: np.ndarray) -> float:
    """Return the mean over triplets of ||dL/d(P_i, lambda_i, Q_i)||^2 from G = dL/dW: dW = scale P diag(lambda) Q."""
    P, Q = (t.detach().double().numpy() for t in (adapter.lora_B, adapter.lora_A))
    svd = adapter.lora_lambda is not None
    factor = adapter.lora_lambda.detach().double().numpy() if svd else np.ones(adapter.rank)
    left, right = gradient @ Q.T, P.T @ gradient  # (out, r), (r, in)
    total = ((left * factor) ** 2).sum(0) + ((right * factor[:, None]) ** 2).sum(1)
    if svd:
        total += (left * P).sum(0) ** 2
    return float((adapter.scale**2 * total).mean())


def expected(model, plain, images, labels, weights) -> tuple[dict[str, float], dict[str, float]]:
    """Return the values by site from one backward pass a sample through a plain timm model."""
    plain.load_state_dict(merged_state_dict(model))
    plain.double()
    sites, adapters = find_sites(plain), site_adapters(model)
    share = torch.ones(len(labels)) if weights is None else weights[labels]
    by_sample: dict[str, list[np.ndarray]] = {site.name: [] for site in sites}
    for image, label, factor in zip(images.double(), labels, share, strict=True):
        plain.zero_grad()
        (factor.double() * F.cross_entropy(plain(image[None]), label[None])).backward()
        for site in sites:
            gradient = plain.get_submodule(site.module).weight.grad[slice(*site.rows)]
            by_sample[site.name].append(gradient.numpy().copy())
    return tuple(
        {name: reduce(adapters[name], one) for name, one in by_sample.items() if adapters[name].rank}
        for reduce in (
            lambda adapter, one: squares(adapter, np.mean(one, axis=0)),
            lambda adapter, one: float(np.mean([squares(adapter, gradient) for gradient in one])),
        )
    )


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "class weights"])
@pytest.mark.parametrize("parametrization", ["product", "svd"])
def test_both_kinds_of_fisher(tiny_vit, batch, fill_adapters, parametrization, weights) -> None:
    model, (images, labels) = tiny_vit(), batch
    sites = find_sites(model)
    ranks = {site.name: index % 4 for index, site in enumerate(sites)}  # some have none
    attach_adapters(model, sites, ranks, scale=2.0, seed=0, parametrization=parametrization)
    fill_adapters(model)
    model.train()
    check = check_fisher(model, images, labels, class_weights=weights)
    minibatch, per_sample = expected(model, tiny_vit(), images, labels, weights)
    assert check.images == 6
    assert list(check.minibatch) == list(check.per_sample) == [name for name, rank in ranks.items() if rank]
    assert check.minibatch == pytest.approx(minibatch, rel=1e-3)
    assert check.per_sample == pytest.approx(per_sample, rel=1e-3)
    order = [np.argsort(np.argsort(list(values.values()))) for values in (minibatch, per_sample)]
    n = len(minibatch)
    assert check.rho == pytest.approx(1 - 6 * ((order[0] - order[1]) ** 2).sum() / (n * (n**2 - 1)))
    assert -1 < check.rho < 1
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_rank_there_is_nothing_to_compare(tiny_vit, batch) -> None:
    model = tiny_vit(depth=1)
    attach_adapters(model, find_sites(model), 0, scale=2.0, seed=0)
    with pytest.raises(UserError, match="no site has rank"):
        check_fisher(model, *batch)
