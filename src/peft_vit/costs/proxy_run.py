"""A run cut down to a few steps, which take what the whole run's steps take; runs that differ in nothing else share it.

The method, its ranks and formats, the model, the images, the batch and the threads stay. Schedules shrink with the
number of steps, so that each of their phases has its share of the few. Rates and decay have no influence on time and
memory, so they are the same in all miniatures, and so are names and seeds.
"""

from __future__ import annotations

from typing import Any

from peft_vit.backbones import BackboneShape
from peft_vit.config import DataConfig, QaLoraConfig
from peft_vit.data import ImageIndex, Splits, make_splits
from peft_vit.errors import UserError
from peft_vit.methods import shorten
from peft_vit.records import RunSpec
from peft_vit.training import steps_per_epoch

_STEPS = 8
_STEPS_IF_LONG = 4
_LONG_STEP = 2e12  # multiply-adds of a step: some 20 s on two cores
_LEAST_BETWEEN_DECISIONS = 3  # steps; with fewer, scores and probes would weigh more than in the whole run
_VALIDATION_BATCHES = 4  # as large as a training batch each, as the loop has it
_NEUTRAL: dict[str, Any] = {
    "learning_rate": 1e-4,
    "weight_decay": 0.01,
    "schedule": "constant",
    "steps": None,
    "validate_every": None,
    "patience": None,
    "head_start": "random",
    "label_smoothing": 0.0,
    "warmup_share": None,
    "layer_decay": None,
}


def miniature(
    spec: RunSpec, total_steps: int, shape: BackboneShape, index: ImageIndex, splits: Splits, *, at_most: int = _STEPS
) -> RunSpec:
    """Return a run of a few steps and a few validation batches that stands for another one.

    Args:
        spec: of the whole run.
        total_steps: of the whole run.
        shape: of its backbone.
        index: its images.
        splits: of the images.
        at_most: steps that it has.
    """
    batch_size = spec.experiment.training.batch_size
    work = 3 * shape.multiply_adds * batch_size
    steps = min(total_steps, at_most, _STEPS if work < _LONG_STEP else _STEPS_IF_LONG)
    data = _data(spec, steps * batch_size, index, splits)
    assert data.train_images is not None
    an_epoch = steps_per_epoch(data.train_images, batch_size)
    epochs = -(-steps // an_epoch)
    experiment = shorten(spec.experiment, total_steps, epochs * an_epoch, every=_LEAST_BETWEEN_DECISIONS)
    training = experiment.training
    if not experiment.is_probe:
        training = training.model_copy(update={**_NEUTRAL, "epochs": epochs})
    experiment = experiment.model_copy(update={"name": "miniature", "training": training})
    return spec.model_copy(update={"study": "miniature", "seed": 0, "experiment": experiment, "data": data})


def _data(spec: RunSpec, images: int, index: ImageIndex, splits: Splits) -> DataConfig:
    """Return the same images, but fewer: at least as many as asked for, and at least one of each class."""
    qa_lora = spec.experiment.section(QaLoraConfig)
    if qa_lora is not None and qa_lora.adaptive_bits is not None:
        images = max(images, qa_lora.adaptive_bits.calibration_images)
    if qa_lora is not None and qa_lora.rounding == "gptq":
        images = max(images, qa_lora.images_to_round_by)  # fewer if the whole run has fewer
    evaluated = max(
        _VALIDATION_BATCHES * spec.experiment.training.batch_size,
        2 * len(index.class_names),
        spec.measures.removal_images or 0,
    )
    whole = len(splits.train)
    if len(splits.validation) == 0:  # some all the same: an evaluated image takes time in test, too
        whole -= (evaluated := min(evaluated, max(2, whole // 4)))
    train = min(whole, max(images, 2))
    while True:
        data = spec.data.model_copy(
            update={
                "train_images": train,
                "shots_per_class": None,
                "train_subset": "fixed",
                "test_split": "fixed",  # a split that holds each class may not do so with another seed
                "validation_images": min(len(splits.validation) or evaluated, evaluated),
                "test_images": None if spec.data.folds is not None else min(len(splits.test), evaluated),
            }
        )
        try:
            make_splits(index, data, spec.seed)
        except UserError:  # a class would get no image
            if train == whole:
                return data
            train = min(whole, 2 * train)
        else:
            return data
