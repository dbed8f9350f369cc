"""What runs take on this machine: a forward pass and a training step at each image size, measured at two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peft_vit.backbones import BackboneShape
from peft_vit.config import ExperimentConfig, StudyConfig, study_from_mapping
from peft_vit.costs.estimate import START_S, TIME_OUTSIDE_PRODUCTS, Workload
from peft_vit.costs.pace import MeasuredPace, Pace, ReckonedPace
from peft_vit.data import ImageIndex, open_index
from peft_vit.methods import METHODS
from peft_vit.studies.plan import decide_precision, splits_of, workload_of
from peft_vit.studies.profiling import measure_pace

NOT_MEASURED = "not measured"
_SHORTEST_S = 5e-5  # of a forward pass; less is rounded to nothing
MeasurePace = Callable[[StudyConfig, ImageIndex, Workload, float, Callable[[str], None]], Pace]


@dataclass(frozen=True)
class Machine:
    """Seconds, for one backbone; others take as much longer as they multiply more.

    Attributes:
        start_s: of all that a run does once.
        process_s: until a worker process is ready.
        image_s: of a forward pass for each image, by multiply-adds.
        step_s: of a training step, the slowest of those measured.
    """

    start_s: float
    process_s: float
    image_s: Mapping[int, float]
    step_s: Mapping[int, float]

    def image(self, shape: BackboneShape) -> float:
        """Return the seconds of a forward pass for each of its images."""
        return _at(self.image_s, shape.multiply_adds)

    def step(self, shape: BackboneShape) -> float:
        """Return the seconds of a training step."""
        return _at(self.step_s, shape.multiply_adds)

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Machine:
        """Return what was kept as a plain value."""
        found = {
            name: {int(products): seconds for products, seconds in kept[name].items()} for name in ("image_s", "step_s")
        }
        return cls(kept["start_s"], kept["process_s"], **found)


def said_ms(seconds: float) -> str:
    """Return milliseconds as text; a machine that is too busy to measure them tells of events all at once."""
    return f"{1000 * seconds:.1f} ms" if seconds >= _SHORTEST_S else NOT_MEASURED


def _at(points: Mapping[int, float], products: int) -> float:
    """Return the seconds at the nearest point, times how much more is multiplied."""
    nearest = min(points, key=lambda one: abs(one - products))
    return points[nearest] * products / nearest


def measured(
    mapping: Mapping[str, Any],
    shapes: list[BackboneShape],
    budget_s: float,
    tell: Callable[[str], None],
    measure: MeasurePace = measure_pace,
) -> dict[str, Any]:
    """Return what a study's steps and forward passes take, as a plain value, see `Machine`.

    Args:
        mapping: a study at the largest of the sizes.
        shapes: of its backbone at each size.
        budget_s: seconds that measuring takes at most.
        tell: told what is measured.
        measure: see `measure_pace`.
    """
    study = study_from_mapping(dict(mapping), file=mapping["name"])
    study = study.model_copy(update={"precision": decide_precision(study, None).chosen})
    index = open_index(study.data)
    workload = workload_of(study, index, splits_of(index, study)[study.seeds[0]])
    pace = measure(study, index, workload, budget_s, tell)
    image_s = {one.multiply_adds: _image_s(pace, one) for one in shapes}
    step_s = {
        one.multiply_adds: max(_step_s(pace, experiment, one) for experiment in study.experiments) for one in shapes
    }
    start_s = max(map(pace.start_s, study.experiments)) if isinstance(pace, MeasuredPace) else START_S
    return {"start_s": start_s, "process_s": pace.process_s, "image_s": image_s, "step_s": step_s}


def _image_s(pace: Pace, shape: BackboneShape) -> float:
    if isinstance(pace, MeasuredPace):
        return pace.image_s(shape.tokens)
    assert isinstance(pace, ReckonedPace)
    return TIME_OUTSIDE_PRODUCTS * shape.multiply_adds / pace.rate


def _step_s(pace: Pace, experiment: ExperimentConfig, shape: BackboneShape) -> float:
    if isinstance(pace, MeasuredPace):
        return pace.step_s(experiment, shape.tokens)
    return METHODS[experiment.method].forward_passes * experiment.training.batch_size * _image_s(pace, shape)
