"""Features of a pretrained or trained model, computed in a process of its own while a person labels.

What reads them needs no torch. The process appends a record an image to a file of the user's cache, in an order that is
random: the first hundred show all of a folder. A record holds the SHA-256 of the image's file and its features, so
images may be renamed, added and removed, and a process that was killed continues. The first record holds the weights'
SHA-256; with other weights a file is begun again. Of an image that can't be read the features are NaN.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import psutil
from numpy.typing import NDArray

from peft_vit.base.errors import UserError
from peft_vit.base.files import make_folder, read_bytes
from peft_vit.core.config import DEFAULT_MODEL, BackboneConfig
from peft_vit.data.files import cache_fault, in_threads
from peft_vit.data.pixels import decode_image, decoders, to_pixels
from peft_vit.label.images import SMALL, ImageFolder
from peft_vit.runs.this_machine.cache import cache_file

if TYPE_CHECKING:
    from torch import Tensor

_SIZE, _BATCH = 112, 16  # pixels a side, images


class Computed(NamedTuple):
    """What is there of M images."""

    features: np.ndarray  # (M, D) float32
    ids: np.ndarray  # (M,) int64
    probabilities: np.ndarray  # (M, classes), by a trained model; of the default one (M, 0)
    distances: np.ndarray  # (M,), to the nearest image that a trained model has learned from; else 0


def record_type(num_features: int = 0, num_classes: int = 0) -> np.dtype[Any]:
    """Return what a file holds of an image."""
    values = [("features", "<f4", (num_features,)), ("probabilities", "<f4", (num_classes,)), ("distance", "<f4")]
    return np.dtype([("digest", "S64"), *values])


def read_records(file: Path, digests: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return which of N images a file has looked at, (M,), and its records of them, (M,)."""
    records = np.empty(0, record_type())
    with suppress(FileNotFoundError), file.open("rb") as opened:
        dtype, start = _dtype(opened), opened.tell()
        whole = (os.fstat(opened.fileno()).st_size - start) // dtype.itemsize
        records = np.memmap(opened, dtype, "r", start, whole)
    place_of = {digest: place for place, digest in enumerate(records["digest"].tolist())}
    places = np.array([place_of.get(digest.encode(), -1) for digest in digests], np.int64)  # (N,)
    return np.flatnonzero(places >= 0), records[places[places >= 0]]


def _dtype(opened: BinaryIO) -> np.dtype[Any]:
    """Return the type of a file's records, which begin where it has been read to; it has the header of .npy files."""
    np.lib.format.read_magic(opened)
    return np.lib.format.read_array_header_1_0(opened)[2]


class FolderFeatures:
    """Features of a folder's images, and the process that computes them.

    Args:
        images: of the folder.
        model: a run's folder, whose features they are; None: the default model's, as it was pretrained.
    """

    def __init__(self, images: ImageFolder, model: Path | None = None) -> None:
        self._images = images
        trained = "" if model is None else str(model.resolve())
        depends_on = {"folder": str(images.root), "model": trained or DEFAULT_MODEL, "image_size": _SIZE}
        self._place = cache_file("labelling", {**depends_on, "pixels": decoders()}, "npy")
        self._errors = tempfile.TemporaryFile("w+", encoding="locale")  # noqa: SIM115 - as long as the process
        command = [sys.executable, "-m", __name__, str(images.root), str(self._place), str(os.getpid()), trained]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=self._errors)

    @property
    def fault(self) -> str:
        """Return why the process has ended too early, in a line, or ""."""
        if not self._process.poll():
            return ""
        self._errors.seek(0)
        return self._errors.read().strip().rpartition("\n")[2] or "the process that computes features was killed"

    def stop(self) -> None:
        """End the process; the features that are there are kept."""
        self._process.terminate()
        self._process.wait()

    def read(self) -> Computed:
        """Return what is there; the first call reads all images, to know which features are whose."""
        images = self._images
        ids, records = read_records(self._place, [images.digest(i) for i in range(len(images.names))])
        is_readable = np.isfinite(records["features"]).all(1)  # (M,)
        for i in ids[~is_readable].tolist():
            if images.names[i] not in images.left_out:
                images.is_sound(i, SMALL)  # which says why not
        records = records[is_readable]
        return Computed(records["features"], ids[is_readable], records["probabilities"], records["distance"])


class _Model(NamedTuple):
    """What makes of B images, (B, C, S, S) uint8, what a record holds of them."""

    values: Callable[[Tensor], tuple[Any, Any, Any]]
    sha256: str
    taken: tuple[Any, ...]  # side, channels and so on: how `to_pixels` makes its input
    enough: int | None = None  # pixels, see `decode_image`


def _pretrained() -> _Model:
    from peft_vit.core.backbones import Backbone, default_weights_source, interpolation_of, load_backbone
    from peft_vit.core.training.images import normalised
    from peft_vit.runs.this_machine.machine import resolve_device

    device = resolve_device("auto")
    weights, _ = default_weights_source(DEFAULT_MODEL)
    config = BackboneConfig(model=DEFAULT_MODEL, weights=weights, head_blocks=4)
    loaded = load_backbone(config, image_size=_SIZE, num_classes=2, seed=0)
    backbone = Backbone(loaded.model.eval().to(device))

    def values(pixels: Tensor) -> tuple[Any, Any, Any]:
        images = normalised(pixels, loaded.mean, loaded.std).to(device)  # (B, 3, S, S)
        return backbone.features(images).float().cpu(), np.empty((len(images), 0)), 0.0  # (B, D), (B, 0)

    taken = (_SIZE, 3, interpolation_of(loaded.architecture))
    return _Model(values, loaded.weights_sha256 or "", taken, enough=_SIZE)


