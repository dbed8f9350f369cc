"""What training images tell of a frozen model before training: gradients of its weights, what low bits would cost each
layer, and what a rank would bring each site. The backbone is left as it was.

What bits cost and ranks bring is predicted at the float weights, in nats of the mean loss over the images, so that both
can be added up. The head of a fresh run is random, and gradients through it say nothing of the task; a linear head
fitted to the images' features takes its place.

Layers. With p the class probabilities by the float weights and q those by weights of which one layer is quantized:

    loss     mean over images of KL(p || q): the rise of the cross-entropy whose target is the float model's output
    fisher   1/2 sum_ij F_ij (Wq - W)_ij^2, F the diagonal of the Fisher information of p: its second-order term

F is the mean over images of the squared gradient of log p(y), with y drawn from p. Labels of the data would make it the
empirical Fisher, which is not a second-order term of anything (arXiv 1905.12558, sec. 3). Quantization error weighted
with the Fisher's diagonal: FIT, arXiv 2210.08502; within blocks, BRECQ, arXiv 2102.05426.

Ranks. See `rank_gains`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_vit.base.errors import UserError
from peft_vit.base.seeding import torch_generator
from peft_vit.core.allocation.strategies import Floats
from peft_vit.core.backbones import Backbone, Site, evaluating, visit_blocks
from peft_vit.core.quantization import QuantizationFormat, quantize

BACKWARD_IMAGES = 8  # gradients of a layer's outputs exist for as many images at once
_FORWARD_IMAGES = 64
# Of the head's logistic regression (1 / its L2 penalty), on features scaled to a mean squared norm of 1. On 64 images
# of ELPV the held-out loss is near its least, 0.45 of 0.43, and that on the fitted images, 0.35, not far below it; with
# 32 they are 0.43 and 0.19.
_INVERSE_PENALTY = 4.0


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without trainable parameters for a while."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def layer_gradients(
    model: nn.Module, modules: Sequence[str], images: Tensor, head: LinearHead, loss: Callable[[Tensor, slice], Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (module, gradient by its outputs (B, ..., out), its inputs (B, ..., in)) of each batch of B images.

    Args:
        model: frozen; only activations have gradients, so that no gradient of all weights is formed.
        modules: linear layers.
        images: (N, C, S, S).
        head: on the model's features.
        loss: of a batch's logits and its place among the images.
    """
    backbone = Backbone(model)
    captured: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            output.register_hook(lambda gradient: captured.update({name: (gradient, x)}))

        return forward

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in modules]
    try:
        for start in range(0, len(images), BACKWARD_IMAGES):
            part = slice(start, start + BACKWARD_IMAGES)
            loss(head(backbone.features(images[part].clone().requires_grad_())), part).backward()
            for name in modules:
                yield name, *captured.pop(name)
    finally:
        for handle in handles:
            handle.remove()


def squared_singular_values(matrix: Tensor) -> Tensor:
    """Return the squared singular values of a matrix, (smaller side,) float64 on the CPU, the largest first.

    They are the eigenvalues of the smaller product of the matrix with its transpose: several times as fast as the
    singular values.
    """
    matrix = matrix.double().cpu()
    # (smaller side, smaller side)
    squares = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return torch.linalg.eigvalsh(squares).flip(0).clamp(min=0)


class LinearHead(NamedTuple):
    """Maps features to logits of the classes that the calibration images have."""

    weight: Tensor  # (classes, width)
    bias: Tensor  # (classes,)

    def __call__(self, features: Tensor) -> Tensor:
        """Return logits (N, classes) of features (N, width)."""
        return F.linear(features, self.weight, self.bias)


def fit_head(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[LinearHead, Tensor]:
    """Fit logistic regression with an L2 penalty to the features that the model's own head would see.

    Args:
        model: a Vision Transformer.
        images: (N, 3, S, S), normalised, on the model's device.
        labels: (N,) int64.

    Returns:
        The head, and the labels as places among its classes, (N,).

    Raises:
        UserError: if all labels are equal.
    """
    from sklearn.linear_model import LogisticRegression  # only here: it takes 100 MB of memory

    classes, places = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise UserError(
            f"the {len(labels)} calibration images are all of one class, so nothing can be measured on them; use more",
            field="qa_lora.adaptive_bits.calibration_images",
        )
    backbone = Backbone(model)
    with frozen(model), torch.no_grad():
        features = torch.cat([backbone.features(chunk) for chunk in images.split(_FORWARD_IMAGES)])  # (N, width)
    centre = features.mean(0)  # (width,)
    # (N, width) -> (N,) -> ()
    spread = (features - centre).square().sum(1).mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    fitted = LogisticRegression(C=_INVERSE_PENALTY, max_iter=1000).fit(
        ((features - centre) / spread).double().cpu().numpy(), places.cpu().numpy()
    )
    weight, bias = fitted.coef_, fitted.intercept_  # (classes, width), (classes,); (1, width), (1,) of two
    if len(classes) == 2:  # scikit-learn holds the difference of the two logits alone
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight, bias = (torch.tensor(values, dtype=torch.float32, device=images.device) for values in (weight, bias))
    weight = weight / spread
    return LinearHead(weight, bias - weight @ centre), places


def layer_losses(
    model: nn.Module,
    formats: Mapping[str, Sequence[QuantizationFormat]],
    images: Tensor,
    head: LinearHead,
    *,
    by: Literal["fisher", "loss"],
    seed: int,
) -> dict[str, list[float]]:
    """Return the predicted rise of the loss, in nats, for each of a layer's formats.

    Args:
        model: a Vision Transformer without adapters; is left as it was.
        formats: by module, `blocks.3.attn.qkv`: what it may be quantized to.
        images: calibration batch (N, 3, S, S) of training images, normalised, on the model's device.
        head: from `fit_head`.
        by: how, see above. `fisher` takes one backward pass; `loss` for each format of each layer a forward pass from
            its block on.
        seed: of the labels that `fisher` draws.
    """
    with frozen(model):
        if by == "loss":
            return _divergences(model, formats, images, head)
        generator = torch_generator(seed, "calibration")

        def loss(logits: Tensor, _: slice) -> Tensor:
            drawn = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator).squeeze(1)  # (B,)
            return F.cross_entropy(logits, drawn.to(logits.device), reduction="sum")

        squares = {name: torch.zeros_like(_weight(model, name)) for name in formats}  # (out, in) each
        for name, outputs, inputs in layer_gradients(model, list(formats), images, head, loss):
            for gradients, x in zip(outputs, inputs, strict=True):  # of an image: (T, out), (T, in)
                gradient = gradients.T @ x  # (out, in)
                squares[name].addcmul_(gradient, gradient, value=1 / len(images))

        def rise(name: str, format: QuantizationFormat) -> float:
            weight = _weight(model, name)
            error = quantize(weight, format, name=name).dequantize() - weight  # (out, in)
            return (squares[name] * error.square()).double().sum().item() / 2

        return {name: [rise(name, format) for format in candidates] for name, candidates in formats.items()}


