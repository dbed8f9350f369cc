"""The linear probe: the best linear head for what the head of a frozen backbone sees.

For images i = 1..n with features x_i, standardized over the training images to z_i, labels y_i and weights w_i, it
minimizes

    sum_i w_i loss(W z_i + b, y_i) / sum_i w_i + (l2 / 2) ||W||_F^2,    w_i = 1, or by the class

as the task does it: of classification, cross entropy to convergence. Each l2 of a list is tried, and what decides
chooses on validation images; of equal ones the lower NLL, then the stronger penalty. Without such images it chooses on
training images that are left out of the fit in turn: in folds, or where the task has that in closed form (ridge) one by
one. The standardization is folded into the head afterwards, so that
the model needs nothing new.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peft_vit.base.errors import UserError
from peft_vit.base.seeding import numpy_generator
from peft_vit.base.statistics.drawing import assign_folds
from peft_vit.core.backbones import Backbone, Head, evaluating, fill_head
from peft_vit.core.backbones.passes import class_token_alone
from peft_vit.core.config import PROBE_L2
from peft_vit.core.records import Evaluation, HeadFit, StepRow
from peft_vit.core.tasks import CLASSIFICATION, DecidingMetric, Task
from peft_vit.core.tasks.metric import Flags, Floats, Ints, Labels
from peft_vit.core.tasks.task import CONVERGED
from peft_vit.core.training.halves import forward_in_halves
from peft_vit.core.training.hooks import RuntimeConfig
from peft_vit.core.training.images import LabelledImages
from peft_vit.core.training.metrics import autocast

_FOLDS = 5
_WORSE = 3  # strengths in turn that are no better than the best one: then no weaker one is tried, which take longest
_HELD_OUT_CONVERGED = 1e-5  # of heads that choose a strength: by 300 images the same as 1e-7, in half of the time
# The axes of each of the equally likely ways in which an image is shown in training.
FLIP_AXES: dict[str, tuple[tuple[int, ...], ...]] = {
    "none": ((),),
    "horizontal": ((), (-1,)),
    "both": ((), (-1,), (-2,), (-2, -1)),
}


@dataclass(frozen=True)
class Features:
    """Inputs of the head, (N, D) float32, and labels of the task."""

    values: NDArray[np.float32]
    labels: Labels
    task: Task = CLASSIFICATION


@dataclass(frozen=True)
class LinearProbe:
    """A head at its optimum.

    Attributes:
        weight: (classes, D), for features as they are.
        bias: (classes,).
        fit: how it was found, for the record.
        steps: a row for each strength that was tried, with the mean loss on the training images.
        evaluations: of each strength on validation images; none without these.
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
        """Return the divisor of the logits with the lowest NLL on validation images (arXiv 1706.04599).

        With this temperature a head that separates few training images is as sure as it deserves, and predicts the
        same classes.
        """
        return validation.task.temperature(self._logits(validation), torch.from_numpy(validation.labels))

    def training_temperature(self, train: Features, temperature: float) -> float:
        """Return the divisor of the logits beyond a temperature while training: a power of two, undone to the bit.

        The features of a model hardly change under a head that is sure of its training images, since all gradients are
        products with p - y (Ren et al., arXiv 2302.05779, who fit such a head less far).
        """
        return train.task.training_temperature(self._logits(train) / temperature, torch.from_numpy(train.labels))

    def _logits(self, features: Features) -> Tensor:
        values = torch.from_numpy(features.values).double()
        return values @ self.weight.double().cpu().T + self.bias.double().cpu()  # (N, classes)


def can_hold_out(strata: Labels, groups: Ints) -> bool:
    """Return whether each of the strata (n,) or (n, S) has two groups (n,), so that one can be left out of a fit."""
    return fewest_groups(strata, groups) >= 2


def fewest_groups(strata: Labels, groups: Ints) -> int:
    """Return of how many groups (n,) the rarest of the strata (n,) or (n, S) is; 0: there is none."""
    return min((len(np.unique(groups[images])) for images in _members(strata)), default=0)


def groups_left_out(strata: Labels, groups: Ints) -> Ints:
    """Return groups (n,) as they are, or each image alone where one of the strata would have no other group."""
    return groups if can_hold_out(strata, groups) else np.arange(len(groups))


