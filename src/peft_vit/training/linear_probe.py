"""The linear probe: multinomial logistic regression on what the head of a frozen backbone sees.

For images i = 1..n with features x_i, standardized over the training images to z_i, labels y_i and weights w_i, it
minimizes

    sum_i w_i CE(W z_i + b, y_i) / sum_i w_i + (l2 / 2) ||W||_F^2,    w_i = 1, or n / (classes n_{y_i})

to convergence by L-BFGS (scikit-learn's LogisticRegression, whose C is 1 / (l2 sum w)). Each l2 of a list is tried, and
validation accuracy chooses; of equal ones the lower NLL, then the stronger penalty; without validation images the list
has one. The standardization is folded into
the head afterwards, so that the model needs nothing new. With two classes scikit-learn fits one row for the difference
of the logits; W has half of it and its negative as rows, whose ||W||_F^2 is half of that row's: C is twice as large.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peft_vit.backbones import Backbone, Head, evaluating, fill_head
from peft_vit.backbones.passes import class_token_alone
from peft_vit.config import PROBE_L2
from peft_vit.data import LabelledImages, deal_folds
from peft_vit.errors import UserError
from peft_vit.evaluation import autocast, measure
from peft_vit.evaluation.halves import forward_in_halves
from peft_vit.records import Evaluation, HeadFit, StepRow
from peft_vit.seeding import numpy_generator
from peft_vit.training.hooks import RuntimeConfig

Floats = NDArray[np.float64]
_LARGEST_GRADIENT = 1e-7  # at which the fit has converged; L-BFGS ends there or at its most iterations
_MOST_ITERATIONS = 10_000
_FOLDS = 5
# Ends and search are not those of `statistics.fit_temperature`: with its own every training would start elsewhere.
_LOG_TEMPERATURES = (math.log(0.1), math.log(100.0))
# The axes of each of the equally likely ways in which an image is shown in training.
FLIP_AXES: dict[str, tuple[tuple[int, ...], ...]] = {
    "none": ((),),
    "horizontal": ((), (-1,)),
    "both": ((), (-1,), (-2,), (-2, -1)),
}


@dataclass(frozen=True)
class Features:
    """What the head sees of images, and their classes.

    Attributes:
        values: (N, D) float32.
        labels: (N,) int64.
    """

    values: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class LinearProbe:
    """A head at its optimum.

    Attributes:
        weight: (classes, D), for features as they are.
        bias: (classes,).
        fit: how it was found, for the record.
        steps: a row for each strength that was tried, with the mean loss on the training images.
        evaluations: likewise, on validation images; none without these.
    """

    weight: Tensor
    bias: Tensor
    fit: HeadFit
    steps: tuple[StepRow, ...]
    evaluations: tuple[Evaluation, ...]

    @property
    def chosen(self) -> Evaluation | None:
        """Return the evaluation of the strength that was chosen; None without validation images."""
        return self.evaluations[self.chosen_step - 1] if self.evaluations else None

    @property
    def chosen_step(self) -> int:
        """Return which strength was chosen, counted from 1."""
        return self.fit.l2.index(self.fit.chosen_l2) + 1

    def set_head(self, head: Head, temperature: float = 1.0) -> None:
        """Make it the head of a model, with its logits divided by a temperature."""
        fill_head(head, self.weight / temperature, self.bias / temperature)

    def temperature(self, validation: Features) -> float:
        """Return what logits have to be divided by for the lowest NLL on validation images (arXiv 1706.04599).

        With this temperature a head that separates few training images is as sure as it deserves, and predicts the
        same classes.
        """
        return _temperature(self._logits(validation), torch.from_numpy(validation.labels))

    def training_temperature(self, train: Features, temperature: float) -> float:
        """Return what logits are divided by beyond a temperature while training: a power of two, undone to the bit.

        The features of a model hardly change under a head that is sure of its training images, since all gradients are
        products with p - y (Ren et al., arXiv 2302.05779, who fit such a head less far). So it is the least with which
        the loss on them is at least half of what guessing costs, log(classes) / 2. The predicted classes stay the same.
        """
        logits, labels, factor = self._logits(train) / temperature, torch.from_numpy(train.labels), 1.0
        while nn.functional.cross_entropy(logits / factor, labels) < math.log(len(self.bias)) / 2:
            factor *= 2
        return factor

    def _logits(self, features: Features) -> Tensor:
        values = torch.from_numpy(features.values).double()
        return values @ self.weight.double().cpu().T + self.bias.double().cpu()  # (N, classes)


def _temperature(logits: Tensor, labels: Tensor) -> float:
    from scipy.optimize import minimize_scalar

    def nll(log_temperature: float) -> float:
        return float(nn.functional.cross_entropy(logits / math.exp(log_temperature), labels))

    return math.exp(float(minimize_scalar(nll, bounds=_LOG_TEMPERATURES, method="bounded").x))


def held_out_temperature(
    train: Features, images: int, l2: float, *, class_weights: NDArray[np.float64] | None = None, seed: int = 0
) -> float:
    """Return the temperature of a probe without validation images: of logits that heads have on images left out.

    A head is fitted to the images outside of each of five folds, fewer if a class has fewer images, in every way in
    which training shows them, and predicts the fold's as they are.

    Args:
        train: of n images in each of w ways, one way after the other, (w n, D).
        images: n.
        l2: strength of the penalty.
        class_weights: on the loss, (classes,); None: all 1.
        seed: of the folds.
    """
    labels = train.labels[:images]
    counts = np.bincount(labels)  # (n,) -> (classes,)
    if counts.min() < 2:
        message = "probe needs two training images of each class where none validate; add images, or start at random"
        raise UserError(message, field="training.head_start")
    folds = min(_FOLDS, int(counts.min()))
    fold_of = deal_folds(labels, np.arange(images), folds, numpy_generator(seed, "held_out"))
    logits = np.empty((images, len(counts)))  # (n, classes)
    for fold in range(folds):
        fitted = np.tile(fold_of != fold, len(train.labels) // images)  # (w n,)
        rest = Features(train.values[fitted], train.labels[fitted])  # all but the fold, in every way
        weights = None if class_weights is None else class_weights[rest.labels]
        ((weight, bias, *_),) = _fits(rest, len(counts), [l2], weights)  # (classes, D), (classes,)
        held_out = fold_of == fold  # (n,)
        logits[held_out] = train.values[:images][held_out].astype(np.float64) @ weight.T + bias
    return _temperature(torch.from_numpy(logits), torch.from_numpy(labels))


@torch.inference_mode()
def head_inputs(
    model: nn.Module, images: LabelledImages, runtime: RuntimeConfig, batch_size: int, axes: tuple[int, ...] = ()
) -> NDArray[np.float32]:
    """Return what the head sees of images, (N, D).

    Batches are all of one size, the last one filled up with its last image, so that an image's features do not
    depend on the others. Along the axes images are flipped: -1 left-right, -2 upside down.
    """
    features = []
    backbone = Backbone(model)

    def forward(batch: Tensor) -> Tensor:
        with autocast(runtime.device, runtime.precision):
            return backbone.features(batch.to(runtime.device))  # (B, 3, S, S) -> (B, D)

    with evaluating(model), class_token_alone(model):
        for batch, _ in images.ordered_batches(batch_size, runtime.mean, runtime.std):
            flipped = batch.flip(axes) if axes else batch  # (B, 3, S, S)
            filled = torch.cat([flipped, flipped[-1:].expand(batch_size - len(flipped), -1, -1, -1)])
            of_batch = forward_in_halves(forward, filled, runtime.device)  # (batch_size, D)
            features.append(of_batch.float().cpu().numpy()[: len(batch)])  # (B, D)
    return np.concatenate(features)  # (N, D)


@torch.inference_mode()
def head_logits(head: Head, features: NDArray[np.float32], runtime: RuntimeConfig) -> NDArray[np.float32]:
    """Return the logits of a head (N, classes) in the runtime's precision, as the model has them."""
    with autocast(runtime.device, runtime.precision):
        logits: Tensor = head(torch.from_numpy(features).to(runtime.device))
    return logits.float().cpu().numpy()


