"""Temporary triplets that feel a site's gradient without changing its update."""

from __future__ import annotations

import torch
from torch import Tensor


class GradientProbe:
    """Triplets p_i lambda_i q_i of random unit vectors p_i, q_i at lambda_i = 0; only lambda has a gradient.

    With G = dL/dW of the site, dL/dlambda_i = p_i^T G q_i. The directions are uniform on the spheres, so its square
    has the expectation ||G||_F^2 / (in * out): the root mean square over the triplets estimates the size of an element
    of G, whatever the adapter's rank. Where an update is constant on groups of inputs, q_i is too, and G is the
    gradient summed over each group: what an adapter there can follow.

    A probe is no module and no parameter: no optimiser holds it, no state dict saves it, nothing counts it as trained.

    Args:
        in_features: inputs of the site's weight, or the groups of them on which its update is constant.
        out_features: outputs of the site's weight.
        count: number of triplets.
        generator: source of the directions.
        device: of the site's adapter.
    """

    def __init__(
        self, in_features: int, out_features: int, count: int, *, generator: torch.Generator, device: torch.device
    ) -> None:
        left = torch.randn(out_features, count, generator=generator)
        right = torch.randn(count, in_features, generator=generator)
        self._left = (left / left.norm(dim=0)).to(device)  # (out, count)
        self._right = (right / right.norm(dim=1, keepdim=True)).to(device)  # (count, in / pool)
        self.lambdas = torch.zeros(count, device=device, requires_grad=True)

    @property
    def values(self) -> int:
        """Return how many numbers it holds."""
        return self._left.numel() + self._right.numel() + self.lambdas.numel()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return left (out, count), zero with a gradient, and right (count, in / pool)."""
        return self._left * self.lambdas, self._right

    def gradient(self) -> Tensor | None:
        """Return the root mean square of dL/dlambda, a scalar; None before backward."""
        gradient = self.lambdas.grad
        return None if gradient is None else gradient.square().mean().sqrt()
