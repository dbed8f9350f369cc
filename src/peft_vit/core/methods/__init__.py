"""What the methods of fine-tuning do: a module each, found by the lines of `config.METHOD_KINDS`."""

from __future__ import annotations

from importlib import import_module

from peft_vit.base.errors import UserError
from peft_vit.core.backbones import BackboneShape
from peft_vit.core.config import METHOD_KINDS, ExperimentConfig
from peft_vit.core.methods.method import Method, PrepareContext, TrainOptions

# In the order of the kinds. A module calls what it does by the method's name in capitals.
METHODS: dict[str, Method] = {
    name: getattr(import_module(f"{__name__}.{kind.module or name}"), name.upper())
    for name, kind in METHOD_KINDS.items()
}
_FEWEST_ONE_CYCLE_STEPS = 4  # below, one_cycle starts or ends the run at its lowest rate


def check(experiment: ExperimentConfig, shape: BackboneShape, total_steps: int, train_images: int) -> None:
    """Refuse an experiment that could not be prepared or run, from the backbone's shape and two numbers alone.

    Raises:
        UserError: with the field below the experiment.
    """
    one_cycle = not experiment.is_probe and experiment.training.schedule == "one_cycle"
    if one_cycle and total_steps < _FEWEST_ONE_CYCLE_STEPS:
        raise UserError(
            f"{total_steps} steps are too few for schedule one_cycle; train longer or use schedule: constant",
            field="training.epochs",
        )
    share = experiment.training.warmup_share
    if share is not None and 0 < share * total_steps <= 1:
        raise UserError(
            f"{share:g} of {total_steps} steps is no more than one; raise it, or write 0 for no warm-up",
            field="training.warmup_share",
        )
    recomputed, blocks = experiment.training.recomputed_blocks, len(shape.values_by_block)
    if recomputed is not None and recomputed >= blocks:
        raise UserError(
            f"{recomputed} of {blocks} blocks: computing the last one again saves nothing; give at most {blocks - 1}",
            field="training.recomputed_blocks",
        )
    METHODS[experiment.method].check(experiment, shape, total_steps, train_images)


def shorten(experiment: ExperimentConfig, total_steps: int, steps: int, *, every: int = 1) -> ExperimentConfig:
    """Return an experiment of `total_steps` with schedules that fit fewer, deciding every `every` steps at most."""
    return experiment.model_copy(update=METHODS[experiment.method].shorten(experiment, total_steps, steps, every))
