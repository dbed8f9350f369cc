"""What an exported file says of itself: how it is used without the run that made it, and the hash that belongs to it.

A file of any format holds one `Header` as JSON under the key HEADER; how a hash is taken over its content is the
format's own (docs/reference/exported_files.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from peft_vit.config import Interpolation, Library
from peft_vit.errors import UserError, checked, os_fault
from peft_vit.records import write_atomically
from peft_vit.statistics import class_scores, conformal_quantile, fit_temperature, prediction_sets, probabilities

if TYPE_CHECKING:
    from peft_vit.backbones import Architecture

HEADER = "peft_vit_model"  # key of a file's metadata
UNSIGNED = "0" * 64  # in place of the hash while it is computed
COVERAGES = tuple(percent / 100 for percent in range(80, 100))
_Positive = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Model = TypeVar("_Model", bound=BaseModel)


class Strict(BaseModel):
    """Checked values that are what they say."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Calibrated(Strict):
    """How far a model can be believed: a temperature, and thresholds of prediction sets.

    Found on images of which the models that predicted them were not trained; see `statistics.conformal`.
    """

    images: int = Field(ge=1)
    temperature: float = Field(gt=0)  # probabilities are softmax(logits / temperature)
    coverages: tuple[_Share, ...]  # rising
    thresholds: tuple[_Share, ...]  # of each coverage: a class with 1 - p up to it is in the set

    @model_validator(mode="after")
    def _one_a_coverage(self) -> Self:
        if len(self.coverages) != len(self.thresholds) or list(self.coverages) != sorted(set(self.coverages)):
            raise ValueError("expected rising coverages and a threshold for each")
        return self

    @classmethod
    def on(cls, logits: ArrayLike, labels: ArrayLike, images: Sequence[int]) -> Self:
        """Fit a temperature, and thresholds to the probabilities that it makes.

        One number on so many images hardly fits to them, so the thresholds take the same images
        (docs/explanation/tuning.md has how far coverage then is from what was asked).

        Args:
            logits: (m, classes), held out; an image has a row for each time that it was.
            labels: (m,) true classes.
            images: (m,) which image each row is of.

        Raises:
            ValueError: as `statistics.fit_temperature`.
        """
        temperature = fit_temperature(logits, labels)
        scores = class_scores(probabilities(logits, temperature), labels)
        quantiles = {coverage: conformal_quantile(scores, coverage, images) for coverage in COVERAGES}
        finite = {coverage: quantile for coverage, quantile in quantiles.items() if math.isfinite(quantile)}
        return cls(
            images=len(set(images)), temperature=temperature, coverages=tuple(finite), thresholds=tuple(finite.values())
        )

    def probabilities(self, logits: ArrayLike) -> NDArray[np.float64]:
        """Return (N, classes) of logits of the same shape."""
        return probabilities(logits, self.temperature)

    def sets(self, probability: ArrayLike, coverage: float) -> NDArray[np.bool_]:
        """Return which classes belong to each image's set, (N, classes), by the next coverage that is stored.

        Raises:
            UserError: if that coverage is outside what is stored.
        """
        return prediction_sets(probability, self.threshold(coverage))

    def threshold(self, coverage: float) -> float:
        """Return the threshold of the least stored coverage that is not below one.

        Raises:
            UserError: if there is none, or all are above it.
        """
        if not self.coverages:
            raise UserError(
                f"the model was calibrated on {self.images} images, too few for any; leave it out", field="coverage"
            )
        lowest, highest = self.coverages[0], self.coverages[-1]
        if not lowest - 1e-9 <= coverage <= highest + 1e-9:  # also NaN
            raise UserError(
                f"expected {lowest:g} to {highest:g}, for which the model has thresholds; got {coverage:g}",
                field="coverage",
            )
        return next(t for stored, t in zip(self.coverages, self.thresholds, strict=True) if stored >= coverage - 1e-9)


class ModelCard(Strict):
    """How images become the model's input, what its outputs mean, and where it comes from."""

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
        fields: dict[str, Any] = write(self)
        later = {"library": "timm", "config": None, "interpolation": "bicubic", "calibrated": None}
        return {key: value for key, value in fields.items() if key not in later or value != later[key]}

    @property
    def architecture(self) -> Architecture:
        """Return what the model is built from."""
        from peft_vit.backbones import Architecture  # with torch, which a file for another runtime does not need

        return Architecture(self.library, self.model, self.config)


class Header(Strict):
    """The envelope of every exported file."""

    version: Literal[1] = 1
    card: ModelCard
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] = UNSIGNED

    @classmethod
    def read(cls, text: str | None, file: Path, name: str) -> Self:
        """Return the header of a file of a format, whose text has been found or not.

        Raises:
            UserError: if there is none, or it is damaged.
        """
        if text is None:
            raise UserError(f"was not written by `peft-vit export --format {name}`, or was cut off", file=file)
        return read_json(cls, text, file)

    def check(self, sha256: str, file: Path, *beside: Path) -> None:
        """Refuse a file whose content has another hash.

        Raises:
            UserError: if it has.
        """
        if sha256 != self.sha256:
            which = "".join(f"it or {other.name} " for other in beside)
            raise UserError(f"{which}was changed after it was written; export the run again", file=file)

    def signed(self, sha256: str) -> str:
        """Return the text of the header with the hash of its file's content."""
        return self.model_copy(update={"sha256": sha256}).model_dump_json()


@dataclass(frozen=True)
class Classifier:
    """A trained model from whatever file, ready to be asked."""

    logits: Callable[[NDArray[np.float32]], NDArray[np.float32]]  # normalised images (B, 3, S, S) -> (B, classes)
    card: ModelCard


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
