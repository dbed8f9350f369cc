"""How good predictions are on one scale for all tasks: shares, of which more is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from peft_vit.base.statistics import TemperaturePrior
from peft_vit.core.records import Decision, Metrics
from peft_vit.core.tasks.classification import ACCURACY, CLASSIFICATION
from peft_vit.core.tasks.metric import DecidingMetric, Floats, Ints, Labels, Outputs
from peft_vit.core.tasks.task import Task

# Of temperatures that folds tell: no image has chosen a step, and they are few. It is less known than after validation.
OF_FOLDS = TemperaturePrior(median=1.5, spread=0.6)


@dataclass(frozen=True)
class Scores:
    """A metric as shares of which more is better: itself, or minus an error in standard deviations of the numbers.

    A margin of 0.01 is then a point of accuracy, or of mean average precision, and of an error 1 % of the numbers'
    standard deviation.

    Attributes:
        task: as it was learned.
        metric: that decides.
        deviation: what errors are divided by, in the numbers' unit; 1 where the metric has none.
    """

    task: Task = CLASSIFICATION
    metric: DecidingMetric = ACCURACY
    deviation: float = 1.0

    @classmethod
    def on(cls, task: Task, metric: DecidingMetric, labels: Labels) -> Self:
        """Return the scores of models that learn from images with these labels."""
        with_unit = metric.has_unit and labels.shape[1] == 1  # of several numbers errors are in deviations already
        return cls(task.fitted(labels), metric, float(labels.std()) if with_unit else 1.0)

    @property
    def factor(self) -> float:
        """Return the factor from a score to a value of the metric."""
        return self.metric.sign * self.deviation

    @property
    def best(self) -> float:
        """Return the score of predictions that are all right."""
        return 0.0 if self.metric.sign < 0 else 1.0

    @property
    def unit(self) -> str:
        """Return the unit of a hundredth."""
        return "% of a standard deviation" if self.metric.has_unit else "points"

    def hundredths(self, share: float) -> str:
        """Return a margin in words: 1 point, 0.5 points, 1 % of a standard deviation."""
        return f"{100 * share:.4g} {'point' if self.unit == 'points' and 100 * share == 1 else self.unit}"

    def of(self, metrics: Metrics) -> float:
        """Return the score of measures."""
        return self.metric.of(metrics) / self.factor

    def text(self, share: float) -> str:
        """Return a score as a terminal shows the metric's value."""
        return self.metric.text(share * self.factor)

    def by_image(self, outputs: Outputs, labels: Labels, images: Ints | None = None) -> Floats:
        """Return contributions of images, (N,), whose mean is the score, see `DecidingMetric.by_image`.

        Args:
            outputs: of the task's head, (N, K).
            labels: N.
            images: (N,) which image each row is of, as where folds are repeated; None: each of another.
        """
        decision = self.task.decide(outputs, labels, OF_FOLDS, images)
        predicted = self.task.predicted(outputs, decision)
        return self.metric.by_image(labels, predicted, thresholds_of(decision)) / self.factor

    def image_weights(self, labels: Labels) -> Floats | None:
        """Return weights of images, (N,), where classes have equal weight; None: equal ones."""
        return 1 / np.bincount(labels)[labels] if self.metric.equal_classes else None


def thresholds_of(decision: Decision | None) -> tuple[float, ...]:
    """Return from which probabilities on a model reports its labels; none of other models."""
    return () if decision is None else decision.thresholds
