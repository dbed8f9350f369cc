"""What fits the time that a call has; it needs no torch."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

PROCESS_S = 10.0  # until a worker process is ready
_STOPPING_S = 10.0  # for checkpoints in the end; at most a twentieth of the time that there is
_LEAST_BETWEEN, _STEPS_TO_VALIDATION = 10, 3  # steps from validation to validation, and their time over its time
FOLDS, FEWEST_FOLDS, ENOUGH_STEPS = 5, 3, 96  # where five folds leave a training fewer steps, there are only three
_TEST_TIME_SHARE = 1 / 6  # of the minutes, at most, that reading test images takes on top of them
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
        return self.started + 60 * self.minutes - min(_STOPPING_S, 3 * self.minutes)

    @property
    def is_past(self) -> bool:
        """Return whether nothing is waited for any more."""
        return self.clock() >= self.started + 60 * self.minutes

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


def remaining_s(expected_s: float, spent_s: float) -> float:
    """Return the seconds that are left of what shows nothing of how far it is, and was expected to take so many.

    What is expected less what is spent, and at least as long again as it has taken so far. From a tenth to nine tenths
    of the time that it takes in truth, that is at most ten times too short or too long, however wrong the plan was, if
    it was too short. That something takes much less than planned shows with its steps, or its end.
    """
    return max(expected_s - spent_s, spent_s)


@dataclass
class RunTimer:
    """A run that is under way, on the clock of its call, in seconds.

    Until a second step is heard of, it takes what was expected, see `remaining_s`: before steps come weights and
    features of the images. From then on each step that is left takes what steps have taken so far, with the validations
    between them and with what has passed since the last one, so that a long one lengthens what is left at once. What
    follows the last step takes as many times longer than planned as the steps do.

    Attributes:
        planned_s: that the whole run was planned to take.
        began: when it did.
        after_s: of what was planned, after the last step.
        done_s: of what was planned, by earlier attempts.
    """

    planned_s: float
    began: float
    after_s: float = 0.0
    done_s: float = 0.0
    _steps: tuple[int, int, int] = (0, 0, 0)  # the first and the latest that were heard of, and all that there are
    _heard: tuple[float, float] = (0.0, 0.0)  # when these two were

    def stepped(self, step: int, total_steps: int, now: float) -> None:
        """Take in that it has made so many of its steps."""
        first, at = (self._steps[0], self._heard[0]) if self._steps[2] else (step, now)
        self._steps, self._heard = (first, step, total_steps), (at, now)

    @property
    def steps_seen(self) -> int:
        """Return how many steps were made between the first and the latest that were heard of."""
        return self._steps[1] - self._steps[0]

    def spent_s(self, now: float) -> float:
        """Return the seconds since it began."""
        return max(0.0, now - self.began)

    def left_s(self, now: float, pace: float = 1.0) -> float:
        """Return the seconds that are left, where others take `pace` times what they were planned to."""
        if not self.steps_seen:
            return remaining_s(pace * (self.planned_s - self.done_s), self.spent_s(now))
        (first, latest, total), (at, heard) = self._steps, self._heard
        step_s = ((now if latest < total else heard) - at) / self.steps_seen
        planned_s = self.planned_s - self.done_s - self.after_s  # of steps and what is before them
        after_s = self.after_s * (step_s * (total - first) / planned_s if planned_s > 0 else pace)
        return (total - latest) * step_s + after_s if latest < total else remaining_s(after_s, now - heard)

    def takes_s(self, now: float) -> float:
        """Return the seconds of the whole run, as its steps so far tell; what was done before took what was planned."""
        return self.done_s + self.spent_s(now) + self.left_s(now)

    def shown_s(self, now: float, pace: float) -> float | None:
        """Return the seconds of the whole run that it has shown to take; None: it may still take what is expected.

        One that takes longer than expected will be as much over it again.
        """
        over_s = self.spent_s(now) - pace * (self.planned_s - self.done_s)
        if self.steps_seen:
            return self.takes_s(now)
        return self.done_s + self.spent_s(now) + over_s if over_s > 0 else None


def images_to_test(images: int, image_s: float, minutes: float) -> int:
    """Return how many of so many test images are read in their share of the minutes, at least two."""
    return min(images, max(2, int(_TEST_TIME_SHARE * 60 * minutes / max(image_s, 1e-9))))


def first_that_fits(options: Iterable[_Option], seconds: Callable[[_Option], float], limit_s: float) -> _Option | None:
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
