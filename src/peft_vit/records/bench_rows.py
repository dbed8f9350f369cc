"""What `peft-vit bench` writes: an exported model's times, by batch size and threads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from peft_vit.errors import checked, os_fault
from peft_vit.safe_io import read_bytes

_Positive = Annotated[float, Field(gt=0)]
_Count = Annotated[int, Field(ge=1)]


class BenchRow(BaseModel):
    """The calls of one model at one batch size with so many threads; times are those of a call on the whole batch."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    file: str  # as it was named; a folder, perhaps
    format: str  # onnx, openvino, safetensors or peft
    bytes: _Count  # of all its files
    run: str | None  # study/experiment/seed_k, as its card says; None of what was made for comparison
    threads: _Count
    batch: _Count
    calls: _Count  # that were timed, in all processes
    median_s: _Positive
    low_s: _Positive  # first and third quartile of the calls
    high_s: _Positive
    processor_s: Annotated[float, Field(ge=0)]  # median of what all threads worked; 0 if the clock is too coarse
    ratio: _Positive  # of medians, over the fastest float32 model at this batch size with these threads
    over: str  # that model's file
    images_per_s: _Positive
    processor: str
    runtime: str  # with its version


_ROWS = TypeAdapter(tuple[BenchRow, ...])


def read_bench(file: Path) -> tuple[BenchRow, ...]:
    """Return the rows of a .json file that `peft-vit bench` has written.

    Raises:
        UserError: if it can't be read, or is no such file; names the file and the field.
    """
    remedy = "expected what `peft-vit bench MODEL... --output FILE.json` writes"
    with os_fault("can't be read", file, remedy=remedy), checked(file, remedy):
        return _ROWS.validate_json(read_bytes(file))
