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


class FeatureFile:
    """Features of N images, as many as are there; `update` reads what has been added.

    Attributes:
        values: (N, D), NaN where there are none; D is 0 until the first are there.
        done: which images were looked at, (N,).
    """

    def __init__(self, file: Path, digests: Sequence[str]) -> None:
        self._file, self._read = file, 0  # records
        self.values = np.empty((len(digests), 0), np.float32)
        self.done = np.zeros(len(digests), dtype=bool)
        self._places: dict[bytes, list[int]] = {}
        for place, digest in enumerate(digests):
            self._places.setdefault(digest.encode(), []).append(place)

    @property
    def ready(self) -> NDArray[np.bool_]:
        """Return which images have features, (N,); those that are done and have none can't be read."""
        return self.done & np.isfinite(self.values).all(1)

    def update(self) -> None:
        """Read what has been added."""
        with suppress(FileNotFoundError), self._file.open("rb") as opened:
            dtype = _dtype(opened)
            opened.seek(self._read * dtype.itemsize, os.SEEK_CUR)
            records = np.fromfile(opened, dtype)  # whole ones
            self._read += len(records)
            width = records["values"].shape[1]
            if self.values.shape[1] != width:
                self.values = np.full((len(self.done), width), np.nan, np.float32)
            for digest, values in zip(records["digest"].tolist(), records["values"], strict=True):
                places = self._places.get(digest, [])
                self.values[places], self.done[places] = values, True


def _dtype(opened: BinaryIO) -> np.dtype[Any]:
    """Return the type of a file's records, which begin where it has been read to; it has the header of .npy files."""
    np.lib.format.read_magic(opened)
    return np.lib.format.read_array_header_1_0(opened)[2]


class Computed(NamedTuple):
    """What is there of M images; the last two say what a trained model makes of them."""

    features: np.ndarray  # (M, D) float32
    ids: np.ndarray  # (M,) int64
    probabilities: np.ndarray | None = None  # (M, classes)
    distances: np.ndarray | None = None  # (M,), to the nearest image that it was trained on


class FolderFeatures:
    """Features of a folder's images, and the process that computes them.

    Args:
        images: of the folder.
        model: a run's folder, whose features they are; None: the default model's, as it was pretrained.
        classes: number of that run's.
    """

    def __init__(self, images: ImageFolder, model: Path | None = None, classes: int = 0) -> None:
        self._images, self._model, self._classes = images, model, classes
        trained = "" if model is None else str(model.resolve())
        depends_on = {"folder": str(images.root.resolve()), "model": trained or DEFAULT_MODEL, "image_size": _SIZE}
        self._place = cache_file("labelling", {**depends_on, "pixels": decoders()}, "npy")
        self._file: FeatureFile | None = None
        self._errors = tempfile.TemporaryFile("w+", encoding="locale")  # noqa: SIM115 - as long as the process
        command = [sys.executable, "-m", __name__, str(self._place), str(images.root), str(os.getpid()), trained]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=self._errors, encoding="utf-8")
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write("\0".join(images.names))

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
        if self._file is None:
            self._file = FeatureFile(self._place, [self._images.digest(i) for i in range(len(self._images.names))])
        self._file.update()
        for i in np.flatnonzero(self._file.done & ~self._file.ready).tolist():
            if self._images.names[i] not in self._images.left_out:
                self._images.is_sound(i, SMALL)  # which says why not
        ids = np.flatnonzero(self._file.ready)
        values, first = self._file.values[ids], -1 - self._classes  # (M, D), of a trained model (M, D + classes + 1)
        if self._model is None or not len(ids):
            return Computed(values, ids)
        return Computed(values[:, :first], ids, values[:, first:-1], values[:, -1])


class _Model(NamedTuple):
    """What makes of B images, (B, C, S, S) uint8, (B, width) values."""

    values: Callable[[Tensor], Any]
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

    def values(pixels: Tensor) -> Any:
        images = normalised(pixels, loaded.mean, loaded.std).to(device)  # (B, 3, S, S)
        return backbone.features(images).float().cpu().numpy()  # (B, D)

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
    nowhere = np.zeros(1, np.float32)  # where no features of training images are at hand
    compute = classifier.with_distances or (lambda images: (classifier.logits(images), nowhere.repeat(len(images))))
    temperature = getattr(card.meaning, "temperature", 1.0)
    num_classes = len(card.class_names) if card.task == "classification" else 0

    def values(pixels: Tensor) -> Any:
        images = normalised(pixels, card.mean, card.std)  # (B, 3, S, S)
        logits, distances = compute(images.numpy())
        of_classes = probabilities(logits, temperature)[:, :num_classes]  # (B, K), or (B, 0)
        return np.concatenate([backbone.features(images), of_classes, distances[:, None]], axis=1)

    taken = (card.image_size, card.channels, card.interpolation, card.resize)
    return _Model(values, restored.record.adapter_sha256 or "", taken)


def compute_features(folder: Path, names: Sequence[str], file: Path, parent: int, run: Path | None = None) -> None:
    """Append the features of the images that are not in a file, and end early if the process that wanted them has.

    Args:
        folder: of the images.
        names: of their files, relative to it.
        file: where to.
        parent: the process that wants them.
        run: folder of a run, of whose model they are, followed by its probabilities and its distance to the nearest
            image that it was trained on; None: the default model's.

    Raises:
        UserError: if weights can't be loaded, or the file can't be written.
    """
    with cache_fault(file):
        make_folder(file.parent)

    import torch

    model = _pretrained() if run is None else _trained(run)
    side, channels, *_ = model.taken
    with torch.inference_mode():
        width = model.values(torch.zeros(1, channels, side, side, dtype=torch.uint8)).shape[1]
    dtype = np.dtype([("digest", "S64"), ("values", "<f4", (width,))])
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

    order = np.random.default_rng(0).permutation(len(names)).tolist()
    for start in range(0, len(order), _BATCH):
        if not psutil.pid_exists(parent):  # on Windows none takes its place
            return
        by_digest = dict(in_threads(prepared, [names[place] for place in order[start : start + _BATCH]]))
        new = {digest: pixels for digest, pixels in by_digest.items() if digest and digest not in known}
        records = np.zeros(len(new), dtype)
        records["digest"], records["values"] = list(new), np.nan
        readable = {place: pixels for place, pixels in enumerate(new.values()) if pixels is not None}
        if readable:
            batch = torch.from_numpy(np.stack(list(readable.values())))  # (B, S, S, C)
            with torch.inference_mode():
                records["values"][list(readable)] = model.values(batch.permute(0, 3, 1, 2))  # (B, width)
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
    with file.open("wb") as opened:
        np.lib.format.write_array_header_1_0(opened, {"descr": dtype.descr, "fortran_order": False, "shape": ()})
        opened.write(np.array([(weights, np.nan)], dtype).tobytes())
    return {weights}


def main() -> None:
    """Compute the features of the images whose names stand in the input, with a zero byte between them."""
    file, folder, parent, run = sys.argv[1:]
    names = sys.stdin.buffer.read().decode().split("\0")
    try:
        compute_features(Path(folder), names, Path(file), int(parent), Path(run) if run else None)
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
