"""What an exported file says of itself: how it is used without the run that made it, and the hash that belongs to it.

A file of any format holds one `Header` as JSON under the key HEADER; what of its content its hash covers, the
format says (docs/reference/exported_files.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from peft_vit.base.errors import UserError, checked, foreign_fault, os_fault
from peft_vit.base.files import write_atomically
from peft_vit.core.config import USUAL_TASK, HeadBlocks, Interpolation, Library, Resize, TaskName
from peft_vit.core.records import Calibrated, Decision, Unlike
from peft_vit.core.tasks import Meaning
from peft_vit.deploy.presentation import PRESENTED

if TYPE_CHECKING:
    from torch import nn

    from peft_vit.core.backbones import Architecture

HEADER = "peft_vit_model"  # key of a file's metadata
UNSIGNED = "0" * 64  # instead of the hash while it is computed
AGAIN = "export the run again"
FloatArray: TypeAlias = NDArray[np.float32]
_Positive = Annotated[float, Field(gt=0)]


class Strict(BaseModel):
    """Checked values that are what they say."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ExportMetadata(Strict):
    """How images become the model's input, what its outputs mean, and where it comes from."""

    run: str  # study/experiment/seed_k
    library: Library = "timm"
    model: str  # its name there
    config: str | None = None  # of transformers: what the model is built from
    head_blocks: HeadBlocks = 1  # of how many of the last blocks the head reads the class tokens
    weights_name: str  # of the backbone that was fine-tuned
    weights_sha256: str | None  # None: random weights
    image_size: int = Field(ge=1, le=1024)  # side of the square input, in pixels
    channels: Literal[1, 3]  # 1: images are made grey first; the input has three channels all the same
    interpolation: Interpolation = "bicubic"
    resize: Resize | None = None  # how images become square; None: both sides are resized alike
    mean: tuple[float, float, float]  # for pixels in [0, 1]
    std: tuple[_Positive, _Positive, _Positive]
    class_names: tuple[str, ...] = Field(min_length=1)
    calibrated: Calibrated | None = None  # None: probabilities are softmax(logits), and there are no sets
    integer_bits: Literal[7, 8] | None = None  # of weights that are multiplied in 8-bit integers; None: none are
    unlike: Unlike | None = None  # None: nothing says when an image is unlike those of training
    task: TaskName = USUAL_TASK
    decision: Decision | None = None  # what outputs mean, of other tasks

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave defaults out: the fields that have one came later, and files hold hashes of what they say."""
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        return {name: value for name, value in write(self).items() if value != defaults[name]}

    def check_meaning(self, file: Path) -> None:
        """Raise UserError, naming the file, if what the card says of outputs does not fit its classes."""
        outputs = np.zeros(len(self.class_names), np.float32)
        with foreign_fault("says of outputs what does not fit its classes", file, remedy=AGAIN, field="card"):
            PRESENTED[self.task].prediction(outputs, self.class_names, self.meaning, None, 1)

    @property
    def meaning(self) -> Meaning:
        """Return what outputs mean; None: softmax, and nothing says how far it can be believed."""
        return self.decision or self.calibrated

    @property
    def architecture(self) -> Architecture:
        """Return what the model is built from."""
        from peft_vit.core.backbones import Architecture  # with torch, which a file for another runtime does not need

        return Architecture(self.library, self.model, self.config, head_blocks=self.head_blocks)


class Header(Strict):
    """The envelope of every exported file."""

    version: Literal[1] = 1
    card: ExportMetadata
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] = UNSIGNED

    @classmethod
    def read(cls, text: str | None, file: Path, name: str) -> Self:
        """Return the header of a file of a format, whose text has been found or not.

        Raises:
            UserError: if there is none, it is damaged, or what it says of outputs does not fit the classes.
        """
        if text is None:
            raise UserError(f"was not written by `peft-vit export --format {name}`, or was cut off", file=file)
        with checked(file, AGAIN):
            header = cls.model_validate_json(text)
        header.card.check_meaning(file)
        return header

    def signed(self, content: Iterable[bytes | memoryview]) -> Self:
        """Return the header with the SHA-256 of its file's content, of which its format says what it is."""
        return self.model_copy(update={"sha256": _digest(content)})

    def check(self, content: Iterable[bytes | memoryview], file: Path, *beside: Path) -> None:
        """Refuse a file whose content has another hash.

        Raises:
            UserError: if it has.
        """
        if _digest(content) != self.sha256:
            which = "".join(f"it or {other.name} " for other in beside)
            raise UserError(f"{which}was changed after it was written; {AGAIN}", file=file)


@dataclass(frozen=True)
class Classifier:
    """A trained model from whatever file, ready to be asked."""

    logits: Callable[[FloatArray], FloatArray]  # normalised images (B, 3, S, S) -> (B, classes)
    card: ExportMetadata
    # The same, and (B,) distances to the nearest training image; where card.unlike says what they mean.
    with_distances: Callable[[FloatArray], tuple[FloatArray, FloatArray]] | None = None
    module: nn.Module | None = None  # what computes, in evaluation mode; None: it runs without torch


def _digest(content: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for part in content:
        digest.update(part)
    return digest.hexdigest()


def write_exported(file: Path, content: bytes) -> None:
    """Write a file with a card in it.

    Raises:
        UserError: if it can't be written.
    """
    with os_fault("can't be written", file, remedy="choose another place"):
        write_atomically(file, content)
