"""A folder of digits to label, whose features are their pixels, and a session of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from peft_vit.core.config import TaskName
from peft_vit.label.features import Computed
from peft_vit.label.images import ImageFolder
from peft_vit.label.labels import LabelStore
from peft_vit.label.session import Order, Session


class PixelFeatures:
    """Features of tiny images, all there at once."""

    def __init__(self, images: ImageFolder) -> None:
        self.fault, self._images = "", images

    def read(self) -> Computed:
        names = self._images.names
        values = [np.asarray(Image.open(self._images.root / name).convert("L")).ravel() / 255 for name in names]
        count = len(names)
        return Computed(np.array(values, np.float32), np.arange(count), np.empty((count, 0)), np.zeros(count))


def write_digits(folder: Path, count: int, classes: int = 10) -> dict[str, str]:
    """Write images of digits in no order, and return what each shows."""
    digits = load_digits(n_class=classes)
    truth = {}
    for number, i in enumerate(np.random.default_rng(0).permutation(len(digits.target))[:count].tolist()):
        name = f"d{number:03}.png"
        Image.fromarray((255 - 15.9 * digits.images[i]).astype(np.uint8)).save(folder / name)
        truth[name] = f"digit {digits.target[i]}"
    return truth


def session_of(folder: Path, digits: int = 0, task: TaskName = "classification", order: Order = "files") -> Session:
    """Return a session of a folder, into which so many images of digits are written first."""
    write_digits(folder, digits)
    images = ImageFolder(folder)
    return Session(LabelStore(folder, task), images, PixelFeatures(images), order)  # type: ignore[arg-type]
