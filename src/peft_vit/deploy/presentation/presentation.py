"""What a task is shown as, and what most tasks share of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from peft_vit.core.records import Decision
from peft_vit.core.tasks import Labels, Meaning, Task
from peft_vit.core.tasks.metric import Flags, Floats, Outputs

if TYPE_CHECKING:
    from PIL import Image

Named: TypeAlias = tuple[tuple[str, float], ...]  # classes and their probabilities, from the largest
Counts: TypeAlias = NDArray[np.int64]
Rows: TypeAlias = list[dict[str, Any]]


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image. Probabilities are calibrated if the model's file says how."""

    file: Path | None = None  # None: of an array
    class_name: str = ""  # the most probable one; empty of numbers
    probability: float = math.nan
    classes: Named = ()  # its set, with a coverage
    top: Named = ()  # so many as were asked for
    unlike: bool | None = None  # unlike all images that were trained on; None: the model can't tell
    distance: float | None = None  # to the nearest of them
    labels: Named = ()  # of a model of several labels: those above their thresholds
    numbers: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # by name: number, and its interval's ends


@dataclass(frozen=True)
class Explanation:
    """Where a model looked in an image.

    Attributes:
        class_name: that it said.
        weights: (cells, cells): of patches, see `attended`; or by how much the log-probability of this class falls
            where the image is covered.
        picture: the image as the model gets it, under a grey veil where little matters.
        by: how it was made.
    """

    class_name: str
    weights: NDArray[np.float32]
    picture: Image.Image
    by: Literal["attention", "occlusion"]


class Errors(NamedTuple):
    """How far numbers are from the true ones."""

    sizes: Floats  # (N, K), predicted less true
    reach: Floats | None  # (N, K): how far intervals reach to both sides; None: there are none
    coverage: float = 0.0  # of these


class ImageSelection(NamedTuple):
    """Test images that a page shows."""

    slug: str
    title: str
    rule: str  # how they were chosen
    groups: tuple[tuple[str, tuple[tuple[int, tuple[str, ...]], ...]], ...]  # title, and of each image place and lines


class LabelledOutputs(NamedTuple):
    """What a model says of test images."""

    labels: Labels  # N, the true ones
    predicted: Labels  # N
    names: Sequence[str]  # of outputs, as a page has them
    decision: Decision | None


class Presentation(Protocol):
    """How a task's outputs are shown: probabilities of names, as most have them, or what a task has instead.

    Outputs are (N, K), `names` those of its columns.

    Attributes:
        task: that is shown.
        note: how to read its table of outputs.
        promise: what people call what `predict --coverage` gives, its shares that hold, its size, and what it is.
        holds: of which images it holds the truth, at so many percent. Never more than about: validation images have
            chosen steps, sizes and penalties before they make thresholds, and folds do not test the last training.
    """

    task: Task
    note: str = ""
    promise: tuple[str, str, str, str]
    holds: str = ""

    def prediction(
        self, outputs: Outputs, names: Sequence[str], meaning: Meaning, coverage: float | None, top: int
    ) -> Prediction:
        """Return what is reported of an image, by its outputs (K,)."""

    def for_browser(self, meaning: Meaning, coverage: float | None) -> dict[str, Any]:
        """Return what web.js has to know to answer alike, and the words of its page.

        Args:
            meaning: of outputs.
            coverage: of what is promised; None: the model has none.
        """

    def cells(self, prediction: Prediction, with_sets: bool) -> dict[str, Any]:
        """Return an image's cells in a table of predictions, between `file` and `unlike`, by column."""
        ranked = {
            column + ("" if place == 1 else f"_{place}"): cell
            for place, named in enumerate(prediction.top, start=1)
            for column, cell in zip(("class", "probability"), named, strict=True)
        }
        return ranked | ({"set": [name for name, _ in prediction.classes]} if with_sets else {})

    def measures(self, outputs: LabelledOutputs) -> Rows:
        """Return what a page says of each output: its name, and measures; none: it says it otherwise."""
        return []

    def errors(self, outputs: LabelledOutputs) -> Errors | None:
        """Return how far predictions are off; None: they are not numbers."""
        return None

    def cooccurrence(self, outputs: LabelledOutputs) -> tuple[Counts, Counts] | None:
        """Return on how many images two outputs are together, (K, K), in truth and as predicted; None: never."""
        return None

    def image_selections(self, outputs: LabelledOutputs) -> Iterator[ImageSelection]:
        """Yield which images a page shows, such as the worst ones."""
        yield from ()


def ranked(names: Sequence[str], probability: Floats, mask: Flags | bool = True) -> Named:
    """Return names in a mask (K,), from the most probable on, by probabilities (K,); of equal ones the first."""
    chosen = np.broadcast_to(mask, len(names))
    return tuple((names[k], float(probability[k])) for k in np.argsort(-probability, kind="stable") if chosen[k])


def of_ranking(ranking: Named, top: int, *, classes: Named = (), labels: Named = ()) -> Prediction:
    """Return what is reported of an image whose names are ranked."""
    name, probability = ranking[0]
    return Prediction(None, name, probability, classes, ranking[:top], labels=labels)
