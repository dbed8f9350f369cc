"""What a file has to say beside its weights, so that it can be used without the run that made it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from peft_vit.backbones import Architecture
from peft_vit.config import Interpolation, Library
from peft_vit.deployment.calibrated import Calibrated
from peft_vit.errors import checked, os_fault
from peft_vit.records import write_atomically

HEADER = "peft_vit_model"  # key of a file's metadata
_Positive = Annotated[float, Field(gt=0)]
_Model = TypeVar("_Model", bound=BaseModel)


class ModelCard(BaseModel):
    """How images become the model's input, what its outputs mean, and where it comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    run: str  # study/experiment/seed_k
    library: Library = "timm"
    model: str  # its name there
    config: str | None = None  # of transformers: what the model is built from
    weights_name: str  # of the backbone that was fine-tuned
    weights_sha256: str | None  # None: random weights
    image_size: int = Field(ge=1, le=1024)  # side of the square input, in pixels
    channels: Literal[1, 3]  # 1: images are made grey first; the input has three channels all the same
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float]  # for pixels in [0, 1]
    std: tuple[_Positive, _Positive, _Positive]
    class_names: tuple[str, ...] = Field(min_length=1)
    calibrated: Calibrated | None = None  # None: probabilities are softmax(logits), and there are no sets

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what came later where it says nothing: files hold hashes of their cards."""
        said: dict[str, Any] = write(self)
        later = {"library": "timm", "config": None, "interpolation": "bicubic", "calibrated": None}
        return {key: value for key, value in said.items() if key not in later or value != later[key]}

    @property
    def architecture(self) -> Architecture:
        """Return what the model is built from."""
        return Architecture(self.library, self.model, self.config)


class Header(BaseModel):
    """What the file of a network says of itself."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1] = 1
    card: ModelCard
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def read_json(kind: type[_Model], text: str | bytes, file: Path) -> _Model:
    """Return checked values out of JSON.

    Raises:
        UserError: with the first fault; names the file and the field.
    """
    with checked(file, "export the run again"):
        return kind.model_validate_json(text)


def write_exported(file: Path, content: bytes) -> None:
    """Write a file with a card in it.

    Raises:
        UserError: if it can't be written.
    """
    with os_fault("can't be written", file, remedy="choose another place"):
        write_atomically(file, content)
