"""What fits the time that a call has; it needs no torch."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

_STOPPING_S = 10.0  # for checkpoints in the end; at most a twentieth of the time that there is
_LEAST_BETWEEN, _STEPS_TO_VALIDATION = 10, 3  # steps from validation to validation, and their time over its time
FOLDS, FEWEST_FOLDS, ENOUGH_STEPS = 5, 3, 96  # where five folds leave a training fewer steps, there are only three
TEST_SHARE = 1 / 6  # of the minutes, at most, that reading test images takes on top of them
_Option = TypeVar("_Option")


@dataclass(frozen=True)
class Limit:
    """The time that a call has, in seconds on `clock`, from when it was given."""

    minutes: float
    started: float
    clock: Callable[[], float] = time.monotonic

    @property
    def over_at(self) -> float:
        """Return when what still runs is stopped, so that it can write its checkpoint."""
        return self.past_at - min(_STOPPING_S, self.minutes * 60 / 20)

    @property
    def past_at(self) -> float:
        """Return when it is no longer waited for."""
        return self.started + 60 * self.minutes

    @property
    def left_s(self) -> float:
        """Return the seconds until what still runs is stopped."""
        return self.over_at - self.clock()


@dataclass
class Pace:
    """What a call's finished runs took, over what they were planned to: it corrects what others are planned to take."""

    taken_s: float = 0.0
    planned_s: float = 0.0

    def add(self, taken_s: float, planned_s: float) -> None:
        """Take in a finished run."""
        self.taken_s += taken_s
        self.planned_s += planned_s

    @property
    def factor(self) -> float:
        """Return how many times longer runs take than they were planned to."""
        return self.taken_s / self.planned_s if self.planned_s else 1.0


def images_to_test(images: int, image_s: float, minutes: float) -> int:
    """Return how many of so many test images are read in their share of the minutes, at least two."""
    return min(images, max(2, int(TEST_SHARE * 60 * minutes / max(image_s, 1e-9))))


def fit(options: Iterable[_Option], seconds: Callable[[_Option], float], limit_s: float) -> _Option | None:
    """Return the first of some options, the best one first, that takes no longer than a limit; None: none does."""
    return next((option for option in options if seconds(option) <= limit_s), None)


def validate_every(validation_images: int, batch_size: int) -> int:
    """Return the steps between validations, which then take about a third of what the steps take."""
    return max(_LEAST_BETWEEN, round(_STEPS_TO_VALIDATION * validation_images / (2 * batch_size)))


def makespan(seconds: Iterable[float], workers: int, *, busy: Iterable[float] = ()) -> float:
    """Return when the last run ends, if each in its turn goes to the worker that is free first.

    Args:
        seconds: of each run, in the order in which they start.
        workers: that work at a time.
        busy: for how long some of them still are.
    """
    free_at = sorted(busy)[-workers:]
    free_at += [0.0] * (workers - len(free_at))
    heapq.heapify(free_at)
    for run_s in seconds:
        heapq.heapreplace(free_at, free_at[0] + run_s)
    return max(free_at)
