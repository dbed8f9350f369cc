"""The training loop. It knows no method: hooks score, resize and quantize; it steps, evaluates, chooses, records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from peft_vit.backbones import Backbone, freeze_batch_norm, soften
from peft_vit.config import TrainingConfig
from peft_vit.data import Data
from peft_vit.training.calibration import Calibration
from peft_vit.training.checkpoint_state import State
from peft_vit.training.hooks import BeforeTraining, Hook, Overhead
from peft_vit.training.optimization import loss_weights, weighted_cross_entropy
from peft_vit.training.progress import Gauges, Progress
from peft_vit.training.runtime import RuntimeConfig
from peft_vit.training.training_state import TrainingResult, TrainingState


def train(
    model: nn.Module,
    data: Data,
    config: TrainingConfig,
    runtime: RuntimeConfig,
    *,
    seed: int,
    hooks: Sequence[Hook] = (),
    on_progress: Callable[[Progress], None] | None = None,
    between_steps: Callable[[int, Callable[[], State]], None] | None = None,
    resume: State | None = None,
    overhead: Overhead | None = None,
    softening: float = 1.0,
) -> TrainingResult:
    """Train, evaluate now and then, and leave the model in the deployable state that validation prefers.

    Validation accuracy chooses; of equal ones the lower NLL. Without validation images the last step's model is taken,
    whatever it is worth. The test split is not touched. With `head_start: probe`
    the model as it is before the first step, with its updates left out, is the first that may be chosen: training
    never returns less, on validation, than the head it started from.

    Args:
        model: with adapters attached, on the runtime's device.
        data: images and labels.
        config: how long and how fast.
        runtime: device, precision and normalisation.
        seed: of data order and augmentation.
        hooks: what the method does around a step.
        on_progress: told after each step.
        between_steps: told how many steps are done, and handed what returns the training's state then; first before
            the first step, and after the last one of an epoch only when it was validated. It may raise.
        resume: such a state, to go on from; model and hooks are those of the start.
        overhead: takes the seconds of validation and hooks.
        softening: what the head's logits are divided by, but where the model before the first step is validated.

    Raises:
        DivergedError: if loss, gradient or predictions are no longer finite.
        UserError: if the state to go on from is not one of this training's.
    """
    overhead = Overhead() if overhead is None else overhead
    fresh = resume is None
    head = Backbone(model).head
    if fresh:
        soften(head, softening)
        weights, smoothing = loss_weights(config, data, runtime.device), config.label_smoothing
        loss = partial(weighted_cross_entropy, weights=weights, label_smoothing=smoothing)
        before = BeforeTraining(Calibration(data, runtime, seed).batch, loss, overhead)
        for hook in hooks:
            hook.begin(model, before)
    training = TrainingState(model, data, config, runtime, hooks, overhead, resume)
    del resume  # or its tensors would stay in memory when ranks or better weights have taken their place
    gauges = Gauges(model)

    def tell() -> None:
        if on_progress is not None:
            on_progress(gauges.progress(training.result, training.end))

    def pause() -> None:
        if between_steps is not None:
            between_steps(training.steps, training.state)

    if fresh and config.head_start == "probe" and training.validates:
        soften(head, 1 / softening)
        training.validate()
        soften(head, softening)
    model.train()
    freeze_batch_norm(model)
    pause()
    for images, labels in training.batches(seed):  # (B, 3, S, S), (B,) or (B, classes)
        training.step(images, labels)
        tell()
        if training.validation_is_due:
            training.validate()
            training.end_if_nothing_is_gained()
            tell()
        pause()
    return training.finish()
