"""Numbers: each image has one, or several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np

from peft_vit.base.statistics import spearman
from peft_vit.core.records import Decision
from peft_vit.core.tasks import REGRESSION, Meaning
from peft_vit.core.tasks.metric import Outputs, unweighted
from peft_vit.core.tasks.regression import (
    half_widths,
    mean_absolute_error,
    r_squared,
    root_mean_squared_error,
    scales_of,
)
from peft_vit.deploy.presentation.presentation import (
    Errors,
    ImageSelection,
    LabelledOutputs,
    Prediction,
    Presentation,
    Rows,
)

_IMAGES_SHOWN, _NUMBERS_SHOWN = 12, 3  # with the largest errors, and of each those of its numbers
_USUAL = 0.9  # coverage of an interval where none is asked for


class Numbers(Presentation):
    """See `Presentation`."""

    task = REGRESSION
    note = "Errors are in the number's unit, beside the error of always saying the median."
    promise = (
        "Intervals",
        "Intervals that hold the number",
        "Mean width",
        "On the test images, which chose nothing; widths of several numbers are in standard deviations. `predict` "
        "gives such intervals, of 90 % or of --coverage. They hold about as often as asked.",
    )
    holds = "The interval at {0:g} % holds the true number of about {0:g} in 100 images"

    def prediction(
        self, outputs: Outputs, names: Sequence[str], meaning: Meaning, coverage: float | None, top: int
    ) -> Prediction:
        """Return each number with the interval that holds it in a share of images, 0.9 if none is asked for."""
        decision = cast("Decision", meaning)
        predicted = self.task.predicted(outputs[None], decision)  # (1, K)
        ends = [predicted]
        if decision.coverages:
            widths = half_widths(decision, predicted, coverage or _usual(decision))
            ends = [predicted, predicted - widths, predicted + widths]
        rows = np.concatenate(ends).T.tolist()  # (K, 1 or 3)
        return Prediction(numbers={name: tuple(row) for name, row in zip(names, rows, strict=True)})

    def for_browser(self, meaning: Meaning, coverage: float | None) -> dict[str, Any]:
        """Return units, and how wide intervals are."""
        decision = cast("Decision", meaning)
        at, sizes = zip(*scales_of(decision), strict=True)
        wide = {"half_widths": decision.threshold(coverage), "at": at, "scale": sizes} if coverage else {}
        return {
            "says": "{} numbers" if len(decision.center) > 1 else "a number",
            "kind": "numbers",
            "center": decision.center,
            "spread": decision.spread,
            "set": {"coverage": coverage, **wide} if coverage else None,
        }

    def cells(self, prediction: Prediction, with_sets: bool) -> dict[str, Any]:
        """Return each number, and its interval's ends."""
        ends = ("", "_low", "_high")
        return {
            name + end: cell
            for name, values in prediction.numbers.items()
            for end, cell in zip(ends, values, strict=False)
        }

    def measures(self, outputs: LabelledOutputs) -> Rows:
        """Return mean, errors, R² and rank correlation of each number."""
        labels, predicted, names, _ = outputs
        rows = []
        for k, name in enumerate(names):
            y, p = labels[:, [k]], predicted[:, [k]]
            rows.append(
                {
                    "Number": name,
                    "Images": len(y),
                    "Mean": float(y.mean()),
                    "Standard deviation": float(y.std()),
                    "Mean absolute error": unweighted(mean_absolute_error, y, p),
                    "of the median": unweighted(mean_absolute_error, y, self.task.constant(y)),
                    "RMSE": unweighted(root_mean_squared_error, y, p),
                    "R²": unweighted(r_squared, y, p),
                    "Spearman": spearman(p[:, 0], y[:, 0]),
                }
            )
        return rows

    def errors(self, outputs: LabelledOutputs) -> Errors:
        """Return predicted less true, and how far the usual intervals reach."""
        labels, predicted, _, decision = outputs
        if decision is None or not decision.coverages:
            return Errors(predicted - labels, None)
        coverage = _usual(decision)
        return Errors(predicted - labels, half_widths(decision, predicted, coverage), coverage)

    def image_selections(self, outputs: LabelledOutputs) -> Iterator[ImageSelection]:
        """Yield the images with the largest errors, in standard deviations."""
        labels, predicted, names, decision = outputs
        errors = self.errors(outputs)
        spread = (1.0,) if decision is None else decision.spread
        sizes = np.abs(errors.sizes) / np.array(spread)  # (N, K)
        worst = np.argsort(-sizes.mean(1), kind="stable")[:_IMAGES_SHOWN].tolist()
        images = []
        for n in worst:
            lines = []
            for k in np.argsort(-sizes[n], kind="stable")[:_NUMBERS_SHOWN].tolist():
                reach = "" if errors.reach is None else f" ± {errors.reach[n, k]:.3g}"
                lines.append(f"{names[k]}: {predicted[n, k]:.3g}{reach}, is {labels[n, k]:.3g}")
            images.append((n, tuple(lines)))
        rule = "Sorted by the size of the error. Is the number right?"
        yield ImageSelection(
            "worst", "The largest errors", rule, ((f"{len(worst)} of {len(labels)} images", tuple(images)),)
        )


def _usual(decision: Decision) -> float:
    """Return the coverage of intervals where none is asked for: 0.9, or the largest that there is below."""
    return min(_USUAL, decision.coverages[-1])
