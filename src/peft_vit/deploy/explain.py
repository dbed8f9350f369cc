"""Where a classifier looked: how much less sure of its class it is with each part of an image covered.

This is occlusion (Zeiler and Fergus, arXiv 1311.2901). It asks the model alone, so it works in every format.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import scipy.special
from PIL import Image

from peft_vit.base.errors import UserError
from peft_vit.core.tasks import TASKS
from peft_vit.deploy.formats.header import Classifier, ExportMetadata, FloatArray
from peft_vit.deploy.predicting import GivenImage, pixels_of, prepared

_CELL, _MOST_CELLS = 14, 8  # pixels, about, and cells on a side, at most
_DIM = 0.25  # of the light of what does not matter
_SHOWN = 224  # pixels, at least


@dataclass(frozen=True)
class Explanation:
    """A map of an image.

    Attributes:
        class_name: that the model said.
        drops: (cells, cells): by how much the log-probability of this class falls where the image is covered.
        picture: the image as the model gets it; what matters most is bright.
    """

    class_name: str
    drops: FloatArray
    picture: Image.Image


def check_explainable(card: ExportMetadata) -> None:
    """Refuse a model that does not say one class an image.

    Raises:
        UserError: if it does not.
    """
    if not TASKS[card.task].one_class:
        raise UserError(f"works with models of one class an image, and this one is of {card.task}", field="--explain")


def explain(classifier: Classifier, image: GivenImage) -> Explanation:
    """Cover an image part by part with its mean color, and ask for its class each time.

    Raises:
        UserError: if it can't be read, or the model does not say one class an image.
    """
    card = classifier.card
    check_explainable(card)
    plain = prepared(image, card)  # (3, S, S)
    cells = min(_MOST_CELLS, max(2, card.image_size // _CELL))
    parts = [slice(*ends) for ends in pairwise(np.linspace(0, card.image_size, cells + 1).astype(int))]
    said = scipy.special.log_softmax(classifier.logits(plain[None])[0])  # (classes,)
    best = int(said.argmax())
    drops = np.empty((cells, cells), np.float32)
    for row, of_height in enumerate(parts):
        covered = np.repeat(plain[None], cells, axis=0)  # (cells, 3, S, S)
        for place, of_width in enumerate(parts):
            covered[place, :, of_height, of_width] = plain.mean((1, 2))[:, None, None]
        drops[row] = said[best] - scipy.special.log_softmax(classifier.logits(covered), axis=1)[:, best]
    return Explanation(card.class_names[best], drops, _picture(pixels_of(image, card), drops))


def _picture(pixels: np.ndarray, drops: FloatArray) -> Image.Image:
    """Return an image (S, S, C) with its light as a map says (cells, cells); what makes a class likelier is at 1."""
    side = max(_SHOWN, len(pixels))
    light = np.clip(drops, 0, None) / max(float(drops.max()), 1e-6)
    resized = Image.fromarray(light).resize((side, side), Image.Resampling.BILINEAR)
    shown = Image.fromarray(pixels.squeeze()).convert("RGB").resize((side, side))
    lit = np.asarray(shown) * (_DIM + (1 - _DIM) * np.asarray(resized)[:, :, None])  # (side, side, 3)
    return Image.fromarray(lit.astype(np.uint8))
