"""Several labels an image, or none: each is there, is not, or is not known.

Labels are (N, K): 1, 0, and NaN where nobody said. The head has an output a label, whose logistic function is the
label's probability; what is not known counts neither in the loss nor in a measure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy

from peft_vit.base.errors import UserError
from peft_vit.base.statistics import TemperaturePrior, recall_threshold, row_weights
from peft_vit.core.config import ClassWeights, LossName
from peft_vit.core.records import Decision, Metrics
from peft_vit.core.tasks.metric import (
    DecidingMetric,
    Flags,
    Floats,
    Ints,
    Labels,
    Outputs,
    area_under_roc,
    bootstrapped,
    cumulative_weights,
    unweighted,
)
from peft_vit.core.tasks.task import (
    CONVERGED,
    LOG_TEMPERATURES,
    Coverage,
    LinearHeads,
    NamedLabels,
    Task,
    coverage_thresholds,
    effective_counts,
    logistic_regressions,
    measured_coverage,
)

if TYPE_CHECKING:
    from torch import Tensor

_FOCUS, _MARGIN = 4, 0.05  # of the asymmetric loss, as its authors have them; what is there has no focus
_CELLS = {"": math.nan, "0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0}


# --- measures: each image weighs as often as it is drawn --------------------------------------------------------------


def average_precision(scores: Floats, positive: Flags, weights: Floats) -> Floats:
    """Return sum_t (R_t - R_(t-1)) P_t over the different scores t, (B,); NaN where no image is positive.

    P_t is the share of positive images among those that score t at least, R_t the share of positive images that do.

    Args:
        scores: (N,).
        positive: (N,).
        weights: of images, (B, N).
    """
    hits, drawn = cumulative_weights(scores, positive, weights)
    with np.errstate(invalid="ignore"):
        precision = np.where(drawn > 0, hits / drawn, 0.0)
        return (np.diff(hits, prepend=0.0) * precision).sum(1) / hits[:, -1]


def _mean_over_labels(measure: Any, labels: Labels, scores: Labels, weights: Floats) -> Floats:
    """Return the mean of a measure over the labels that have it, (B,); 0 where none has."""
    of_labels = []
    for truth, score in zip(labels.T, scores.T, strict=True):
        known = ~np.isnan(truth)
        if known.any():
            of_labels.append(measure(score[known], truth[known] == 1, weights[:, known]))
    values = np.array(of_labels).reshape(len(of_labels), len(weights))
    num_finite = np.isfinite(values).sum(0)
    return np.nan_to_num(values).sum(0) / np.maximum(num_finite, 1)


_map = partial(_mean_over_labels, average_precision)
_auroc = partial(_mean_over_labels, area_under_roc)


def _cases(labels: Labels) -> Sequence[int]:
    """Return of each label that some image has how many pairs, of an image that has it and one that has not, are apart.

    A model whose AUROC is A orders m of them all rightly with a probability of at most A^m.
    """
    positives, negatives = (labels == 1).sum(0), (labels == 0).sum(0)  # (K,) each
    return [max(1, int(pairs)) for pairs in np.minimum(positives, negatives)[positives > 0]] or [1]


def f1(true_positives: Any, predicted: Any, positives: Any) -> Any:
    """Return 2 TP / (predicted + positives), 0 where both are 0."""
    return 2 * true_positives / np.maximum(predicted + positives, 1e-12)


def _confusion(labels: Labels, predicted: Labels, weights: Floats) -> tuple[Floats, Floats, Floats]:
    """Return true positives, predicted positives and positives, weighted and summed over images, (B, K) each.

    Args:
        labels: (N, K).
        predicted: 1 or 0, (N, K).
        weights: of images, (B, N).
    """
    positive, predicted = (labels == 1).astype(float), predicted * ~np.isnan(labels)
    return weights @ (positive * predicted), weights @ predicted, weights @ positive


def _f1_micro(labels: Labels, predicted: Labels, weights: Floats) -> Floats:
    return f1(*(part.sum(1) for part in _confusion(labels, predicted, weights)))


def _f1_macro(labels: Labels, predicted: Labels, weights: Floats) -> Floats:
    """Return the mean over the labels that some image has, (B,); 0 where none has."""
    true_positives, predicted_positives, positives = _confusion(labels, predicted, weights)
    return f1(true_positives, predicted_positives, positives).sum(1) / np.maximum((positives > 0).sum(1), 1)


# --- the task ---------------------------------------------------------------------------------------------------------


class _Multilabel(Task):
    """See `Task`."""

    name = "multilabel"
    column = "lists"
    metrics: Mapping[str, DecidingMetric] = {
        metric.name: metric
        for metric in (
            bootstrapped("map", "mean average precision", _map, cases=_cases, suffix=" mAP"),
            bootstrapped("auroc", "mean AUROC", _auroc, cases=_cases, suffix=" AUROC"),
            bootstrapped("f1_macro", "macro F1", _f1_macro, cases=_cases, at_thresholds=True, suffix=" macro F1"),
            bootstrapped("f1_micro", "micro F1", _f1_micro, cases=_cases, at_thresholds=True, suffix=" micro F1"),
        )
    }
    loss_names = ("binary_cross_entropy", "asymmetric")
    outputs = "labels"
    several = "{:,} images with up to {} labels each (multilabel)"
    gap = "{} mean average precision is the mean over {} of {} classes"

    def recognizes(self, cells: Mapping[str, Sequence[str]]) -> bool:
        """Return whether there is a column a class, or one with several in a cell."""
        if set(cells) == {"label"}:
            return any("|" in cell for cell in cells["label"])
        return all(cell.lower() in _CELLS for column in cells.values() for cell in column)

    def fault(self, cells: Mapping[str, str]) -> str | None:
        """Refuse what is not 0, 1 or nothing, unless names are in one cell."""
        wrong = [cell for column, cell in cells.items() if column != "label" and cell.lower() not in _CELLS]
        return f"expected 0, 1, or nothing for what is not known, got {wrong[0]!r}" if wrong else None

    def read(self, texts: Sequence[str], columns: Sequence[str]) -> NamedLabels:
        """Return names and labels (N, K); of `cat|dog` all that is not named is not there."""
        if list(columns) == ["label"]:
            rows = [{name.strip() for name in text.split("|")} - {""} for text in texts]
            names = tuple(sorted(set().union(*rows)))
            labels = np.array([[float(name in row) for name in names] for row in rows]).reshape(len(rows), len(names))
        else:
            names = tuple(columns)
            labels = np.array([[_CELLS[cell.lower()] for cell in text.split("|")] for text in texts])
        return names, labels

    def refuse_one_answer(self, names: Sequence[str], labels: Labels, image: str) -> None:
        """Refuse a label that all images have, or none."""
        for place, name in enumerate(names):
            if len(set(labels[:, place]) & {0.0, 1.0}) < 2:
                what = "has" if (labels[:, place] == 1).any() else "is without"
                remedy = "add images of both kinds, or take the class out"
                raise UserError(f"every {image} {what} '{name}', so nothing can be learned about it; {remedy}")

    def synthetic_labels(self, classes: Ints) -> NamedLabels:
        """Return a label a class, and that of the class before."""
        one_hot = classes[:, None] == np.arange(classes.max() + 1)  # (N, K)
        names = tuple(f"class_{k}" for k in range(one_hot.shape[1]))
        return names, (one_hot | np.roll(one_hot, 1, axis=1)).astype(float)

    def text(self, label: Any, names: Sequence[str]) -> str:
        """Return the present labels, and the unknown ones with a question mark."""
        marked = [name if value == 1 else f"{name}?" for name, value in zip(names, label, strict=True) if value != 0]
        return "|".join(marked) or "none"

    def members(self, labels: Labels, place: int) -> Flags:
        """Return which images have a label, (N,)."""
        return labels[:, place] == 1

    def label_ids(self, labels: Labels) -> Ints:
        """Return equal numbers for equal labels."""
        return np.unique(np.nan_to_num(labels, nan=-1.0), axis=0, return_inverse=True)[1].reshape(-1)

    def strata(self, labels: Labels) -> Flags:
        """Return which images have each label, (N, K)."""
        return labels == 1

    def loss_weights(self, counts: Ints, scheme: ClassWeights) -> Floats:
        """Return weights in inverse proportion to `effective_counts`, with a mean of 1, (K,)."""
        weights: Floats = 1 / effective_counts(counts, scheme)
        return weights / weights.mean()

    def _each(self, outputs: Tensor, labels: Tensor, name: LossName | None = None) -> Tensor:
        """Return the loss of each label, (N, K); 0 where unknown."""
        from torch.nn import functional as F

        known = labels.isfinite()
        targets = labels.nan_to_num(0.0).to(outputs.dtype)
        if name == "asymmetric":
            q = (outputs.sigmoid() - _MARGIN).clamp(min=0)
            absent = (targets - 1) * q**_FOCUS * (1 - q).log()
            return (absent - targets * F.logsigmoid(outputs)) * known
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none") * known

    def loss(
        self,
        outputs: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        label_smoothing: float = 0.0,
        name: LossName | None = None,
    ) -> Tensor:
        """Return sum_n sum_k w[k] (-t log p - (1 - t) log(1 - p))[n, k] / N over what is known.

        The asymmetric loss (Ridnik et al. 2021, arXiv 2009.14119) has q^4 log(1 - q) with q = max(p - 0.05, 0) instead
        of log(1 - p): of labels that are not there only those count that the model is wrong about.

        Args:
            outputs: (N, K).
            labels: (N, K), from 0 to 1, or NaN.
            weights: w, (K,); None: all 1.
            label_smoothing: none is done.
            name: binary_cross_entropy, asymmetric.
        """
        each = self._each(outputs, labels, name)
        return (each if weights is None else each * weights).sum() / len(labels)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the sum over labels, (N,)."""
        return self._each(outputs, labels).sum(1)

    def linear_heads(
        self, z: Floats, labels: Labels, strengths: Sequence[float], weights: Floats, tolerance: float = CONVERGED
    ) -> LinearHeads:
        """Yield a logistic regression a label, by scikit-learn, on the images of which it is known.

        Where all of these agree, it is the constant that says so of one image more of each kind.
        """
        fits = logistic_regressions(labels.shape[1], tolerance)
        for l2 in strengths:
            W, b = np.zeros((len(fits), z.shape[1])), np.zeros((len(fits), 1))  # (K, D), (K, 1)
            for k, (fit, truth) in enumerate(zip(fits, labels.T, strict=True)):
                known = ~np.isnan(truth)
                positives = int((truth[known] == 1).sum())
                if not 0 < positives < known.sum():
                    b[k] = math.log((positives + 1) / (known.sum() - positives + 1))
                    continue
                (W[k],), b[k] = fit(z[known], truth[known], weights[known], 1 / (l2 * weights.sum()))
            yield W, b[:, 0]

    def guess_loss(self, outputs: Tensor, labels: Tensor) -> float:
        """Return the loss of guessing by frequency."""
        share = (labels.nansum(0) / labels.isfinite().sum(0).clamp(min=1)).clamp(1e-6, 1 - 1e-6)  # (K,)
        return float(self.loss(share.logit().expand_as(outputs), labels, None))

    def measure(self, outputs: Outputs, labels: Labels, decision: Decision | None = None) -> Metrics:
        """Return every measure of a split; F1 and exact match at the decision's thresholds, or at the best of these."""
        scores, known = self.predicted(outputs, decision), ~np.isnan(labels)
        thresholds = _thresholds(scores, labels, np.ones(len(labels))) if decision is None else decision.thresholds
        predicted, positive = scores >= thresholds, labels == 1
        likelihood = np.where(positive, scores, 1 - scores)
        return Metrics(
            n=len(labels),
            nll=float(np.abs(np.log(np.maximum(likelihood, 1e-300)) * known).sum(1).mean()),
            more={
                "map": unweighted(_map, labels, scores),
                "auroc": unweighted(_auroc, labels, scores),
                "f1_micro": unweighted(_f1_micro, labels, predicted),
                "f1_macro": unweighted(_f1_macro, labels, predicted),
                "exact_match": float(((predicted == positive) | ~known).all(1).mean()),
            },
        )

    def predicted(self, outputs: Outputs, decision: Decision | None = None) -> Labels:
        """Return the probability of each label, (N, K)."""
        z = outputs.astype(np.float64) / (1.0 if decision is None else decision.temperature)
        return np.exp(np.minimum(z, 0)) / (1 + np.exp(-np.abs(z)))  # without an overflow

    def final_predictions(self, outputs: Outputs, decision: Decision | None = None) -> Flags:
        """Return which labels reach their thresholds, or 1/2, (N, K)."""
        return above_thresholds(self.predicted(outputs, decision), decision)

    def constant(self, labels: Labels) -> Labels:
        """Return that nothing is there, which ranks all images alike."""
        return np.zeros_like(labels, dtype=float)

    def decide(self, outputs: Outputs, labels: Labels, prior: TemperaturePrior, images: Ints | None = None) -> Decision:
        """Return the most probable temperature, and for each label the threshold with the largest F1."""
        width = labels.shape[1]
        if not len(labels):
            return Decision(images=0, thresholds=(0.5,) * width)
        z, y, known = outputs.astype(np.float64), np.nan_to_num(labels), ~np.isnan(labels)
        weights, count = row_weights(len(labels), images)

        def loss(log_t: float) -> float:
            scaled = z / math.exp(log_t)
            nll = weights @ ((np.logaddexp(0, scaled) - y * scaled) * known).sum(1)
            return float(nll + (log_t - math.log(prior.median)) ** 2 / (2 * prior.spread**2))

        log_t = scipy.optimize.minimize_scalar(loss, bounds=LOG_TEMPERATURES, method="bounded").x
        decision = Decision(images=count, temperature=math.exp(float(log_t)))
        scores = self.predicted(outputs, decision)
        coverages, set_thresholds = coverage_thresholds(
            lambda coverage: recall_threshold(scores, labels, coverage, images)
        )
        sets = {"coverages": coverages, "set_thresholds": set_thresholds}
        return decision.model_copy(update={"thresholds": _thresholds(scores, labels, weights), **sets})

    def covered(self, decision: Decision, outputs: Outputs, labels: Labels) -> Coverage:
        """Return which share of an image's labels is in its set, and how many labels are, over images that have one."""
        positive = labels == 1  # (N, K)
        labelled = positive.any(1)
        if not labelled.any():
            return {}, {}
        scores, positive = self.predicted(outputs, decision)[labelled], positive[labelled]

        def held_and_size(coverage: float) -> tuple[float, float]:
            inside = scores >= decision.threshold(coverage)  # (N, K)
            return ((inside & positive).sum(1) / positive.sum(1)).mean(), inside.sum(1).mean()

        return measured_coverage(decision, held_and_size)


def above_thresholds(predicted: Labels, decision: Decision | None) -> Flags:
    """Return which labels reach their thresholds, or 1/2, by their probabilities (N, K)."""
    return predicted >= (0.5 if decision is None else decision.thresholds)


def _thresholds(scores: Labels, labels: Labels, weights: Floats) -> tuple[float, ...]:
    return tuple(_threshold(score, truth, weights) for score, truth in zip(scores.T, labels.T, strict=True))


def _threshold(scores: Floats, truth: Floats, weights: Floats) -> float:
    """Return the probability from which on a label is reported for the largest F1; 1/2 where no image has it.

    It lies in the middle between two probabilities; of equal ones the highest is taken.
    """
    known = ~np.isnan(truth)
    scores, positive, weights = scores[known], truth[known] == 1, weights[known]
    if not positive.any():
        return 0.5
    hits, drawn = (part[0] for part in cumulative_weights(scores, positive, weights[None]))
    best = int(f1(hits, drawn, weights @ positive).argmax())
    levels = np.unique(scores)[::-1]  # (different scores,), falling
    return float((levels[best] + (levels[best + 1] if best + 1 < len(levels) else 0.0)) / 2)


MULTILABEL: Task = _Multilabel()