def _members(strata: Labels) -> Iterator[Flags]:
    """Yield which images (n,) are of each of the strata (n,) or (n, S) that occur."""
    if strata.ndim > 1:
        yield from strata[:, strata.any(0)].T
    else:
        yield from (strata == stratum for stratum in np.unique(strata))


def _can_be_left_out(strata: Labels, groups: Ints) -> Flags:
    """Return which images (n,) leave another group to each of their strata, (n,) or (n, S)."""
    held = np.ones(len(groups), dtype=bool)
    for images in _members(strata):
        if len(np.unique(groups[images])) < 2:
            held &= ~images
    return held


def held_out_fit(
    train: Features,
    groups: Ints,
    metric: DecidingMetric,
    *,
    class_weights: Floats | None = None,
    l2: Sequence[float] = PROBE_L2,
    seed: int = 0,
) -> tuple[float, Floats]:
    """Return the strength that is best on images left out of the fit, and the logits of these, (n, classes).

    An image whose class has no other group is in each fit, says nothing of it, and has NaN for logits.

    Args:
        train: of n images in each of w ways, one way after the other, (w n, D).
        groups: (n,), of images that are left out together, in all ways: those of equal numbers.
        metric: that says what is best.
        class_weights: on the loss, (classes,); None: all 1.
        l2: the strengths.
        seed: of the folds.

    Raises:
        UserError: if there are no two classes with two images each, or two groups.
    """
    labels, ordered = train.labels[: len(groups)], sorted(l2, reverse=True)
    strata = train.task.strata(labels)
    held = _can_be_left_out(strata, groups)
    if not held.all() and len(np.unique(strata[held], axis=0)) < 2:
        message = (
            "probe needs two training images each of two classes if there are no validation images; add images, "
            "or start at random"
        )
        raise UserError(message, field="training.head_start")
    z, _, _, weights = _standardized(train, class_weights)
    in_closed_form = train.task.held_out_outputs(
        z, train.labels, np.tile(groups, len(z) // len(groups)), ordered, weights
    )
    if in_closed_form is None:
        fold_of = _folds(strata, groups, held, seed)
        held_out = _held_out_logits(train, fold_of, ordered, class_weights)
    else:
        held_out = (np.where(held[:, None], outputs[: len(groups)], np.nan) for outputs in in_closed_form)
    quality: list[Any] = []
    for logits in held_out:
        quality.append(metric.quality(train.task.measure(logits[held], labels[held])))
        best = max(range(len(quality)), key=quality.__getitem__)  # of equal ones the first, the strongest
        if best == len(quality) - 1:
            chosen = logits
        elif len(quality) - best > _WORSE:
            break
    return ordered[best], chosen


def _folds(strata: Labels, groups: Ints, held: Flags, seed: int) -> Ints:
    """Return in which of five folds images are left out, (n,), fewer if a class has fewer; -1 if they are not held."""
    fold_of, strata, groups = np.full(len(held), -1), strata[held], groups[held]
    count = min(_FOLDS, max(2, fewest_groups(strata, groups)))
    fold_of[held] = assign_folds(strata, groups, count, numpy_generator(seed, "held_out"))
    return fold_of


def _held_out_logits(
    train: Features, fold_of: Ints, strengths: Sequence[float], class_weights: Floats | None
) -> Iterator[Floats]:
    """Yield logits (n, classes) of images by heads that were not fitted to them, for each strength; NaN if in no fold.

    A head is fitted to the images outside of each fold (n,), in every way in which training shows them, and predicts
    the fold's as they are.
    """
    images, folds, task = len(fold_of), int(fold_of.max()) + 1, train.task
    of_fold = [train.values[:images][fold_of == fold].astype(np.float64) for fold in range(folds)]  # (images, D) each

    def heads(fold: int) -> Iterator[tuple[Floats, Floats, float, float, float]]:
        fitted = np.tile(fold_of != fold, len(train.labels) // images)  # (w n,)
        fit_features = Features(train.values[fitted], train.labels[fitted], task)  # in every way
        return _fits(fit_features, strengths, class_weights, _HELD_OUT_CONVERGED)

    for of_folds in zip(*map(heads, range(folds)), strict=True):  # of one strength
        logits = np.full((images, len(of_folds[0][1])), np.nan)  # (n, classes)
        for fold, (weight, bias, *_) in enumerate(of_folds):
            logits[fold_of == fold] = of_fold[fold] @ weight.T + bias
        yield logits


@torch.inference_mode()
def head_inputs(
    model: nn.Module,
    images: LabelledImages,
    runtime: RuntimeConfig,
    batch_size: int,
    axes: tuple[int, ...] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """Return the head's inputs (N, D).

    Batches are all of one size, the last one padded with its last image, so that an image's features do not depend on
    the others.

    Args:
        model: with a head.
        images: N.
        runtime: device, precision and normalisation.
        batch_size: images a pass.
        axes: along which images are flipped: -1 left-right, -2 upside down.
        on_progress: called with the images done, and N.
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
            if on_progress is not None:
                on_progress(min(len(features) * batch_size, len(images)), len(images))
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
    metric: DecidingMetric,
    *,
    class_weights: Floats | None = None,
    l2: Sequence[float] = PROBE_L2,
) -> LinearProbe:
    """Fit a head at each strength, and return the one that validation prefers; the given head is left as it is.

    Args:
        train: every class is among them.
        validation: what chooses; None: there is one strength.
        head: of the model; says where and in what type logits are computed.
        runtime: precision of the logits.
        metric: by which validation chooses.
        class_weights: on the loss, (classes,); None: all 1.
        l2: the strengths.
    """
    ordered = sorted(l2, reverse=True)  # each fit goes on from the one before, strong to weak
    trial = deepcopy(head)
    fits, steps, evaluations = [], [], []
    for place, (W, b, loss, gradient, seconds) in enumerate(_fits(train, ordered, class_weights), start=1):
        weight, bias = torch.from_numpy(W).float(), torch.from_numpy(b).float()  # (classes, D), (classes,)
        fits.append((weight, bias))
        steps.append(StepRow(step=place, loss=loss, learning_rate=0.0, gradient_norm=gradient, seconds=seconds))
        if validation is not None:
            fill_head(trial, weight, bias)
            metrics = validation.task.measure(head_logits(trial, validation.values, runtime), validation.labels)
            evaluations.append(Evaluation(step=place, epoch=0, deployable=True, metrics=metrics))
    quality = [metric.quality(evaluation.metrics) for evaluation in evaluations]
    best = max(range(len(quality)), key=quality.__getitem__, default=0)  # of equal ones the first, the strongest
    fit = HeadFit(
        l2=tuple(ordered),
        validation=tuple(evaluation.metrics for evaluation in evaluations),
        chosen_l2=ordered[best],
        gradient_norm=steps[best].gradient_norm,
        images=len(train.labels),
    )
    return LinearProbe(*fits[best], fit, tuple(steps), tuple(evaluations))


def _standardized(train: Features, class_weights: Floats | None) -> tuple[Floats, Floats, Floats, Floats]:
    """Return standardized features (N, D) in float64, their mean and scale (D,), and sample weights (N,)."""
    values = train.values.astype(np.float64)
    centre, spread = values.mean(0), values.std(0)  # (D,)
    spread[spread <= 1e-12 * np.abs(centre).max()] = 1.0  # a constant feature tells nothing, and must not divide
    weights = np.ones(len(values))
    if class_weights is not None:
        weights = train.task.image_weights(train.labels, class_weights)
    return (values - centre) / spread, centre, spread, weights


def _fits(
    train: Features, strengths: Sequence[float], class_weights: Floats | None, tolerance: float = CONVERGED
) -> Iterator[tuple[Floats, Floats, float, float, float]]:
    """Yield W (classes, D), b (classes,), mean loss, norm of the objective's gradient and seconds, by strength."""
    z, centre, spread, weights = _standardized(train, class_weights)
    task = train.task
    started = time.perf_counter()
    heads = task.linear_heads(z, train.labels, strengths, weights, tolerance)
    for l2, (weight, bias) in zip(strengths, heads, strict=True):
        # Without the penalty the mean weighted loss, with it the gradient.
        W, b = (torch.from_numpy(array).double().requires_grad_() for array in (weight, bias))
        losses = task.losses(torch.from_numpy(z) @ W.T + b, torch.from_numpy(train.labels))  # (N, classes) -> (N,)
        loss = (torch.from_numpy(weights / weights.sum()) * losses).sum()
        by_weight, by_bias = torch.autograd.grad(loss + l2 / 2 * W.square().sum(), [W, b])
        gradient = math.hypot(float(by_weight.norm()), float(by_bias.norm()))
        folded = weight / spread
        yield folded, bias - folded @ centre, loss.item(), gradient, time.perf_counter() - started
        started = time.perf_counter()
