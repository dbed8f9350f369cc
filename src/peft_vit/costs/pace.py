"""How long the runs of a study take at any size, reckoned from real steps at one or two sizes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peft_vit.config import ExperimentConfig, MethodName
from peft_vit.costs.cache import Costs
from peft_vit.methods import METHODS

_PROCESS_S = 10.0  # until a worker process is ready, where that was not measured


@dataclass(frozen=True)
class ReckonedPace:
    """What runs cost by how much they multiply, where nothing was measured; `rate`: multiply-adds per second."""

    rate: float
    process_s: float = _PROCESS_S


@dataclass(frozen=True)
class Probe:
    """What runs of a method cost with so many tokens an image and so many images a batch."""

    method: MethodName
    tokens: int
    batch_size: int
    costs: Costs

    @property
    def batch_tokens(self) -> int:
        """Return the tokens of a batch."""
        return self.tokens * self.batch_size


@dataclass(frozen=True)
class MeasuredPace:
    """What was measured, by experiment, at one size or two, the larger one first; of one experiment at least.

    `process_s`: seconds until a worker process is ready for its first run.
    """

    probes: Mapping[str, Sequence[Probe]]
    process_s: float

    def start_s(self, experiment: ExperimentConfig) -> float:
        """Return the seconds of all that a run does once."""
        own = self.probes.get(experiment.name) or self._all()
        return statistics.median(probe.costs.start_s for probe in own)

    def step_s(self, experiment: ExperimentConfig, tokens: int) -> float:
        """Return the seconds of a step: a part that no size changes, and one in proportion to its batch's tokens.

        An experiment that was measured at one size only is taken to share them out as one that was at two does, and
        one that was not measured to take as much longer than another as it multiplies more.
        """
        own = self.probes.get(experiment.name, ())
        like = max(own, *self.probes.values(), key=len)  # itself, if no other was measured at more sizes
        if own:
            longer = own[0].costs.step_s / _line(like, own[0].batch_tokens)
        else:
            longer = METHODS[experiment.method].forward_passes / METHODS[like[0].method].forward_passes
        return longer * _line(like, tokens * experiment.training.batch_size)

    def image_s(self, tokens: int) -> float:
        """Return the seconds of a forward pass for each of its images: a line through the smallest and the largest."""
        by_tokens: dict[int, list[float]] = {}
        for probe in self._all():
            by_tokens.setdefault(probe.tokens, []).append(probe.costs.image_s)
        points = sorted((count, statistics.median(found)) for count, found in by_tokens.items())
        return _between(points[0], points[-1], tokens)

    def _all(self) -> list[Probe]:
        return [probe for probes in self.probes.values() for probe in probes]


Pace = MeasuredPace | ReckonedPace


def _line(probes: Sequence[Probe], batch_tokens: int) -> float:
    """Return the seconds of a step by a line through what was measured."""
    points = [(probe.batch_tokens, probe.costs.step_s) for probe in probes]
    return _between(min(points), max(points), batch_tokens)


def _between(small: tuple[int, float], large: tuple[int, float], x: int) -> float:
    """Return y at x by a line through two points that does not fall; one through 0, if it would begin below."""
    (left, low), (right, high) = small, large
    if left == right:
        return high * x / right
    slope = max(0.0, (high - low) / (right - left))
    at_zero = high - slope * right
    return high * x / right if at_zero < 0 else at_zero + slope * x
