"""Scores of triplets, in one place. A site's score is the mean over its triplets.

With triplet i of a site, its parameters w (row i of A, column i of B, and lambda_i in the svd form) and their task
gradients g = dL/dw, the score after each backward pass is

    magnitude      |lambda_i| ||P_i|| ||Q_i||, or ||b_i|| ||a_i||: the Frobenius norm of the triplet's update,
                   without the scale, which all sites share
    gradient_norm  smoothed ||g||_2 over the triplet's parameters
    fisher         smoothed ||g||_2^2: trace of the diagonal minibatch empirical Fisher (Kunstner et al. 2019,
                   arXiv 1905.12558, on why it is not the Fisher), of the mean gradient of a batch
    sensitivity    AdaLoRA (arXiv 2303.10512, eqs. 8 to 11): I = |w g|, smoothed to I_bar with beta1; uncertainty
                   U_bar smooths |I - I_bar| with beta2; s = I_bar U_bar; the triplet's score is
                   s(lambda_i) + mean s(P_i) + mean s(Q_i), without the first term in the product form
    random         uniform noise from the run's seed: a control
    uniform        1: a control

Smoothing is v <- beta v + (1 - beta) new, from v = 0, with beta1. New triplets start from 0 as at the beginning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peft_vit.adapters import SiteAdapter
from peft_vit.config import Metric
from peft_vit.errors import UserError

_DIMS = {"lora_A": 0, "lora_B": 1, "lora_lambda": 0}  # the dimension that counts triplets


def _by_triplet(adapter: SiteAdapter) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return each parameter and its gradient as (rank, values of one triplet)."""
    views = {}
    for name, dim in _DIMS.items():
        parameter = getattr(adapter, name)
        if parameter is None:
            continue
        gradient = parameter.grad
        weight = parameter.detach().movedim(dim, 0).reshape(adapter.rank, -1)  # (r, n)
        views[name] = (weight, None if gradient is None else gradient.movedim(dim, 0).reshape(adapter.rank, -1))
    return views


class ImportanceTracker:
    """Keeps the smoothed quantities of every triplet.

    Args:
        metric: what is scored.
        sensitivity_beta: beta1.
        uncertainty_beta: beta2.
        generator: for `random`.
    """

    def __init__(
        self, metric: Metric, *, sensitivity_beta: float, uncertainty_beta: float, generator: torch.Generator
    ) -> None:
        self.metric = metric
        self.beta1 = sensitivity_beta
        self.beta2 = uncertainty_beta
        self.generator = generator
        self._state: dict[str, dict[str, Tensor]] = {}  # site -> quantity -> (r, ...)

    @torch.no_grad()
    def update(self, adapters: Mapping[str, SiteAdapter], loss_scale: float = 1.0) -> dict[str, Tensor]:
        """Take in the present gradients and return the score of each triplet, (rank,) by site.

        Args:
            adapters: of the sites to score, with their gradients.
            loss_scale: factor on the loss whose gradients these are, e.g. `torch.amp.GradScaler.get_scale()`.

        Raises:
            UserError: if the metric needs gradients and a site has none (called before backward, or after zero_grad),
                or if the loss scale is not a positive number.
        """
        if not (math.isfinite(loss_scale) and loss_scale > 0):
            raise UserError(f"expected a positive number, got {loss_scale}", field="loss_scale")
        return {name: self._update_site(name, adapter, loss_scale) for name, adapter in adapters.items()}

    def _update_site(self, name: str, adapter: SiteAdapter, loss_scale: float) -> Tensor:
        device = adapter.lora_A.device
        if self.metric == "uniform" or adapter.rank == 0:
            return torch.ones(adapter.rank, device=device)
        if self.metric == "random":
            return torch.rand(adapter.rank, generator=self.generator).to(device)
        views = _by_triplet(adapter)
        if self.metric == "magnitude":
            product = torch.ones(adapter.rank, device=device)
            for weight, _ in views.values():
                product *= weight.norm(dim=1)
            return product
        missing = next((key for key, (_, gradient) in views.items() if gradient is None), None)
        if missing is not None:
            raise UserError(
                f"{missing} has no gradient; call update_importance_scores after backward and before zero_grad",
                field=name,
            )
        gradients = {
            key: (weight, gradient / loss_scale) for key, (weight, gradient) in views.items() if gradient is not None
        }
        if self.metric == "sensitivity":
            return self._sensitivity(name, gradients)
        squared = torch.stack([g.float().square().sum(1) for _, g in gradients.values()]).sum(0)  # (r,)
        return self._smooth(name, self.metric, squared if self.metric == "fisher" else squared.sqrt(), self.beta1)

    def _sensitivity(self, name: str, gradients: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        total: Tensor | None = None
        for key, (weight, gradient) in gradients.items():
            raw = (weight * gradient).abs()
            smooth = self._smooth(name, f"{key}.sensitivity", raw, self.beta1)
            uncertainty = self._smooth(name, f"{key}.uncertainty", (raw - smooth).abs(), self.beta2)
            part = (smooth * uncertainty).mean(1)  # of one element for lambda
            total = part if total is None else total + part
        assert total is not None
        return total

    def _smooth(self, site: str, quantity: str, value: Tensor, beta: float) -> Tensor:
        state = self._state.setdefault(site, {})
        state[quantity] = beta * state.get(quantity, torch.zeros_like(value)) + (1 - beta) * value
        return state[quantity]

    def follow(self, kept: Mapping[str, Tensor], ranks: Mapping[str, int]) -> None:
        """Carry the state through a change of rank: kept triplets keep theirs, new ones start from 0."""
        for site, keep in kept.items():
            for quantity, value in self._state.get(site, {}).items():
                chosen = value.index_select(0, keep.to(value.device))
                fresh = value.new_zeros(ranks[site] - len(keep), *value.shape[1:])
                self._state[site][quantity] = torch.cat([chosen, fresh])

    def state_dict(self) -> dict[str, Any]:
        """Return the smoothed quantities by site."""
        return {site: dict(values) for site, values in self._state.items()}
