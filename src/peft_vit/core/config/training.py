"""What a configuration file can say of training: how long, how fast, on how many images, changed in which ways.

What changes training images before the model sees them is `training.augmentation`, a list of names or of names with
settings, which is described, and done, in `data.images`:

    augmentation: [flip, random_resized_crop: {scale: [0.5, 1.0]}, mixup: {alpha: 0.2}]
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_serializer, model_validator

from peft_vit.base.settings import Frozen, OnlyWith, Settings, is_given
from peft_vit.core.config.units import Count, Fraction, Positive, written_size

Flips = Literal["none", "horizontal", "both"]
Augment = Literal["none", "flip", "light"]
Compute = Literal["float", "int8"]
ComputeSetting = Literal["auto", "float", "int8"]  # auto is decided when a call begins
TaskName = Literal["classification", "multilabel", "regression"]  # see `tasks`
USUAL_TASK: TaskName = "classification"
TASKS_SAID = "classification (one class an image), multilabel (several, or none) or regression (numbers)"
ClassWeights = Literal["none", "balanced", "effective"]
MetricSetting = Literal["auto", "accuracy", "balanced_accuracy"]  # of classes; auto is decided when a call begins
MetricOfTask = Literal[
    "auto", "accuracy", "balanced_accuracy", "map", "auroc", "f1_macro", "f1_micro", "mae", "rmse", "r2", "spearman"
]
LossName = Literal["cross_entropy", "binary_cross_entropy", "asymmetric", "huber", "mse", "quantile"]
# What `train` and `tune` take. A model that has learned its few images by heart is otherwise sure of all others, too:
# with 20 validation images of solar cells no temperature mends that (docs/explanation/probabilities.md).
LABEL_SMOOTHING = 0.1


def _rising(values: tuple[float, float]) -> tuple[float, float]:
    if not 0 < values[0] <= values[1]:
        raise ValueError(f"expected [low, high] with 0 < low <= high, got {list(values)}")
    return values


_Range = Annotated[tuple[float, float], Field(strict=False), AfterValidator(_rising)]


class Flip(Frozen):
    """Flip left-right with probability 1/2; with `both` also upside down, independently."""

    direction: Literal["horizontal", "both"] = Field(default="horizontal", description="both: also upside down")


class Rotate90(Frozen):
    """Turn by 0, 90, 180 or 270 degrees, equally likely."""


class RandomResizedCrop(Frozen):
    """Cut out a part of the image, and enlarge it to `image_size`."""

    scale: _Range = Field(default=(0.08, 1.0), description="Area of the part, as a share of the image")
    ratio: _Range = Field(default=(3 / 4, 4 / 3), description="Width over height of the part")

    @model_validator(mode="after")
    def _is_a_part(self) -> Self:
        if self.scale[1] > 1:
            raise ValueError(f"scale: a part has at most the image's area, got {self.scale[1]:g}; lower it to 1")
        return self


_Factor = Annotated[float, Field(ge=0, description="x of its factor, which lies between 1 - x and 1 + x")]


class ColorJitter(Frozen):
    """Multiply brightness, contrast and saturation by factors, and move the hue.

    torchvision's own defaults change nothing; these are what timm makes of its usual `color_jitter=0.4`.
    """

    brightness: _Factor = 0.4
    contrast: _Factor = 0.4
    saturation: _Factor = 0.4
    hue: float = Field(default=0.0, ge=0, le=0.5, description="The largest move, as a share of the circle")


class RandAugment(Frozen):
    """Apply some operations drawn from a list, one after the other (arXiv 1909.13719)."""

    num_ops: int = Field(default=2, ge=1, le=14, description="Operations for each image")
    magnitude: int = Field(default=9, ge=0, le=30, description="Their strength, of 31 levels")


_Alpha = Annotated[
    Positive, Field(description="The parameter of the Beta distribution that the proportion is drawn from")
]


class Mixup(Frozen):
    """Mix two images and their labels in proportion (arXiv 1710.09412)."""

    alpha: _Alpha = 1.0


class Cutmix(Frozen):
    """Paste a rectangle of another image; labels follow the areas (arXiv 1905.04899)."""

    alpha: _Alpha = 1.0


class Augmentation(Frozen):
    """An entry of the list is one of these, by its name alone or with settings."""

    flip: Flip | None = None
    rotate90: Rotate90 | None = None
    random_resized_crop: RandomResizedCrop | None = None
    color_jitter: ColorJitter | None = None
    rand_augment: RandAugment | None = None
    mixup: Mixup | None = None
    cutmix: Cutmix | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_by_its_name(cls, value: Any) -> Any:
        if isinstance(value, Augmentation):
            return value
        given = {value: {}} if isinstance(value, str) else value
        known = ", ".join(cls.model_fields)
        if not isinstance(given, dict) or len(given) != 1:
            raise ValueError(f"expected one of {known}, alone or with settings, as in `mixup: {{alpha: 0.2}}`")
        ((name, settings),) = given.items()
        if name not in cls.model_fields:
            near = difflib.get_close_matches(str(name), cls.model_fields, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"no augmentation is called {name!r}{hint}; expected one of {known}")
        return {name: {} if settings is None else settings}

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return {self.name: self.settings.model_dump()}

    @property
    def name(self) -> str:
        """Return what a configuration calls it."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def settings(self) -> Frozen:
        """Return its own settings."""
        return getattr(self, self.name)

    @property
    def mixes(self) -> bool:
        """Return whether it acts on a batch, and on its labels, instead of on each image."""
        return isinstance(self.settings, Mixup | Cutmix)