def _trained(run: Path) -> _Model:
    """Return a run's model, whose values are features, a class's probabilities, and what `predict` calls distance."""
    from peft_vit.base.statistics import probabilities
    from peft_vit.core.backbones import Backbone
    from peft_vit.core.training.images import normalised
    from peft_vit.deploy.formats.torch_files import torch_classifier
    from peft_vit.deploy.restore import restore_run

    restored = restore_run(run)
    card, backbone = restored.card, Backbone(restored.model)
    classifier = torch_classifier(restored.model, card, restored.reference)
    compute = classifier.with_distances or (lambda images: (classifier.logits(images), np.zeros(1, np.float32)))
    temperature = getattr(card.meaning, "temperature", 1.0)
    num_classes = len(card.class_names) if card.task == "classification" else 0

    def values(pixels: Tensor) -> tuple[Any, Any, Any]:
        images = normalised(pixels, card.mean, card.std)  # (B, 3, S, S)
        logits, distances = compute(images.numpy())
        of_classes = probabilities(logits, temperature)[:, :num_classes]  # (B, K), or (B, 0)
        return backbone.features(images), of_classes, distances

    taken = (card.image_size, card.channels, card.interpolation, card.resize)
    return _Model(values, restored.record.adapter_sha256 or "", taken)


def compute_features(folder: Path, file: Path, parent: int, run: Path | None = None) -> None:
    """Append the features of the images that are not in a file, and end early if the process that wanted them has.

    Args:
        folder: of the images.
        file: where to.
        parent: the process that wants them.
        run: folder of a run, whose model's they are, with its probabilities and its distance to the nearest image that
            it was trained on; None: the default model's.

    Raises:
        UserError: if weights can't be loaded, or the file can't be written.
    """
    with cache_fault(file):
        make_folder(file.parent)

    import torch

    images, model = ImageFolder(folder), _pretrained() if run is None else _trained(run)
    side, channels, *_ = model.taken
    with torch.inference_mode():
        features, probabilities, _ = model.values(torch.zeros(1, channels, side, side, dtype=torch.uint8))
    dtype = record_type(features.shape[1], probabilities.shape[1])
    with cache_fault(file):
        known = _begun(file, dtype, model.sha256.encode())

    def prepared(name: str) -> tuple[bytes, NDArray[np.uint8] | None]:
        """Return the SHA-256 of an image's file, empty if there is none, and its pixels."""
        try:
            content = read_bytes(folder / name)
        except OSError:
            return b"", None
        digest = hashlib.sha256(content).hexdigest().encode()
        if digest in known:
            return digest, None
        try:
            image = decode_image(lambda: content, name, enough=model.enough)
        except UserError:
            return digest, None
        return digest, to_pixels(image, *model.taken)

    for start in range(0, len(images.names), _BATCH):
        if not psutil.pid_exists(parent):  # on Windows none takes its place
            return
        by_digest = dict(in_threads(prepared, [images.names[i] for i in images.shuffled[start : start + _BATCH]]))
        new = {digest: pixels for digest, pixels in by_digest.items() if digest and digest not in known}
        records = np.zeros(len(new), dtype)
        records["digest"], records["features"] = list(new), np.nan
        readable = {place: pixels for place, pixels in enumerate(new.values()) if pixels is not None}
        if readable:
            places, batch = list(readable), torch.from_numpy(np.stack(list(readable.values())))  # (B, S, S, C)
            with torch.inference_mode():
                of_batch = model.values(batch.permute(0, 3, 1, 2))
            records["features"][places], records["probabilities"][places], records["distance"][places] = of_batch
        with cache_fault(file), file.open("ab") as opened:
            opened.write(records.tobytes())
        known.update(new)


def _begun(file: Path, dtype: np.dtype[Any], weights: bytes) -> set[bytes]:
    """Return the digests that a file holds, which is begun if it isn't there, or is of another model or weights."""
    with suppress(OSError, ValueError), file.open("r+b") as opened:
        stored, start = _dtype(opened), opened.tell()
        records = np.fromfile(opened, stored)
        if stored == dtype and len(records) and records["digest"][0] == weights:
            opened.truncate(start + records.nbytes)  # what a killed process has left of a record
            return set(records["digest"].tolist())
    file.unlink(missing_ok=True)  # it may be mapped
    with file.open("wb") as opened:
        np.lib.format.write_array_header_1_0(opened, {"descr": dtype.descr, "fortran_order": False, "shape": ()})
        opened.write(np.array([(weights, np.nan, np.nan, np.nan)], dtype).tobytes())
    return {weights}


def main() -> None:
    """Compute the features of a folder's images, as `FolderFeatures` asks."""
    folder, file, parent, run = sys.argv[1:]
    try:
        compute_features(Path(folder), Path(file), int(parent), Path(run) if run else None)
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
