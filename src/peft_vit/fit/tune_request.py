"""What `peft-vit tune` and `peft_vit.tune` are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from peft_vit.base.settings import Option, Request
from peft_vit.core.config import (
    DEFAULT_MODEL,
    IMAGE_SIZES,
    SEEDS,
    ComputeSetting,
    Device,
    MetricOfTask,
    PrecisionSetting,
    Size,
    TaskName,
    Time,
    WrittenSize,
    several,
)
from peft_vit.fit.request import (
    AUTO_WEIGHTS,
    COMPUTE,
    DEVICE,
    EXECUTOR,
    IMAGES,
    MEMORY_LIMIT,
    MODEL,
    PRECISION,
    TASK,
    THREADS,
    Weights,
)
from peft_vit.runs.executors import ExecutorName


def _or_default(models: Any) -> Any:
    return models or (DEFAULT_MODEL,)


class TuneRequest(Request):
    """Images, limits of the model, and the time; None: no limit."""

    images: Annotated[Path, AfterValidator(Path.expanduser), Option(is_argument=True)] = Field(description=IMAGES)
    margin: float = Field(
        default=1.0,
        gt=0,
        lt=100,
        description="How much a smaller model may lose compared with the best one found: percentage points of the "
        "metric; of errors of numbers percent of the numbers' standard deviation.",
    )
    task: TaskName | None = Field(default=None, description=TASK)
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
    memory_limit: WrittenSize = Field(default=None, description=MEMORY_LIMIT)
    minutes: float = Field(
        default=20.0,
        gt=0,
        description="The call may take this many minutes, and for the test up to a sixth more. The same command "
        "continues, and tries more with more time.",
    )
    models: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        BeforeValidator(_or_default),
        BeforeValidator(several),
        Option("--model", list[str]),
    ] = Field(
        default=(DEFAULT_MODEL,),
        description=f"{MODEL} Several, with commas between them or the option again, are compared. Without it, "
        f"{DEFAULT_MODEL}.",
    )
    weights: Weights = Field(default=None, description=AUTO_WEIGHTS)
    image_sizes: Annotated[
        tuple[Annotated[int, Field(ge=IMAGE_SIZES[0], le=IMAGE_SIZES[-1])], ...],
        BeforeValidator(several),
        Option("--image-size", list[str], metavar="INTEGER"),
    ] = Field(
        default=(),
        description="Resize images to squares of this side, in pixels. Several, with commas between them or the option "
        "again, are compared. Without it, those that the time allows.",
    )
    precision: PrecisionSetting = Field(default="auto", description=PRECISION)
    compute: ComputeSetting = Field(default="auto", description=COMPUTE)
    device: Device = Field(default="auto", description=DEVICE)
    seed: int = Field(
        default=0,
        ge=0,
        lt=SEEDS.stop,
        description="The number for all random choices: which images are kept for the test, how the others are "
        "divided, how training starts.",
    )
    threads: int | None = Field(default=None, ge=1, description=THREADS)
    executor: ExecutorName = Field(default="local", description=EXECUTOR)
    output: Annotated[Path, AfterValidator(Path.expanduser)] = Field(
        default=Path("peft-vit-tune"), description="The folder for results, where the same command continues."
    )

    @property
    def margin_share(self) -> float:
        """Return the margin as a share, see `tasks.Scores`."""
        return self.margin / 100

    def kept(self) -> dict[str, Any]:
        """Return what may not change when the same output continues, by option."""
        values = self.model_dump(mode="json", exclude={"output", "minutes", "executor"})
        values["images"] = str(self.images.absolute())
        return {self.option(field).name.lstrip("-").lower(): value for field, value in values.items()}
