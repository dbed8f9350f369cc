"""Scores of triplets, in one place. A site's score is the mean over its triplets.

With triplet i of a site, its parameters w (row i of A, column i of B, and lambda_i in the svd form) and their task
gradients g = dL/dw, the score after each backward pass is

    magnitude      scale gain |lambda_i| ||P_i|| ||Q_i||, or scale ||b_i|| ||a_i||: the Frobenius norm of the triplet's
                   update; sites that PEFT made may have scales of their own
    gradient_norm  smoothed ||g||_2 over the triplet's parameters; here and under fisher A counts at LoRA's own size and
                   B at the inverse, whatever the rank has made of them (`SiteAdapter.start_size`)
    fisher         smoothed ||g||_2^2: trace of the diagonal minibatch empirical Fisher, of the mean gradient of a
                   batch (Kunstner et al. 2019, arXiv 1905.12558, on why it is not the Fisher)
    sensitivity    AdaLoRA (arXiv 2303.10512, eqs. 8 to 11): I = |w g|, smoothed to I_bar with beta1; uncertainty
                   U_bar smooths |I - I_bar| with beta2; s = I_bar U_bar; the triplet's score is
                   s(lambda_i) + mean s(P_i) + mean s(Q_i), without the first term in the product form
    random         uniform noise from the run's seed: a control
    uniform        1: a control

Metrics of the frozen weight (`SCORES_OF_WEIGHTS`) score a site once, and each of its triplets alike.

Smoothing is v <- beta v + (1 - beta) new, from v = 0, with beta1. New triplets start from 0 as at the beginning.

A site at rank 0 has no triplet that could be scored, and |w dL/dw| of a triplet that changes nothing is 0 whatever the
site is worth. What can be measured is the gradient that its weight would receive: an `adapters.GradientProbe`,
temporary triplets in one step, estimates g, the root mean square over the elements of dL/dW. It is turned into the
metric's units by the sites that have both:

    score_s = g_s^k * median over sites t with measured triplets of (score_t / g_t^k)

with k the power of the gradient that the metric holds: 2 for `fisher` and `sensitivity` (a product of two smoothed
|w dL/dw|), else 1. So a site without rank scores as a middling one with rank would whose gradient is as large. The
median, since a mean would credit all others with what a few sites have learned whose weights have grown along the
gradient. The ratio does not depend on the loss's scale. All sites are probed, for g_t must come from the same batch and
be as noisy.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.linalg import matrix_norm
from torch.nn import functional as F

from peft_vit.base.errors import UserError
from peft_vit.base.seeding import torch_generator
from peft_vit.core.adapters import AdaptedLinear, Adapter, GradientProbe, SiteAdapter, adapted_modules
from peft_vit.core.adapters.low_rank import TRIPLETS
from peft_vit.core.adapters.peft_layers import peft_layers, sites_of_layers
from peft_vit.core.config import METRICS, Metric

PROBE_TRIPLETS = 4  # the estimate of a squared norm from n random directions has a relative error of sqrt(2 / n)


class _Part(NamedTuple):
    """One parameter of a site."""

    site: str
    name: str
    weight: Tensor  # A (r, in), B (out, r), lambda (r,)
    gradient: Tensor | None
    dim: int | None  # over a triplet's values; None: it has one
    size: float  # of the parameter over LoRA's own, as the site's rank sets it

    @property
    def values(self) -> int:
        return 1 if self.dim is None else self.weight.shape[self.dim]


class ImportanceTracker:
    """Keeps the smoothed quantities of every triplet.

    All sites go through an operation together (`torch._foreach_*`, as in torch.optim), and smoothing is in place: a
    site has two or three small parameters, and one by one the calls would cost more than the arithmetic.

    Args:
        metric: what is scored.
        sensitivity_beta: beta1.
        uncertainty_beta: beta2.
        generator: for `random`.
        of_sites: scores from `weight_scores`.
    """

    def __init__(
        self,
        metric: Metric,
        *,
        sensitivity_beta: float,
        uncertainty_beta: float,
        generator: torch.Generator,
        of_sites: Mapping[str, float] | None = None,
    ) -> None:
        self.metric = metric
        self.beta1 = sensitivity_beta
        self.beta2 = uncertainty_beta
        self.generator = generator
        self.of_sites = of_sites or {}
        self._state: dict[tuple[str, str], Tensor] = {}  # by site and quantity, see state_dict

    @torch.no_grad()
    def update(self, adapters: Mapping[str, Adapter], loss_scale: float = 1.0) -> dict[str, Tensor]:
        """Take in the present gradients and return the score of each triplet, (rank,) by site.

        Args:
            adapters: of the sites to score, with their gradients.
            loss_scale: factor on the loss whose gradients these are, e.g. `torch.amp.GradScaler.get_scale()`. If it
                is not 1, gradients that overflowed are left out, as the scaler leaves out their step, and the scores
                are those before.

        Raises:
            UserError: if the metric needs gradients and a site has none (called before backward, or after zero_grad),
                or if the loss scale is not a positive number.
        """
        if not (math.isfinite(loss_scale) and loss_scale > 0):
            raise UserError(f"expected a positive number, got {loss_scale}", field="loss_scale")
        sites = adapters.items()
        if self.metric == "uniform" or self.metric in SCORES_OF_WEIGHTS:
            return {name: site.lora_A.new_full((site.rank,), self.of_sites.get(name, 1)) for name, site in sites}
        if self.metric == "random":
            return {
                name: torch.rand(site.rank, generator=self.generator).to(site.lora_A.device) for name, site in sites
            }
        by_gradient = {"gradient_norm": self._size, "fisher": self._size, "sensitivity": self._sensitivity}
        if self.metric not in ("magnitude", *by_gradient):
            raise UserError(f"no formula for {self.metric!r}", field="importance_metric")
        parts = _parts(adapters)
        if self.metric == "magnitude":
            weights = [part.weight for part in parts]
            scores = _by_site(parts, _sums(parts, torch._foreach_mul(weights, weights)), torch.mul)  # (r,) each
            for name, square in scores.items():
                site = adapters[name]
                gain = 1.0 if site.lora_lambda is None else site.lambda_gain
                # Each value of A stands for a pool of equal columns.
                square.sqrt_().mul_(abs(site.scale * gain) * math.sqrt(site.pool))
        elif parts:
            gradients, overflowed = _gradients(parts), False
            if loss_scale != 1:
                overflowed = not all(bool(norm.isfinite()) for norm in torch._foreach_norm(gradients))
                gradients = list(torch._foreach_div(gradients, loss_scale))
            scores = by_gradient[self.metric](parts, None if overflowed else gradients)
        else:
            scores = {}
        return {name: scores[name] if site.rank else site.lora_A.new_zeros(0) for name, site in sites}

    def _size(self, parts: Sequence[_Part], gradients: list[Tensor] | None) -> dict[str, Tensor]:
        """Score by the gradient's norm, or its square."""
        columns = {part.site: part.weight[:, 0] for part in parts if part.name == "lora_A"}  # (r,) each
        smoothed = self._smoothed([(site, self.metric) for site in columns], list(columns.values()))
        if gradients is not None:
            # At LoRA's own size of A: a site's rank must not decide what its triplets score.
            sums = _sums(parts, torch._foreach_mul(gradients, gradients))
            torch._foreach_mul_(sums, [part.size**2 for part in parts])
            sizes = list(_by_site(parts, sums, torch.add).values())  # (r,) each
            if self.metric == "gradient_norm":
                torch._foreach_sqrt_(sizes)
            torch._foreach_lerp_(smoothed, sizes, 1 - self.beta1)
        return dict(zip(columns, (value.clone() for value in smoothed), strict=True))

    def _sensitivity(self, parts: Sequence[_Part], gradients: list[Tensor] | None) -> dict[str, Tensor]:
        weights = [part.weight for part in parts]
        smooth = self._smoothed([(part.site, f"{part.name}.sensitivity") for part in parts], weights)
        uncertainty = self._smoothed([(part.site, f"{part.name}.uncertainty") for part in parts], weights)
        if gradients is not None:
            new = torch._foreach_mul(weights, gradients)
            torch._foreach_abs_(new)  # I
            torch._foreach_lerp_(smooth, new, 1 - self.beta1)
            torch._foreach_sub_(new, smooth)
            torch._foreach_abs_(new)  # |I - I_bar|
            torch._foreach_lerp_(uncertainty, new, 1 - self.beta2)
        means = _sums(parts, torch._foreach_mul(smooth, uncertainty))  # (r,) each
        torch._foreach_div_(means, [part.values for part in parts])
        return _by_site(parts, means, torch.add)

    def _smoothed(self, keys: list[tuple[str, str]], like: list[Tensor]) -> list[Tensor]:
        """Return smoothed quantities, to be changed in place; zeros for new keys."""
        for key, tensor in zip(keys, like, strict=True):
            if key not in self._state:
                self._state[key] = torch.zeros_like(tensor)
        return [self._state[key] for key in keys]

    def follow(self, kept: Mapping[str, Tensor], ranks: Mapping[str, int]) -> None:
        """Carry the state through a change of rank: kept triplets keep theirs, new ones start from 0."""
        for (site, quantity), value in self._state.items():
            if site in kept:
                of_A = quantity.startswith("lora_A")  # (r, in); others have the triplets last: (out, r), (r,)
                chosen = value.index_select(0 if of_A else -1, kept[site].to(value.device))
                grown = ranks[site] - len(kept[site])
                self._state[site, quantity] = F.pad(chosen, (0, 0, 0, grown) if of_A else (0, grown))

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the generator's state and the smoothed quantities, by names that safetensors can store."""
        smoothed = {f"smoothed/{site}/{quantity}": value.clone() for (site, quantity), value in self._state.items()}
        return {"generator": self.generator.get_state(), **smoothed}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a copy of such a state."""
        self.generator.set_state(state["generator"])
        self._state = {}
        for name, value in state.items():
            if name.startswith("smoothed/"):
                _, site, quantity = name.split("/")
                self._state[site, quantity] = value.clone()

    def move_to(self, device: torch.device) -> None:
        """Bring the smoothed quantities to the adapters' device: a loaded state may lie elsewhere."""
        self._state = {key: value.to(device) for key, value in self._state.items()}