def fit_probe(
    train: Features,
    validation: Features | None,
    head: Head,
    runtime: RuntimeConfig,
    *,
    class_weights: NDArray[np.float64] | None = None,
    l2: Sequence[float] = PROBE_L2,
) -> LinearProbe:
    """Fit a head at each strength, and return the one that validation prefers; the given head is left as it is.

    Args:
        train: every class is among them.
        validation: what chooses; None: there is one strength.
        head: of the model; says where and in what type logits are computed.
        runtime: likewise, its precision.
        class_weights: on the loss, (classes,); None: all 1.
        l2: the strengths.
    """
    ordered = sorted(l2, reverse=True)  # each fit goes on from the one before, strong to weak
    sample_weights = None if class_weights is None else class_weights[train.labels]
    trial = deepcopy(head)
    fits, steps, evaluations = [], [], []
    for place, (W, b, loss, gradient, seconds) in enumerate(
        _fits(train, head.out_features, ordered, sample_weights), start=1
    ):
        weight, bias = torch.from_numpy(W).float(), torch.from_numpy(b).float()  # (classes, D), (classes,)
        fits.append((weight, bias))
        steps.append(StepRow(step=place, loss=loss, learning_rate=0.0, gradient_norm=gradient, seconds=seconds))
        if validation is not None:
            fill_head(trial, weight, bias)
            metrics = measure(head_logits(trial, validation.values, runtime), validation.labels)
            evaluations.append(Evaluation(step=place, epoch=0, deployable=True, metrics=metrics))
    quality = [(evaluation.metrics.accuracy, -evaluation.metrics.nll) for evaluation in evaluations]
    best = max(range(len(quality)), key=quality.__getitem__, default=0)  # of equal ones the first, the strongest
    fit = HeadFit(
        l2=tuple(ordered),
        validation=tuple(evaluation.metrics for evaluation in evaluations),
        chosen_l2=ordered[best],
        gradient_norm=steps[best].gradient_norm,
        images=len(train.labels),
    )
    return LinearProbe(*fits[best], fit, tuple(steps), tuple(evaluations))


