"""What came of a model's test on new labelled images, as a page and its lines show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from peft_vit.base.errors import UserError
from peft_vit.base.statistics import Interval, difference_interval
from peft_vit.core.config import TaskName
from peft_vit.core.records import Calibrated, Decision, Metrics, Predictions, TestedCalibration
from peft_vit.core.tasks import TASKS, DecidingMetric, Labels, rows_of, thresholds_of

if TYPE_CHECKING:
    from peft_vit.deploy.page.model_quality import ModelQuality


@dataclass(frozen=True)
class ImagesTest:
    """What a model says of labelled images that came later; the first fields are called as those of a `RunRecord`.

    Attributes:
        metric: what decides.
        own: the same metric on the model's own test images; None: its record is not there.
        unreadable: what is wrong with images that are left out.
    """

    task: TaskName
    class_names: Sequence[str]
    predictions: Predictions
    calibrated: Calibrated | None
    decision: Decision | None
    test: Metrics
    tested_calibration: TestedCalibration
    metric: DecidingMetric
    own: Interval | None
    unreadable: Sequence[UserError]

    @property
    def _labels(self) -> Labels:
        return rows_of(self.predictions.labels)

    @cached_property
    def value(self) -> Interval:
        """Return what decides."""
        predicted = rows_of(self.predictions.predicted)
        return self.metric.interval(self._labels, predicted, thresholds_of(self.decision))

    @cached_property
    def constant(self) -> float:
        """Return the same of always giving one answer."""
        return self.metric.interval(self._labels, TASKS[self.task].constant(self._labels)).estimate

    @cached_property
    def quality(self) -> ModelQuality | None:
        """Return what it confuses; None of several labels, or of numbers."""
        from peft_vit.deploy.page.model_quality import model_quality

        return model_quality(self)

    @property
    def change(self) -> Interval | None:
        """Return how much more it has here than on its own test images; None: that is not known."""
        return None if self.own is None else difference_interval(self.own, self.value)
