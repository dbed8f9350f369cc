"""Steps after changes of rank equal float64 NumPy written from the papers: moments follow their triplets."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from peft_vit.core.adapters import attach_adapters, current_ranks, resize_adapters, site_adapters
from peft_vit.core.backbones import find_sites

pytestmark = pytest.mark.part("controller")

RATE, DECAY, CLIP, STEPS = 1e-2, 0.1, 0.5, 12
DIMS = {"lora_A": 0, "lora_B": 1, "lora_lambda": 0}
CHANGES = {3: 3, 6: -4, 8: 1, 10: -2}  # after this step, so many ranks more or less at each site
OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {}),
    "adamw, for each": (torch.optim.AdamW, {"foreach": True}),
    "adamw, fused": (torch.optim.AdamW, {"fused": True}),
    "adamw, large epsilon": (torch.optim.AdamW, {"eps": 1e-3, "betas": (0.8, 0.9)}),
    "adamw, amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "adamw, maximize": (torch.optim.AdamW, {"maximize": True}),
    "adam": (torch.optim.Adam, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
}


def rows(tensor, dim) -> np.ndarray:
    """Return a tensor as (triplets, values of one)."""
    return tensor.detach().double().numpy().swapaxes(0, dim).reshape(tensor.shape[dim], -1).copy()


class Adam:
    """arXiv 1412.6980, algorithm 1; decoupled decay as in arXiv 1711.05101, algorithm 2; torch counts its steps."""

    def __init__(self, start, *, decoupled, betas=(0.9, 0.999), eps=1e-8, amsgrad=False, maximize=False) -> None:
        self.w = start
        self.t = 0
        self.m, self.v, self.top = (np.zeros_like(start) for _ in range(3))
        self.betas, self.eps, self.decoupled = betas, eps, decoupled
        self.amsgrad, self.sign = amsgrad, -1 if maximize else 1

    def step(self, gradient, rate) -> None:
        gradient = self.sign * gradient
        if self.decoupled:
            self.w = self.w - rate * DECAY * self.w
        else:
            gradient = gradient + DECAY * self.w
        (b1, b2), self.t = self.betas, self.t + 1
        self.m = b1 * self.m + (1 - b1) * gradient
        self.v = b2 * self.v + (1 - b2) * gradient**2
        self.top = np.maximum(self.top, self.v)
        m_hat = self.m / (1 - b1**self.t)
        v_hat = (self.top if self.amsgrad else self.v) / (1 - b2**self.t)
        self.w = self.w - rate * m_hat / (np.sqrt(v_hat) + self.eps)

    def resize(self, kept, fresh) -> None:
        zeros = np.zeros_like(fresh)
        self.m, self.v, self.top = (np.concatenate([x[kept], zeros]) for x in (self.m, self.v, self.top))
        self.w = np.concatenate([self.w[kept], fresh])


class Momentum:
    """Gradient descent with momentum: velocity 0 at birth, u <- 0.9 u + g + decay w, w <- w - rate u."""

    def __init__(self, start) -> None:
        self.w, self.u = start, np.zeros_like(start)

    def step(self, gradient, rate) -> None:
        self.u = 0.9 * self.u + gradient + DECAY * self.w
        self.w = self.w - rate * self.u

    def resize(self, kept, fresh) -> None:
        self.u = np.concatenate([self.u[kept], np.zeros_like(fresh)])
        self.w = np.concatenate([self.w[kept], fresh])


def one_cycle(step) -> float:
    """Return the rate of a step, from 0: cosine from 1/25 of the peak over 30 % of the steps, then to 1/250,000."""
    top, last = 0.3 * STEPS - 1, STEPS - 1
    low, high, part = (RATE / 25, RATE, step / top) if step <= top else (RATE, RATE / 25e4, (step - top) / (last - top))
    return high + (low - high) * (1 + math.cos(math.pi * part)) / 2


def parameters_of(model):
    """Yield (name, parameter, dimension of its triplets); the head's rows stand for triplets."""
    for site, adapter in site_adapters(model).items():
        for name, parameter in adapter.named_parameters():
            yield f"{site}.{name}", parameter, DIMS[name]
    for name, parameter in model.head.named_parameters():
        yield f"head.{name}", parameter, 0


def largest_deviation(model, optimizer, batch, reference_of) -> float:
    """Train with changes of rank and a round trip of the state; compare every weight after every step."""
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, cycle_momentum=False)
    references = {name: reference_of(rows(p, dim)) for name, p, dim in parameters_of(model)}
    generator = np.random.default_rng(0)
    worst = 0.0
    for step in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        gradients = {name: rows(p.grad, dim) for name, p, dim in parameters_of(model)}
        norm = math.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], CLIP)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(one_cycle(step))
        optimizer.step()
        scheduler.step()
        for name, parameter, dim in parameters_of(model):
            references[name].step(gradients[name] * min(1, CLIP / (norm + 1e-6)), one_cycle(step))
            worst = max(worst, np.abs(rows(parameter, dim) - references[name].w).max())
        if step in CHANGES:
            ranks = {site: rank + CHANGES[step] for site, rank in current_ranks(model).items()}
            scores = {site: torch.tensor(generator.random(rank)) for site, rank in current_ranks(model).items()}
            kept = resize_adapters(model, optimizer, ranks, scores)
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for name, parameter, dim in parameters_of(model):
                if name.startswith("blocks."):
                    chosen = kept[name.rpartition(".")[0]]
                    references[name].resize(chosen.numpy(), rows(parameter, dim)[len(chosen) :])
    return worst


def adapted(tiny_vit, fill_adapters, parametrization):
    model = tiny_vit()
    attach_adapters(model, find_sites(model), 4, scale=2.0, seed=0, parametrization=parametrization)
    fill_adapters(model)
    return model


@pytest.mark.parametrize("parametrization", ["product", "svd"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_optimizer_follows_every_triplet(tiny_vit, batch, fill_adapters, kind, parametrization) -> None:
    model = adapted(tiny_vit, fill_adapters, parametrization)
    (make, options), reference = OPTIMIZERS[kind], Momentum
    optimizer = make([p for p in model.parameters() if p.requires_grad], RATE, weight_decay=DECAY, **options)
    if make is not torch.optim.SGD:
        given = {key: value for key, value in options.items() if key not in ("foreach", "fused")}
        reference = partial(Adam, decoupled=make is torch.optim.AdamW, **given)
    assert largest_deviation(model, optimizer, batch, reference) < RATE / 1000