def _fits(
    train: Features, classes: int, strengths: Sequence[float], sample_weights: Floats | None
) -> Iterator[tuple[Floats, Floats, float, float, float]]:
    """Yield W (classes, D), b (classes,), mean loss, norm of the objective's gradient and seconds, by strength."""
    from sklearn.linear_model import LogisticRegression  # only here: it takes 100 MB of memory
    from threadpoolctl import threadpool_limits

    values = train.values.astype(np.float64)
    centre, spread = values.mean(0), values.std(0)  # (D,)
    spread[spread <= 1e-12 * np.abs(centre).max()] = 1.0  # a constant feature tells nothing, and must not divide
    z = (values - centre) / spread  # (N, D)
    weights = np.ones(len(z)) if sample_weights is None else sample_weights
    model = LogisticRegression(tol=_LARGEST_GRADIENT, max_iter=_MOST_ITERATIONS, warm_start=True)
    for l2 in strengths:
        started = time.perf_counter()
        model.set_params(C=(2.0 if classes == 2 else 1.0) / (l2 * weights.sum()))
        with threadpool_limits(1):  # two threads wait for each other at products this small, at worst for long
            model.fit(z, train.labels, sample_weight=weights)
        weight, bias = model.coef_, model.intercept_  # (classes, D), (classes,); (1, D), (1,) of two
        if classes == 2:
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2  # (2, D), (2,)
        # Without the penalty the mean weighted loss, with it the gradient.
        W, b = (torch.from_numpy(array).double().requires_grad_() for array in (weight, bias))
        logits = torch.from_numpy(z) @ W.T + b  # (N, classes)
        losses = nn.functional.cross_entropy(logits, torch.from_numpy(train.labels), reduction="none")  # (N,)
        loss = (torch.from_numpy(weights / weights.sum()) * losses).sum()
        by_weight, by_bias = torch.autograd.grad(loss + l2 / 2 * W.square().sum(), [W, b])
        gradient = math.hypot(float(by_weight.norm()), float(by_bias.norm()))
        folded = weight / spread
        yield folded, bias - folded @ centre, loss.item(), gradient, time.perf_counter() - started