@torch.no_grad()
def _divergences(
    model: nn.Module, formats: Mapping[str, Sequence[QuantizationFormat]], images: Tensor, head: LinearHead
) -> dict[str, list[float]]:
    """Return mean KL(p || q); blocks before a layer's are computed once."""
    low = {name: [quantize(_weight(model, name), format, name=name) for format in formats[name]] for name in formats}
    backbone = Backbone(model)
    layer_of = {site.module: site.layer for site in backbone.sites}
    totals = {name: [0.0] * len(candidates) for name, candidates in low.items()}
    for chunk in images.split(_FORWARD_IMAGES):
        logits: dict[str, list[Tensor]] = {name: [] for name in low}

        def visit(block: int, rest: Callable[[], Tensor], logits: dict[str, list[Tensor]] = logits) -> None:
            for name in (name for name in low if layer_of[name] == block):
                weight = _weight(model, name)
                floating = weight.data
                try:
                    for quantized in low[name]:
                        weight.data = quantized.dequantize()
                        logits[name].append(head(rest()))  # (B, width) -> (B, classes)
                finally:
                    weight.data = floating

        features = visit_blocks(backbone, partial(backbone.features, chunk), visit)  # (B, width)
        target = head(features).double().log_softmax(1)  # (B, classes)
        for name, by_format in logits.items():
            for candidate, quantized_logits in enumerate(by_format):
                log_q = quantized_logits.double().log_softmax(1)  # (B, classes)
                divergence = F.kl_div(log_q, target, reduction="sum", log_target=True)
                totals[name][candidate] += float(divergence) / len(images)
    return totals


def rank_gains(
    model: nn.Module, sites: Sequence[Site], images: Tensor, labels: Tensor, head: LinearHead, *, pool: int
) -> dict[str, Floats]:
    """Return, for ranks 0 to the largest useful one, the predicted fall of the loss, in nats, by site.

    A heuristic. To first order an update of rank r and Frobenius norm n lowers the loss by at most
    n sqrt(sum of the r largest sigma_i^2), with sigma the singular values of the gradient G of the loss with respect
    to the site's weight W (Eckart and Young 1936: the inner product with G is largest along G's best approximation of
    rank r). The norms of trained updates are taken to be in one proportion to ||W||_F for all sites. That proportion
    is not needed: no update can lower the loss L below 0, so gains are scaled to a total of L with all sites at their
    largest rank,

        gain(r) = L a(r) / sum over sites of a(largest rank),  a(r) = ||W||_F sqrt(sum of the r largest sigma_i^2)

    It is optimistic: a bound, taken as the gain. Each rank gains no more than the one before.

    Args:
        model: as in `layer_losses`.
        sites: where adapters will sit.
        images: as in `layer_losses`.
        labels: (N,), places among the head's classes, from `fit_head`.
        head: from `fit_head`.
        pool: inputs per group on which the update is constant; G is then summed over each group.
    """
    modules = list(dict.fromkeys(site.module for site in sites))
    losses: list[float] = []

    def loss(logits: Tensor, part: slice) -> Tensor:
        total = F.cross_entropy(logits, labels[part], reduction="sum") / len(labels)
        losses.append(total.item())
        return total

    gradients: dict[str, Tensor] = {}  # of the mean loss by a module's weight, (out, in)
    with frozen(model):
        for name, outputs, inputs in layer_gradients(model, modules, images, head, loss):
            gradient = outputs.flatten(0, -2).T @ inputs.flatten(0, -2)  # (B T, out), (B T, in) -> (out, in)
            gradients[name] = gradients.get(name, 0) + gradient
    bounds = {}
    for site in sites:
        pooled = gradients[site.module][site.span].unflatten(1, (-1, pool)).sum(-1)  # (out, in / pool)
        # Frobenius norms of the gradient's best approximations of rank 0, 1, ... up to its smaller side.
        norms = np.sqrt(np.concatenate([[0.0], squared_singular_values(pooled).cumsum(0).numpy()]))  # (ranks + 1,)
        bounds[site.name] = _weight(model, site.module)[site.span].norm().item() * norms
    total = sum(bound[-1] for bound in bounds.values())
    return {name: bound * (sum(losses) / total if total else 0.0) for name, bound in bounds.items()}


def _weight(model: nn.Module, module: str) -> Tensor:
    weight = model.get_submodule(module).weight
    assert isinstance(weight, Tensor)
    return weight
