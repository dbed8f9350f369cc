"""What runs take on this machine, measured once for a tuning, at two image sizes if there is time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from peft_vit.config import StudyConfig, study_from_mapping
from peft_vit.data import ImageIndex, open_index
from peft_vit.forecasting.estimate import Line, Throughput, Workload
from peft_vit.studies.plan import decide_precision, splits_of, workload_of
from peft_vit.tuning.context import TuningContext
from peft_vit.tuning.recipe import Recipe, shared_training

_LEAST_S = 20.0  # of measuring
_SHORTEST_S = 5e-5  # of a forward pass; less is rounded to nothing
MeasureThroughput = Callable[[StudyConfig, ImageIndex, Workload, float, Callable[[str], None]], Throughput]


def said_ms(seconds: float) -> str:
    """Return milliseconds as text; a machine that is too busy to measure them tells of events all at once."""
    return f"{1000 * seconds:.1f} ms" if seconds >= _SHORTEST_S else "not measured"


def throughput_of(context: TuningContext, recipe: Recipe, measure: MeasureThroughput) -> Throughput:
    """Return what runs take here, measured by a few steps of a recipe at the first call, and tell it."""
    tell = context.state.tell

    def decide() -> dict[str, Any]:
        training = shared_training(context.batch_size, context.flips, context.metric)
        training |= {"learning_rate": recipe.rate, "steps": recipe.steps}
        sections = recipe.sections(context.shape(recipe.model, recipe.image_size), recipe.steps)
        experiment = {"name": recipe.name, "method": recipe.method, "training": training, **sections}
        study = study_from_mapping(
            context.study("machine", recipe.model, recipe.image_size, [0], [experiment]), file="machine"
        )
        study = study.model_copy(update={"precision": decide_precision(study, None).chosen})
        index = open_index(study.data)
        workload = workload_of(study, index, splits_of(index, study)[study.seeds[0]])
        budget_s = max(_LEAST_S, context.state.share_s("machine"))
        return asdict(measure(study, index, workload, budget_s, lambda text: tell(f"  {text}")))

    kept = context.state.once("throughput", decide)
    machine = Throughput(**{**kept, **{name: Line(**kept[name]) for name in ("step", "image")}})
    shape = context.shape(recipe.model, recipe.image_size)
    pixels, image = recipe.image_size, said_ms(machine.image_s(shape))
    step_s = machine.step_s(shape, recipe.method, context.batch_size)
    tell(f"  at {pixels} px a forward pass: {image} an image; a step of {context.batch_size} images: {step_s:.2f} s")
    return machine
