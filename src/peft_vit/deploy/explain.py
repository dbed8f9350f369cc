"""Where a classifier looked: what its class rests on by attention, or how much less sure it is with parts covered.

The second is occlusion (Zeiler and Fergus, arXiv 1311.2901). It asks the model alone, so it works in every format.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.special
from PIL import Image

from peft_vit.base.errors import UserError
from peft_vit.core.records import RunRecord
from peft_vit.core.tasks import TASKS
from peft_vit.deploy.formats.header import Classifier, ExportMetadata, FloatArray
from peft_vit.deploy.predicting import GivenImage, pixels_of, prepared
from peft_vit.deploy.presentation import Explanation

_CELL, _MOST_CELLS = 14, 8  # pixels, about, and cells on a side, at most
_CLEAR, _VEIL = 0.25, 110  # share of an image that is seen where nothing matters, and the grey that lies over it
_SHOWN = 224  # pixels, at least


def check_explainable(card: ExportMetadata) -> None:
    """Refuse a model that does not say one class an image.

    Raises:
        UserError: if it does not.
    """
    if not TASKS[card.task].one_class:
        raise UserError(f"works with models of one class an image, and this one is of {card.task}", field="--explain")


def explain(classifier: Classifier, image: GivenImage) -> Explanation:
    """Return where a model looked in an image: by its attention, if PyTorch computes it, else by occlusion.

    Raises:
        UserError: if the image can't be read, or the model does not say one class an image.
    """
    card = classifier.card
    check_explainable(card)
    plain = prepared(image, card)  # (3, S, S)
    said = scipy.special.log_softmax(classifier.logits(plain[None])[0])  # (classes,)
    best, weights = int(said.argmax()), None
    by: Literal["attention", "occlusion"] = "attention"
    if classifier.module is not None:
        from peft_vit.deploy.attended import attended  # with torch, which a file for another runtime does not need

        weights = attended(classifier.module, plain)
    if weights is None:
        weights, by = _drops(classifier, plain, said[best], best), "occlusion"
    return Explanation(card.class_names[best], weights, _picture(pixels_of(image, card), weights), by)


def _drops(classifier: Classifier, plain: FloatArray, said: float, best: int) -> FloatArray:
    """Cover an image (3, S, S) part by part with its mean color, and ask for its class each time."""
    cells = min(_MOST_CELLS, max(2, classifier.card.image_size // _CELL))
    parts = [slice(*ends) for ends in pairwise(np.linspace(0, classifier.card.image_size, cells + 1).astype(int))]
    drops = np.empty((cells, cells), np.float32)
    for row, of_height in enumerate(parts):
        covered = np.repeat(plain[None], cells, axis=0)  # (cells, 3, S, S)
        for place, of_width in enumerate(parts):
            covered[place, :, of_height, of_width] = plain.mean((1, 2))[:, None, None]
        drops[row] = said - scipy.special.log_softmax(classifier.logits(covered), axis=1)[:, best]
    return drops


def _picture(pixels: np.ndarray, weights: FloatArray) -> Image.Image:
    """Return an image (S, S, C) with a veil as a map says (cells, cells): none over what makes a class likeliest."""
    side = max(_SHOWN, len(pixels))
    clear = np.clip(weights, 0, None) / max(float(weights.max()), 1e-6)
    resized = Image.fromarray(clear).resize((side, side), Image.Resampling.BILINEAR)
    shown = Image.fromarray(pixels.squeeze()).convert("RGB").resize((side, side))
    seen = _CLEAR + (1 - _CLEAR) * np.asarray(resized)[:, :, None]  # (side, side, 1)
    return Image.fromarray((np.asarray(shown) * seen + _VEIL * (1 - seen)).astype(np.uint8))


def explained_images(folder: Path, record: RunRecord, positions: Sequence[int]) -> list[Explanation]:
    """Return maps of a few images of a run in a folder, by their positions in its data set.

    Raises:
        UserError: if its model or the images are not on this machine, or no map is made of its attention: occlusion
            takes seconds an image.
    """
    try:
        from peft_vit.data import images_of
        from peft_vit.deploy.restore import open_model
    except ImportError as error:
        raise UserError(f"the model can't be opened here ({error})") from None
    images, classifier = images_of(record, positions), open_model(folder)
    found = []
    for image in images:
        found.append(explain(classifier, image))
        if found[0].by != "attention":
            raise UserError("no map is made of this model's attention", file=folder)
    return found
