"""Timing runs: a run cut down to a few steps that take what the whole run's steps take, and what they took.

The method, its ranks and formats, the model, the images, the batch and the threads stay. Schedules shrink with the
number of steps, so that each of their phases has its share of the few. Rates and decay have no influence on time and
memory, so they are the same in all timing runs, and so are names and seeds: runs that differ in nothing else share
one. What it took is kept in the user's cache.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from peft_vit.base.errors import UserError
from peft_vit.core.backbones import BackboneShape, architecture_of
from peft_vit.core.config import QaLoraConfig
from peft_vit.core.methods import shorten
from peft_vit.core.records import RunSpec
from peft_vit.data import ImageIndex, Splits, make_splits
from peft_vit.runs.this_machine.cache import cache_file, read_cached, write_cached
from peft_vit.runs.this_machine.machine import cpu_count, instruction_limits, package_versions, processor_name

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
    "label_smoothing": 0.0,
    "loss": None,
    "warmup_share": None,
    "layer_decay": None,
}


def timing_run(
    spec: RunSpec,
    total_steps: int,
    shape: BackboneShape,
    index: ImageIndex,
    splits: Splits,
    *,
    at_most: int = _STEPS,
    evaluated: int | None = None,
    head_start: Literal["random", "probe"] = "random",
) -> RunSpec:
    """Return a run of a few steps and a few validation batches that stands for another one.

    Args:
        spec: of the whole run.
        total_steps: of the whole run.
        shape: of its backbone.
        index: its images.
        splits: of the images.
        at_most: steps that it has.
        evaluated: images that validate, and that test, at most; None: as many as give the time of one.
        head_start: of the timing run; a probe computes features in batches of their own.
    """
    batch_size, qa_lora = spec.experiment.training.batch_size, spec.experiment.section(QaLoraConfig)
    is_long = 3 * shape.multiply_adds * batch_size >= _LONG_STEP
    steps = min(total_steps, at_most, _STEPS_IF_LONG if is_long else _STEPS)
    images = steps * batch_size
    if qa_lora is not None and qa_lora.adaptive_bits is not None:
        images = max(images, qa_lora.adaptive_bits.calibration_images)
    if qa_lora is not None and qa_lora.rounding == "gptq":
        images = max(images, qa_lora.images_to_round_by)  # fewer if the whole run has fewer
    available = len(splits.train)
    usual = max(_VALIDATION_BATCHES * batch_size, 2 * len(index.class_names), spec.measures.removal_images or 0)
    some = evaluated or usual
    if len(splits.validation) == 0:  # some all the same: an evaluated image takes time in test, too
        available -= (some := min(some, max(2, available // 4)))
    data = spec.data.model_copy(
        update={
            "shots_per_class": None,
            "train_subset": "fixed",
            "test_split": "fixed",  # a split that holds each class may not do so with another seed
            "tested_images": None,
            "validation_images": min(len(splits.validation) or some, some),
            "test_images": None if spec.data.folds is not None else min(len(splits.test), some),
        }
    )
    train = min(available, max(images, 2))
    data = data.model_copy(update={"train_images": train})
    while train < available:
        try:
            make_splits(index, data, spec.seed)
            break
        except UserError:  # a class has no image
            train = min(available, 2 * train)
            data = data.model_copy(update={"train_images": train})
    an_epoch = spec.experiment.training.epoch_steps(train)
    epochs = -(-steps // an_epoch)
    experiment = shorten(spec.experiment, total_steps, epochs * an_epoch, every=_LEAST_BETWEEN_DECISIONS)
    training = experiment.training
    if not experiment.is_probe:
        training = training.model_copy(update={**_NEUTRAL, "head_start": head_start, "epochs": epochs})
    experiment = experiment.model_copy(update={"name": "timing-run", "training": training})
    return spec.model_copy(update={"study": "timing-run", "seed": 0, "experiment": experiment, "data": data})


class MeasuredCosts(BaseModel):
    """What a timing run took; a whole run's time is put together from these."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    start_s: float = Field(ge=0)  # everything that is done once, whatever the number of steps
    step_s: float = Field(gt=0)
    image_s: float = Field(ge=0)  # of evaluation
    peak_memory_bytes: int = Field(gt=0)
    images: int = Field(gt=0)  # in memory then


def cached_costs(kind: RunSpec) -> MeasuredCosts | None:
    """Return what a timing run took, if it was done on this machine with these versions."""
    return read_cached(_place(kind), MeasuredCosts)


def cache_costs(kind: RunSpec, costs: MeasuredCosts) -> None:
    """Write what was measured to the user's cache, for later plans."""
    write_cached(_place(kind), costs)


def _place(kind: RunSpec) -> Path:
    depends_on = {
        "run": kind.model_dump(mode="json"),
        "packages": package_versions(kind.backbone.library),
        "config": architecture_of(kind.backbone).config_sha256,
        "python": platform.python_version(),
        "machine": platform.node(),
        "processor": processor_name(),
        "instructions": instruction_limits(),
        "cpu_count": cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }
    return cache_file("costs", depends_on)
