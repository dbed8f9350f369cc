"""One site's low-rank update.

The update of a site with weight W (out, in) is, with a scale that does not move when the rank r moves:

    product:  dW = scale * B A                 LoRA, arXiv 2106.09685, eq. 3
    svd:      dW = scale * P diag(gain * lambda) Q    AdaLoRA, arXiv 2303.10512, eq. 3, there with gain 1

A step of Adam moves each parameter by about the learning rate, whatever its gradient. From the published start
(lambda = 0, factors N(0, 0.02^2)) such a step of lambda moves dW some 75 times less than a step of B from LoRA's start
does. The gain makes up for it inside the model, so that it acts in any training loop. Under Adam(W) gain k is a
learning rate k times as high for lambda alone, under SGD one k^2 times as high: lambda's gradient is k times as large
too, and that is what a clipping norm and the scores `gradient_norm` and `fisher` see.

Both are stored as ``lora_B`` (out, r) and ``lora_A`` (r, in); svd adds ``lora_lambda`` (r,). On a weight that is
quantized in groups of g inputs the update is constant within a group (QA-LoRA, arXiv 2309.14717, sec. 3.3):
``lora_A`` is (r, in / g) and acts on the inputs summed over each group, dW[o, i] = scale * (B A)[o, i // g].
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from peft_vit.core.quantization.row_rounding import rounded_rows

Parametrization = Literal["product", "svd"]
FactorStart = Literal["normal", "orthonormal"]
TRIPLETS = ("lora_A", "lora_B", "lora_lambda")  # the tensors of a site, as `fresh_triplets` returns them
_SVD_INIT_STD = 0.02  # the official AdaLoRA code and PEFT: N(0, 0.02^2) factors, lambda = 0


class LowRankUpdate:
    """An update of the product form, whichever module holds its factors: A (r, in / pool) and B (out, r)."""

    in_features: int
    out_features: int
    pool: int
    lora_A: nn.Parameter  # noqa: N815 - the field's name
    lora_B: nn.Parameter  # noqa: N815
    lora_lambda: nn.Parameter | None  # of the svd form
    lambda_gain: float
    parametrization: Parametrization
    scale: float
    generator: torch.Generator | None
    reference_rank: float | None = None  # whose steps triplets of any rank make together, see `start_size`

    @property
    def rank(self) -> int:
        """Return the number of triplets that exist now."""
        return self.lora_A.shape[0]

    @property
    def largest_rank(self) -> int:
        """Return the rank above which more triplets can't change the update: min(out, in / pool)."""
        return min(self.out_features, self.in_features // self.pool)

    def start_size(self, rank: int) -> float:
        """Return how large A of the product form is at a rank, over LoRA's own start: reference_rank / rank.

        Adam moves every element of B by about the learning rate, whatever the gradient G, so a step of r triplets goes
        r times as far along G as that of one: <G, d(BA)> = rate * sum_i |G a_i|_1. LoRA (arXiv 2106.09685, sec. 4.1)
        divides its alpha by r for this; here the scale stays, and A carries the factor. A rate that suits LoRA at the
        reference rank then suits a site of rank 2 or 40. Without a reference rank it is 1.
        """
        if self.reference_rank is None or self.parametrization == "svd":
            return 1.0
        return self.reference_rank / max(rank, 1)

    def fresh_triplets(self, count: int, beside: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return A (count, in / pool), B (out, count), lambda (count,) | None of triplets that change nothing yet.

        product: A uniform with bound `start_size` / sqrt(in), B zero; at size 1 as PEFT starts its LoRA. The width is
        the unpooled one, since a sum over g inputs grows by sqrt(g) just as the number of columns shrinks by g.

        Args:
            count: of triplets to make.
            beside: triplets that the site holds already and keeps.
        """
        bound = self.start_size(count + beside) / math.sqrt(self.in_features)
        lora_A = (torch.rand(count, self.in_features // self.pool, generator=self.generator) * 2 - 1) * bound
        return lora_A, torch.zeros(self.out_features, count), None

    def exact_factors(self) -> tuple[Tensor, Tensor]:
        """Return left (out, r), scale included, and right (r, in / pool), as they are trained."""
        if self.lora_lambda is None:
            return self.lora_B * self.scale, self.lora_A
        return self.lora_B * (self.lora_lambda * self.lambda_gain) * self.scale, self.lora_A

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return left (out, r), scale included, and right (r, in / pool): left @ right is dW, once per group."""
        return self.exact_factors()

    def delta(self) -> Tensor:
        """Return the update dW (out, in)."""
        left, right = self.factors()
        return (left @ right).repeat_interleave(self.pool, dim=1)  # (out, in / pool) -> (out, in)


class SiteAdapter(LowRankUpdate, nn.Module):
    """The low-rank update of one site.

    Args:
        in_features: inputs of the site's weight.
        out_features: outputs of the site's weight.
        rank: number of triplets to start with; 0 is allowed and costs nothing.
        scale: factor on the update (alpha / r of the LoRA paper, kept when r moves).
        generator: source of the initial factors.
        parametrization: `product` or `svd`.
        factor_start: of the svd form. `normal`: N(0, 0.02^2), as published. `orthonormal`: P^T P = Q Q^T = I among
            the triplets made together, so that the orthogonality penalty starts at 0.
        lambda_gain: of the svd form.
        pool: inputs per group on which the update is constant; 1 for a plain adapter.
    """

    smallest_rank = 0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        scale: float,
        generator: torch.Generator,
        parametrization: Parametrization = "product",
        factor_start: FactorStart = "normal",
        lambda_gain: float = 1.0,
        pool: int = 1,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.scale = scale
        self.parametrization = parametrization
        self.factor_start = factor_start
        self.lambda_gain = lambda_gain
        self.pool = pool
        self.generator = generator

        self.bits: int | None = None  # that its file has for a value, see `store_in_bits`
        self.rounds_while_training = True
        self.probe: GradientProbe | None = None  # for one step, see `allocation.importance`
        lora_A, lora_B, lora_lambda = self.fresh_triplets(rank)
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.lora_lambda = None if lora_lambda is None else nn.Parameter(lora_lambda)

    def fresh_triplets(self, count: int, beside: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return triplets as `LowRankUpdate` does; of the svd form lambda is zero, and the factors are as the start."""
        if self.parametrization == "product":
            return super().fresh_triplets(count, beside)
        lora_A = torch.randn(count, self.in_features // self.pool, generator=self.generator)
        lora_B = torch.randn(self.out_features, count, generator=self.generator)
        if self.factor_start == "orthonormal":
            # Q of (in / pool, count) -> A (count, in / pool); Q of (out, count) is B
            return torch.linalg.qr(lora_A.T).Q.T, torch.linalg.qr(lora_B).Q, torch.zeros(count)
        return lora_A * _SVD_INIT_STD, lora_B * _SVD_INIT_STD, torch.zeros(count)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return left (out, r), scale included, and right (r, in / pool), rounded to `bits`: columns and rows each."""
        left, right = self.exact_factors()
        if self.bits is None or (self.training and not self.rounds_while_training):
            return left, right
        return rounded_rows(left.T, self.bits).T, rounded_rows(right, self.bits)

    def orthogonality(self) -> Tensor:
        """Return ||P^T P - I||_F + ||Q Q^T - I||_F, a scalar (AdaLoRA, eq. 4; norms not squared, as in its code)."""
        eye = torch.eye(self.rank, device=self.lora_A.device)  # (r, r), as both products
        return torch.linalg.matrix_norm(self.lora_B.T @ self.lora_B - eye) + torch.linalg.matrix_norm(
            self.lora_A @ self.lora_A.T - eye
        )


class GradientProbe:
    """Temporary triplets p_i lambda_i q_i of random unit vectors p_i, q_i at lambda_i = 0; only lambda has a
    gradient.

    With G = dL/dW of the site, dL/dlambda_i = p_i^T G q_i. The directions are uniform on the spheres, so its square
    has the expectation ||G||_F^2 / (in * out): the root mean square over the triplets estimates the size of an element
    of G, whatever the adapter's rank. Where an update is constant on groups of inputs, q_i is too, and G is the
    gradient summed over each group: what an adapter there can follow.

    A probe is neither module nor parameter: no optimiser holds it, no state dict saves it, nothing counts it as
    trained.

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


RowUpdate: TypeAlias = tuple[slice, SiteAdapter | GradientProbe]  # the output rows of a site, and what updates them