# What `flips` of a recipe says.
AUGMENTATION_OF_FLIPS: dict[Flips, tuple[Augmentation, ...]] = {
    "none": (),
    "horizontal": (Augmentation(flip=Flip()),),
    "both": (Augmentation(flip=Flip(direction="both")),),
}

# What `light` adds to flips: about the cuts of BiT's fine-tuning (arXiv 1912.11370), which keep 64 to 88 % of the area,
# and the light of fast.ai's `aug_transforms`. Colours stay: they are often what tells classes apart.
LIGHT_AUGMENTATION = (
    Augmentation(random_resized_crop=RandomResizedCrop(scale=(0.7, 1.0))),
    Augmentation(color_jitter=ColorJitter(brightness=0.2, contrast=0.2, saturation=0.0)),
)


def _in_order(augmentation: tuple[Augmentation, ...]) -> tuple[Augmentation, ...]:
    names = [change.name for change in augmentation]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise ValueError(f"{name} occurs twice; remove one")
        if augmentation[place].mixes and not all(later.mixes for later in augmentation[place:]):
            raise ValueError(f"{name} mixes whole batches, after all that changes single images; put it last")
    return augmentation


ActivationCheckpointing = Literal["none", "light", "blocks", "adaptive"]


class TrainingConfig(Settings):
    """How long and how fast to train. An experiment's own settings replace the study's."""

    epochs: Annotated[int | None, OnlyWith(steps=None)] = Field(
        default=None, ge=1, le=100_000, description="Go through the training images at most this many times"
    )
    steps: int | None = Field(
        default=None, ge=1, le=10_000_000, description="Instead of epochs: train at most this many steps"
    )
    seconds: Annotated[Positive | None, OnlyWith(schedule=("one_cycle", "warmup_stable_decay"))] = Field(
        default=None,
        exclude_if=lambda seconds: seconds is None,
        description="Train fewer steps, and bring the learning rate down sooner, if steps would take longer than this",
    )
    validate_every: Count | None = Field(
        default=None, description="Validate every so many steps. Without it, after each epoch"
    )
    patience: Annotated[Count | None, OnlyWith(schedule=("constant", "warmup_stable_decay"))] = Field(
        default=None,
        description="After this many validations in a row without a gain, bring the learning rate down and end "
        "training",
    )
    batch_size: int = Field(default=32, ge=1, le=65_536, description="Train on this many images in each step")
    micro_batch_size: Count | None = Field(
        default=None,
        description="Pass this many images of a batch through the model at a time; a step adds up their gradients",
    )
    compute: ComputeSetting = Field(
        default="float",  # of records; in a file it is auto
        description="How frozen layers multiply, forward and backward. float: in the study's precision. int8: in "
        "8-bit integers, with a scale for each output of a weight and for each row of inputs. auto, which a file "
        "has without it: int8 where that is faster, measured when the study begins",
    )
    integer_bits: Annotated[Literal[7, 8] | None, OnlyWith(compute=("int8", "auto"))] = Field(
        default=None,
        description="The bits of weights in 8-bit integers. 7 are exact on every processor, 8 on some. Without it, as "
        "many as are exact where the study begins",
    )
    activation_checkpointing: ActivationCheckpointing = Field(
        default="none",
        description="Save memory by computing some of the model again in the backward pass. none: nothing, the "
        "fastest. light: the outputs of norms and activation functions under adapters. blocks: every "
        "block. adaptive: light, and as many blocks as memory_limit needs, which is the default with "
        "memory_limit",
    )
    recomputed_blocks: Annotated[int | None, OnlyWith(activation_checkpointing="adaptive")] = Field(
        default=None,
        ge=0,
        description="With adaptive: compute this many blocks again, from the first on. Without it, the plan chooses",
    )
    memory_limit: Annotated[str, BeforeValidator(written_size)] | None = Field(
        default=None,
        description="The most memory that a training process may take, such as 1GB. The plan chooses the fastest "
        "micro_batch_size and recomputed_blocks within it, unless you give them",
    )
    learning_rate: Positive | None = Field(
        default=None,
        description="The highest learning rate, which all methods but linear probes need. A list makes an "
        "experiment of each rate",
    )
    weight_decay: float = Field(
        default=0.01, ge=0, description="The optimizer's weight decay, on everything that is trained"
    )
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="The optimizer; sgd has momentum 0.9")
    schedule: Literal["one_cycle", "constant", "warmup_stable_decay"] = Field(
        default="one_cycle", description="How the learning rate changes over the steps"
    )
    warmup_share: Annotated[float | None, OnlyWith(schedule=("one_cycle", "warmup_stable_decay"))] = Field(
        default=None,
        ge=0,
        lt=1,
        description="The share of steps in which the learning rate rises. Without it, 0.3 with one_cycle; 20 "
        "steps or a tenth of all with warmup_stable_decay",
    )
    layer_decay: Fraction | None = Field(
        default=None,
        description="Multiply the learning rate by this factor from each block to the one before it, in full "
        "fine-tuning",
    )
    clip_norm: Positive | None = Field(default=1.0, description="Clip the gradient's norm to this value; null: never")
    augmentation: Annotated[tuple[Augmentation, ...], AfterValidator(_in_order)] = Field(
        default=AUGMENTATION_OF_FLIPS["horizontal"],
        description="Change training images in these ways, in this order; []: not at all",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Spread this share of each label over all classes"
    )
    class_weights: ClassWeights = Field(
        default="none",
        description="Weigh classes in the loss. balanced: by the inverse of their number of images. "
        "effective: by the inverse of their effective number, (1 - 0.999^n) / 0.001 (arXiv 1901.05555)",
    )
    loss: LossName | None = Field(
        default=None,
        description="The loss of training. With classes cross_entropy; with several labels binary_cross_entropy, or "
        "asymmetric, in which easy absent labels count little (arXiv 2009.14119); with numbers huber, mse or quantile "
        "(the median), on standardized numbers. Without it, the first of these",
    )
    head_start: Literal["random", "probe"] = Field(
        default="random",
        description="How the head starts. probe: as the linear probe of the frozen backbone (arXiv 2202.10054)",
    )
    probe_l2: Positive | None = Field(
        default=None,
        description="The strength of the probe's penalty. Without it, one of eleven is chosen on validation "
        "images, or on training images that are left out in turn",
    )
    keep: Literal["best", "last"] = Field(
        default="best",
        description="The step whose model is kept where images validate. best: the best validated one. last: the last "
        "one, whose learning rate has come down, or the start if that is clearly better",
    )
    metric: MetricOfTask = Field(
        default="accuracy",
        description="The metric by which validation chooses the step and the probe's penalty. auto: map for "
        "several labels, mae for numbers, balanced_accuracy above 3x imbalance of classes, else "
        "accuracy",
    )

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Self:
        fault = micro_batch_fault(self.micro_batch_size, self.batch_size)
        if fault is not None:
            raise ValueError(f"micro_batch_size: {fault}")
        adaptive = self.activation_checkpointing == "adaptive"
        if adaptive and self.recomputed_blocks is None and self.memory_limit is None:
            raise ValueError(
                "activation_checkpointing: adaptive computes as many blocks again as memory_limit needs; add "
                "memory_limit, as in 1GB, or the number of blocks as recomputed_blocks"
            )
        if self.memory_limit is not None and not adaptive and is_given(self, "activation_checkpointing", info):
            raise ValueError(
                "memory_limit decides what is computed again, and activation_checkpointing: "
                f"{self.activation_checkpointing} does so, too; remove one of them"
            )
        mixing = [change.name for change in self.augmentation if change.mixes]
        if mixing and self.batch_size == 1:
            raise ValueError(
                f"augmentation: {mixing[0]} has no effect with batch_size: 1; remove it, or raise batch_size"
            )
        if self.schedule == "warmup_stable_decay" and (self.warmup_share or 0) > 0.8:
            raise ValueError("warmup_share: warmup_stable_decay comes down over the last fifth; give at most 0.8")
        return self

    @property
    def decided_compute(self) -> Compute:
        """Return how frozen layers multiply, which a plan has decided."""
        assert self.compute != "auto"
        return self.compute

    @property
    def images_at_once(self) -> int:
        """Return how many images pass through the model at a time, at most."""
        return self.micro_batch_size or self.batch_size

    def recomputed_of(self, blocks: int) -> int:
        """Return how many of a model's blocks, from the first on, are computed again in the backward pass."""
        if self.is_undecided:
            return max(0, blocks - 1)  # at most
        return blocks if self.activation_checkpointing == "blocks" else self.recomputed_blocks or 0

    @property
    def is_undecided(self) -> bool:
        """Return whether what keeps within `memory_limit` is still to be chosen."""
        return self.memory_limit is not None and self.recomputed_blocks is None

    def decided(self, images: int, recomputed_blocks: int) -> Self:
        """Return the same with so many images at a time, and so many blocks computed again."""
        micro = None if images == self.batch_size else images
        blocks = {"activation_checkpointing": "adaptive", "recomputed_blocks": recomputed_blocks}
        return self.model_copy(update={"micro_batch_size": micro, **blocks})

    def with_batch_size(self, batch_size: int) -> Self:
        """Return the same for other batches, in micro-batches that divide them and are no larger than before."""
        micro = self.micro_batch_size and _largest_micro_batch(self.micro_batch_size, batch_size)
        return self.model_copy(update={"batch_size": batch_size, "micro_batch_size": micro})

    @property
    def flips(self) -> Flips:
        """Return how images are flipped, which is all of `augmentation` that probes read."""
        return next((change.flip.direction for change in self.augmentation if change.flip is not None), "none")

    def epoch_steps(self, train_images: int) -> int:
        """Return the steps of an epoch, in which every image comes once; the last batch may be smaller."""
        return -(-train_images // self.batch_size)

    def total_steps(self, train_images: int) -> int:
        """Return the optimiser steps of a run, at most."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None  # checked by the experiment
        return self.epochs * self.epoch_steps(train_images)

    def validation_steps(self, train_images: int) -> list[int]:
        """Return the steps after which validation comes: every `validate_every`, or an epoch, and the last one."""
        total = self.total_steps(train_images)
        every = self.validate_every or self.epoch_steps(train_images)
        return [*range(every, total, every), total]


def micro_batch_fault(micro_batch_size: int | None, batch_size: int) -> str | None:
    """Return what is wrong with a micro-batch, and the remedy; None: nothing."""
    if micro_batch_size is None or (micro_batch_size < batch_size and batch_size % micro_batch_size == 0):
        return None
    smaller = _largest_micro_batch(micro_batch_size, batch_size)
    remedy = "remove it" if smaller is None else f"take {smaller}"
    return f"{micro_batch_size} does not divide the batch of {batch_size} into several parts; {remedy}"


def _largest_micro_batch(at_most: int, batch_size: int) -> int | None:
    """Return the largest number of images, up to a limit, that divides a batch into several parts."""
    sizes = range(min(at_most, batch_size // 2), 0, -1)
    return next((size for size in sizes if batch_size % size == 0), None)
