"""From an exported model and image files to classes and probabilities."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from peft_vit.base.errors import DataWarning, UserError, named
from peft_vit.base.files import read_bytes
from peft_vit.core.config import EXPORTS, exported_format
from peft_vit.data import IMAGE_SUFFIXES, decode_image, to_pixels
from peft_vit.data.files import files_below, open_tree
from peft_vit.data.sources.folders import is_image
from peft_vit.data.sources.tables import TABLES
from peft_vit.deploy.formats.header import Classifier, ExportMetadata, FloatArray
from peft_vit.deploy.presentation import PRESENTED, Prediction

if TYPE_CHECKING:
    from torch import nn

    from peft_vit.base.statistics import Neighbours

BATCH = 32


class ImageFile(NamedTuple):
    """An image in a folder or a zip."""

    file: Path  # in a zip: below the zip's path
    read: Callable[[], bytes]


GivenImage: TypeAlias = Path | ImageFile | Image.Image | NDArray[np.uint8] | UserError


def _function(place: str) -> Callable[..., Any]:
    module, name = place.split(".")
    function: Callable[..., Any] = getattr(import_module(f"peft_vit.deploy.formats.{module}"), name)
    return function


def writer_of(format: str) -> Callable[[nn.Module, Path, ExportMetadata, Neighbours | None], None]:
    """Return what writes a merged model in a format of `config.EXPORTS`."""
    return _function(EXPORTS[format].writer)


def open_exported(path: Path, weights: str | None = None) -> Classifier:
    """Return the classifier in what `peft-vit export` has written: a file of a format, or a PEFT folder.

    Args:
        path: of the file or folder.
        weights: see `open_peft`.

    Raises:
        UserError: if it is none of these, is damaged, or was changed after it was written.
    """
    name = exported_format(path)
    if name == "peft":
        peft: Classifier = _function("torch_files.open_peft")(path, weights)
        return peft
    if weights is not None:
        raise UserError("has no effect here: only a PEFT folder is without its base's weights", field="--weights")
    if name is None:
        *endings, last = (kind.ending for kind in EXPORTS.values() if kind.ending)
        raise UserError(
            f"expected a {', '.join(endings)} or {last} file, a folder that `peft-vit export` has written, or a run's "
            "folder",
            file=path,
        )
    with named(path):
        opened: Classifier = _function(EXPORTS[name].opener)(path)
        return opened


def image_files(paths: Iterable[Path]) -> list[ImageFile | UserError]:
    """Return the images that paths name, those of folders, of folders below and of zips in the order of their names.

    Links are followed, and a folder's file is taken once, however many links lead to it. Hidden files are left out, as
    in training, and files of a folder that are not called as images are. A folder below that can't be read is an error
    among the images.

    Raises:
        UserError: for a path where nothing is, and for a folder or a zip without an image.
    """
    images: list[ImageFile | UserError] = []
    for path in paths:
        if not os.path.exists(path):  # unlike Path.exists, also False for an impossible name
            raise UserError("does not exist; name image files, folders of them, or a zip", file=path)
        if os.path.isdir(path):
            closed: list[UserError] = []
            files = [path / name for name in files_below(path, closed) if is_image(name)]
            once: dict[str, Path] = {}  # by where it really is
            for file in sorted(files, key=os.path.islink):
                once.setdefault(os.path.realpath(file), file)
            inside: list[ImageFile | UserError] = [
                *(_on_disk(file) for file in files if file.is_file() and once[os.path.realpath(file)] == file),
                *closed,
            ]
        elif path.suffix.lower() == ".zip":
            inside = _in_zip(path)
        elif path.suffix.lower() in TABLES:
            raise UserError("is a table; name image files, folders of them, or a zip", file=path)
        else:
            images.append(_on_disk(path))
            continue
        if not inside:
            raise UserError(f"holds no image ({' '.join(IMAGE_SUFFIXES)})", file=path)
        images += inside
    return images


def _on_disk(file: Path) -> ImageFile:
    return ImageFile(file, lambda: read_bytes(file))


def _in_zip(path: Path) -> list[ImageFile | UserError]:
    try:
        tree = open_tree(path)
    except UserError as error:  # without the key that names a configuration's folder
        raise UserError(error.message, file=error.file) from None

    def member(name: str) -> ImageFile:
        return ImageFile(path / name, lambda: tree.read(name))

    return [member(name) for name in tree.names if is_image(name)]


def predict_files(
    classifier: Classifier, images: Iterable[GivenImage], coverage: float | None = None, top: int = 1
) -> Iterator[Prediction | UserError]:
    """Yield one prediction an image, in the order given, or what is wrong with a file, a folder below or an array.

    Args:
        classifier: what is asked.
        images: paths, see `image_files`, or what it has found; and arrays (H, W), (H, W, 3) or (H, W, 4) uint8.
        coverage: about how often the true class is to be in an image's set, see `check_coverage`; None: no sets.
        top: how many of the most probable classes to return.

    Raises:
        UserError: as `image_files`.
    """
    for image, computed in outputs_of(classifier, images):
        if isinstance(computed, UserError):
            yield computed
        else:
            yield prediction_of(image, computed[0], classifier.card, coverage, top, computed[1])


def outputs_of(
    classifier: Classifier, images: Iterable[GivenImage]
) -> Iterator[tuple[GivenImage, tuple[FloatArray, float | None] | UserError]]:
    """Yield each image with its logits (classes,) and its distance to the nearest training image, or what is wrong."""
    card, remaining = classifier.card, each_image(images)
    while chunk := list(islice(remaining, BATCH)):
        read: list[FloatArray | UserError] = []
        for image in chunk:
            try:
                read.append(prepared(image, card))
            except UserError as error:
                read.append(error)
        rows: Iterator[tuple[FloatArray, float | None]] = iter(())
        if arrays := [array for array in read if isinstance(array, np.ndarray)]:
            batch = np.stack(arrays)
            if classifier.with_distances is None:
                rows = zip(classifier.logits(batch), repeat(None))
            else:
                logits, distances = classifier.with_distances(batch)
                rows = zip(logits, distances.tolist(), strict=True)
        for image, array in zip(chunk, read, strict=True):
            yield image, array if isinstance(array, UserError) else next(rows)


def each_image(images: Iterable[GivenImage]) -> Iterator[GivenImage]:
    """Yield images, and those of each folder and zip; raises UserError as `image_files`."""
    for image in images:
        if isinstance(image, Path):
            yield from image_files([image])
        else:
            yield image


def predict_images(
    classifier: Classifier,
    images: Iterable[GivenImage],
    coverage: float | None = None,
    top: int = 1,
    *,
    leave_out: bool = False,
) -> list[Prediction]:
    """Return one prediction an image, in their order; arguments as `predict_files`'.

    Args:
        leave_out: warn of files of folders and zips that can't be read, once, instead of an error.

    Raises:
        UserError: for the first image that can't be read, or an array that is none.
    """
    predictions, faults, named = list[Prediction](), list[UserError](), set[str]()

    def noted() -> Iterator[GivenImage]:
        for image in images:
            if isinstance(image, Path):
                named.add(str(image))
            yield image

    for outcome in predict_files(classifier, noted(), coverage, top):
        if not isinstance(outcome, UserError):
            predictions.append(outcome)
        elif leave_out and is_found(outcome, named):
            faults.append(outcome)
        else:
            raise outcome
    warn_left_out(faults, len(predictions))
    return predictions


def is_found(fault: UserError, named: Container[str]) -> bool:
    """Tell whether a fault is of a file that a folder or a zip holds, not of one that was named itself."""
    return fault.file is not None and fault.file not in named


def warn_left_out(faults: Sequence[UserError], read: int) -> None:
    """Warn once of files that can't be read, beside so many that can; raises the first fault if none can."""
    if faults and not read:
        raise faults[0]
    if faults:
        text = "\n".join([f"{DataWarning.PREFIX}{len(faults):,} can't be read and are left out:", *map(str, faults)])
        warnings.warn(text, DataWarning, stacklevel=4)


