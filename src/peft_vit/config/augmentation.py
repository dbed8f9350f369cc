"""How training images are changed before the model sees them: `training.augmentation`, a list of names or of names
with settings.

    augmentation: [flip, random_resized_crop: {scale: [0.5, 1.0]}, mixup: {alpha: 0.2}]

What a setting does is told where it is done, in `data.images`.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_serializer, model_validator

from peft_vit.settings import Frozen

Flips = Literal["none", "horizontal", "both"]


def _rising(values: tuple[float, float]) -> tuple[float, float]:
    if not 0 < values[0] <= values[1]:
        raise ValueError(f"expected [low, high] with 0 < low <= high, got {list(values)}")
    return values


_Range = Annotated[tuple[float, float], Field(strict=False), AfterValidator(_rising)]


class Flip(Frozen):
    """Left-right with probability 1/2; `both`: upside down, too, independently."""

    direction: Literal["horizontal", "both"] = Field(default="horizontal", description="both: upside down, too")


class Rotate90(Frozen):
    """By 0, 90, 180 or 270 degrees, equally likely."""


class RandomResizedCrop(Frozen):
    """A part of the image, enlarged to `image_size`."""

    scale: _Range = Field(default=(0.08, 1.0), description="area of the part, as a share of the image")
    ratio: _Range = Field(default=(3 / 4, 4 / 3), description="width over height of the part")

    @model_validator(mode="after")
    def _is_a_part(self) -> Self:
        if self.scale[1] > 1:
            raise ValueError(f"scale: a part has at most the image's area, got {self.scale[1]:g}; lower it to 1")
        if self.scale == self.ratio == (1.0, 1.0):
            raise ValueError("scale and ratio of [1, 1] are the whole image, so nothing changes; remove it")
        return self


class ColorJitter(Frozen):
    """Brightness, contrast and saturation times a factor out of [1 - x, 1 + x], hue moved by up to x of its circle.

    torchvision's own defaults change nothing; these are what timm makes of its usual `color_jitter=0.4`.
    """

    brightness: float = Field(default=0.4, ge=0, description="x of its factor")
    contrast: float = Field(default=0.4, ge=0, description="x of its factor")
    saturation: float = Field(default=0.4, ge=0, description="x of its factor")
    hue: float = Field(default=0.0, ge=0, le=0.5, description="largest move, as a share of the circle")

    @model_validator(mode="after")
    def _something_moves(self) -> Self:
        if not (self.brightness or self.contrast or self.saturation or self.hue):
            raise ValueError("all four are 0, so nothing changes; raise one or remove color_jitter")
        return self


class RandAugment(Frozen):
    """Some operations drawn from a list, one after the other (arXiv 1909.13719)."""

    num_ops: int = Field(default=2, ge=1, le=14, description="operations an image")
    magnitude: int = Field(default=9, ge=0, le=30, description="of 31 levels")


class Mixup(Frozen):
    """Images and labels of two images in proportion (arXiv 1710.09412)."""

    alpha: float = Field(default=1.0, gt=0, description="of the Beta distribution of the proportion")


class Cutmix(Frozen):
    """A rectangle of another image, labels in proportion to the areas (arXiv 1905.04899)."""

    alpha: float = Field(default=1.0, gt=0, description="of the Beta distribution of the proportion")


class Augmentation(Frozen):
    """One entry of the list: one of these, by its name alone or with settings."""

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
        found: Frozen = getattr(self, self.name)
        return found

    @property
    def mixes(self) -> bool:
        """Return whether it acts on a batch, and on its labels, instead of on each image."""
        return isinstance(self.settings, Mixup | Cutmix)


# What `data.flips` said, which older records and studies have in place of `training.augmentation`.
AUGMENTATION_OF_FLIPS: dict[Flips, tuple[Augmentation, ...]] = {
    "none": (),
    "horizontal": (Augmentation(flip=Flip()),),
    "both": (Augmentation(flip=Flip(direction="both")),),
}


def checked(augmentation: tuple[Augmentation, ...]) -> tuple[Augmentation, ...]:
    """Return a list as it is.

    Raises:
        ValueError: if an entry stands twice, or before one that can't come after it.
    """
    names = [one.name for one in augmentation]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise ValueError(f"{name} stands twice; remove one")
        if augmentation[place].mixes and not all(later.mixes for later in augmentation[place:]):
            raise ValueError(f"{name} mixes whole batches, after all that changes single images; put it last")
    return augmentation