def _stable_rank(weight: Tensor) -> float:
    """Return ||W||_F^2 / ||W||_2^2, between 1 and the rank (Rudelson and Vershynin, arXiv math/0503442); 0 of zeros."""
    largest = float(matrix_norm(weight, 2))
    return float(matrix_norm(weight)) ** 2 / largest**2 if largest else 0.0


SCORES_OF_WEIGHTS: dict[str, Callable[[Tensor], float]] = {"stable_rank": _stable_rank}  # of a frozen weight (out, in)


@torch.no_grad()
def weight_scores(model: nn.Module, metric: Metric) -> dict[str, float]:
    """Return the score of each adapted site from its frozen weight, nothing under a metric that scores triplets."""
    score = SCORES_OF_WEIGHTS.get(metric)
    if score is None:
        return {}
    layers = [(site, module) for _, module in adapted_modules(model) for site, _ in module.adapters()]
    layers += [(site, peft_layers(model)[name].base_layer) for name, site in sites_of_layers(model).items()]
    weights = {
        site.name: (module.frozen_weight() if isinstance(module, AdaptedLinear) else module.weight)[site.span]
        for site, module in layers
    }
    return {name: score(weight.float()) for name, weight in weights.items()}


def mean_per_triplet(triplet_scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the score of each site that has triplets, from theirs (rank,), with one transfer from the device."""
    present = {name: values for name, values in triplet_scores.items() if values.shape[0]}
    if not present:
        return {}
    # (rank,) each -> (ranks of all,); some devices have no float64.
    flat = torch.cat(list(present.values())).cpu().double().numpy()
    counts = np.array([values.shape[0] for values in present.values()])  # len() of a tensor is slow
    means = np.add.reduceat(flat, np.cumsum(counts) - counts) / counts  # (ranks of all,) -> (sites,)
    return dict(zip(present, means.tolist(), strict=True))


def _parts(adapters: Mapping[str, Adapter]) -> list[_Part]:
    parts = []
    for site, adapter in adapters.items():
        rank = adapter.rank
        if rank == 0:
            continue
        size = adapter.start_size(rank)
        for name, dim, part_size in zip(TRIPLETS, (1, 0, None), (size, 1 / size, 1.0), strict=True):
            weight: Tensor | None = getattr(adapter, name)
            if weight is not None:
                parts.append(_Part(site, name, weight.float(), weight.grad, dim, part_size))
    return parts


def _gradients(parts: Sequence[_Part]) -> list[Tensor]:
    gradients = []
    for part in parts:
        if part.gradient is None:
            raise UserError(
                f"{part.name} has no gradient; call update_importance_scores after backward and before zero_grad",
                field=part.site,
            )
        gradients.append(part.gradient.float())  # A (r, in / pool), B (out, r), lambda (r,)
    return gradients


def _sums(parts: Sequence[_Part], values: Sequence[Tensor]) -> list[Tensor]:
    """Add up each triplet's values within each part, (r,) each."""
    return [value if part.dim is None else value.sum(part.dim) for part, value in zip(parts, values, strict=True)]


def _by_site(
    parts: Sequence[_Part], values: Sequence[Tensor], combine: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Combine the parts' values, (r,) each, into one (r,) a site."""
    total: dict[str, Tensor] = {}
    for part, value in zip(parts, values, strict=True):
        total[part.site] = combine(total[part.site], value) if part.site in total else value
    return total


def attach_probes(adapters: Mapping[str, Adapter], *, seed: int, step: int) -> None:
    """Put temporary triplets on every site for the forward and backward pass of one step.

    Their directions follow from seed and step alone, so that a resumed run draws the same. A model that PEFT has
    wrapped gets none.
    """
    generator = torch_generator(seed, "probe", step)
    for adapter in adapters.values():
        if isinstance(adapter, SiteAdapter):
            adapter.probe = GradientProbe(
                adapter.in_features // adapter.pool,
                adapter.out_features,
                PROBE_TRIPLETS,
                generator=generator,
                device=adapter.lora_A.device,
            )


def take_probes(adapters: Mapping[str, Adapter]) -> tuple[dict[str, float], int]:
    """Remove the probes.

    Returns:
        The size of the gradient g by site, of those that a backward pass has reached, and the temporary values held.
        Nothing if a gradient is not finite: a loss scale was too large then, or the training diverges.
    """
    gradients, values = {}, 0
    for name, adapter in adapters.items():
        if adapter.probe is None:
            continue
        gradient = adapter.probe.gradient()
        if gradient is not None:
            gradients[name] = gradient
            values += adapter.probe.values
        adapter.probe = None
    sizes = torch.stack(list(gradients.values())).tolist() if gradients else []  # () each -> (sites,)
    if not all(math.isfinite(size) for size in sizes):
        return {}, 0
    return dict(zip(gradients, sizes, strict=True)), values


def probed_scores(
    metric: Metric, gradients: Mapping[str, float], measured: Mapping[str, float], rankless: Iterable[str]
) -> dict[str, float]:
    """Return the scores of sites without rank by the formula above.

    Args:
        metric: what is scored.
        gradients: g of every site, from `take_probes`.
        measured: scores of sites from their own triplets in the same backward pass.
        rankless: sites without rank. They get no score if no measured site has a gradient to set theirs in relation to.
    """
    power = METRICS[metric].probe_power
    assert power is not None
    sizes = {name: size**power for name, size in gradients.items()}
    ratios = [score / sizes[name] for name, score in measured.items() if sizes.get(name)]
    if not ratios:
        return {}
    ratio = statistics.median(ratios)
    return {name: sizes[name] * ratio for name in rankless if name in sizes}