def check_coverage(card: ExportMetadata, coverage: float) -> None:
    """Refuse a coverage that a model has no sets for.

    Raises:
        UserError: if it is outside what is stored with the model, or nothing is.
    """
    if (meaning := card.meaning) is None:
        raise UserError(
            "needs thresholds from images that were not trained on, and this model holds none: it validated on no "
            "images, or was made by an earlier version; leave it out",
            field="coverage",
        )
    meaning.threshold(coverage)


def prepared(image: GivenImage, card: ExportMetadata) -> FloatArray:
    """Return an image as a model's input, (3, S, S), as training would see it.

    Normalised as `data.normalised` does, to the last bit and without torch.

    Raises:
        UserError: if it can't be read.
    """
    pixels = pixels_of(image, card)  # (S, S, C), C of 1 or 3
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (card.mean, card.std))  # (3, 1, 1)
    values = pixels.transpose(2, 0, 1).astype(np.float32)  # (C, S, S)
    return np.ascontiguousarray((values / np.float32(255) - mean) / std)


def pixels_of(image: GivenImage, card: ExportMetadata) -> NDArray[np.uint8]:
    """Return an image at a model's size, (S, S, C) uint8; raises UserError if it can't be read."""
    if isinstance(image, UserError):
        raise image
    if isinstance(image, Path):
        image = _on_disk(image)
    if isinstance(image, Image.Image):
        decoded = image
    elif isinstance(image, ImageFile):
        decoded = decode_image(image.read, str(image.file))
    elif (
        isinstance(image, np.ndarray)
        and image.dtype == np.uint8
        and image.size
        and (image.ndim == 2 or image.shape[2:] in ((3,), (4,)))
    ):
        decoded = Image.fromarray(image)
    else:
        got = f"{image.shape} {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(f"expected an image as (H, W), (H, W, 3) or (H, W, 4) uint8, got {got}", field="images")
    return to_pixels(decoded, card.image_size, card.channels, card.interpolation, card.resize)


def prediction_of(
    image: GivenImage,
    logits: FloatArray,
    card: ExportMetadata,
    coverage: float | None,
    top: int,
    distance: float | None = None,
) -> Prediction:
    """Return what the logits (classes,) of one image say, and its distance to the nearest training image."""
    if coverage is not None:
        check_coverage(card, coverage)
    prediction = PRESENTED[card.task].prediction(logits, card.class_names, card.meaning, coverage, top)
    file = image.file if isinstance(image, ImageFile) else image if isinstance(image, Path) else None
    unlike = None if distance is None or card.unlike is None else distance > card.unlike.threshold
    return replace(prediction, file=file, unlike=unlike, distance=distance)


def columns_of(card: ExportMetadata, coverage: float | None, top: int) -> list[str]:
    """Return the columns that a table of predictions has between `file` and `unlike`."""
    of_zeros = prediction_of(Path(), np.zeros(len(card.class_names), np.float32), card, coverage, top)
    return list(PRESENTED[card.task].cells(of_zeros, coverage is not None))
