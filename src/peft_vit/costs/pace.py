"""How long the runs of a study take at any size, reckoned from real steps at one or two sizes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peft_vit.config import ExperimentConfig, MethodName
from peft_vit.costs.cache import Costs
from peft_vit.costs.estimate import Workload, measured_images
from peft_vit.methods import METHODS
from peft_vit.records import RunSpec
from peft_vit.training import flip_axes

_SEEDS_OF_A_STUDY = 6  # that share features; a verdict takes as many
_FITS_S = 3.0  # of a probe at each strength


@dataclass(frozen=True)
class Probe:
    """What runs of a method cost with so many tokens an image and so many images a batch."""

    method: MethodName
    tokens: int
    batch_size: int
    costs: Costs


@dataclass(frozen=True)
class Pace:
    """What runs cost on this machine while as many run as the study has workers.

    Attributes:
        probes: by experiment, one or two of it, the larger one first; at least one experiment has some.
        process_s: seconds until a worker process is ready for its first run.
    """

    probes: Mapping[str, Sequence[Probe]]
    process_s: float

    def run_s(self, spec: RunSpec, workload: Workload) -> float:
        """Return the seconds of a run.

        Args:
            spec: of the run.
            workload: of its study, with the sizes that it has.
        """
        if spec.experiment.is_probe:
            return probe_s(self, spec, workload)
        return self.trained_s(spec, workload)

    def trained_s(self, spec: RunSpec, workload: Workload) -> float:
        """Return the seconds of a run that trains step by step, and validates after each epoch."""
        steps = spec.experiment.total_steps(workload.train)
        validated = spec.experiment.validations(workload.train) * workload.validation
        evaluated = validated + workload.test + measured_images(spec, workload)
        step_s, image_s = self.step_s(spec.experiment, workload.tokens), self.image_s(workload.tokens)
        return self.start_s(spec.experiment) + steps * step_s + evaluated * image_s

    def start_s(self, experiment: ExperimentConfig) -> float:
        """Return the seconds of all that a run does once, beside what its study's `measures` ask for."""
        own = self.probes.get(experiment.name) or self._all()
        return statistics.median(probe.costs.start_s for probe in own)

    def step_s(self, experiment: ExperimentConfig, tokens: int) -> float:
        """Return the seconds of a step: a part that no size changes, and one in proportion to its batch's tokens.

        An experiment that was measured at one size only is taken to share them out as one that was at two does, and
        one that was not measured to take as much longer than another as it multiplies more.
        """
        batch_tokens = tokens * experiment.training.batch_size
        at_two = next((probes for probes in self.probes.values() if len(probes) > 1), None)
        own = self.probes.get(experiment.name)
        if own is not None and (len(own) > 1 or at_two is None):
            return _line(own, batch_tokens)
        like = at_two or next(iter(self.probes.values()))
        if own is None:
            longer = experiment.kind.forward_passes / METHODS[like[0].method].forward_passes
        else:
            longer = own[0].costs.step_s / _line(like, own[0].tokens * own[0].batch_size)
        return longer * _line(like, batch_tokens)

    def image_s(self, tokens: int) -> float:
        """Return the seconds of a forward pass for each of its images: a line through the smallest and the largest."""
        by_tokens: dict[int, list[float]] = {}
        for probe in self._all():
            by_tokens.setdefault(probe.tokens, []).append(probe.costs.image_s)
        points = sorted((count, statistics.median(found)) for count, found in by_tokens.items())
        return _between(points[0], points[-1], tokens)

    def _all(self) -> list[Probe]:
        return [probe for probes in self.probes.values() for probe in probes]


def probe_s(pace: Pace, spec: RunSpec, workload: Workload) -> float:
    """Return the seconds of a linear probe, a share of what all seeds take together.

    Each image passes through the model once in every way in which training shows it, whatever the number of seeds:
    runs share its features. Seeds that train on other images have taken about twice as many of them in the end.
    """
    trained = len(flip_axes(spec.data.flips)) * workload.train * (2 if spec.data.train_subset == "per_seed" else 1)
    images = (trained + workload.validation + workload.test) / _SEEDS_OF_A_STUDY + measured_images(spec, workload)
    return pace.start_s(spec.experiment) + _FITS_S + images * pace.image_s(workload.tokens)


def _line(probes: Sequence[Probe], batch_tokens: int) -> float:
    """Return the seconds of a step by a line through what was measured."""
    points = [(probe.tokens * probe.batch_size, probe.costs.step_s) for probe in probes]
    return _between(min(points), max(points), batch_tokens)


def _between(small: tuple[int, float], large: tuple[int, float], x: int) -> float:
    """Return y at x by a line through two points that does not fall; one through 0, if it would begin below."""
    (left, low), (right, high) = small, large
    if left == right:
        return high * x / right
    slope = max(0.0, (high - low) / (right - left))
    at_zero = high - slope * right
    return high * x / right if at_zero < 0 else at_zero + slope * x
