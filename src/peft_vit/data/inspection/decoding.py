"""The images of a folder, each decoded once: their pixels, sides and copies.

JPEGs are decoded at a fraction of their size unless their pixels are kept for training (`PixelStore`). What it comes to
is kept in the cache.

Of more than 20,000 images not all are decoded: about as many are, in runs of neighbours by name, and what has no end.
Of all others heads are read and contents hashed, so that equal files are found among all, and near copies among those
that are decoded.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
from PIL import Image

from peft_vit.base.errors import UserError
from peft_vit.base.files import read_bytes
from peft_vit.base.packages import cache_dir
from peft_vit.core.config import Interpolation, Resize
from peft_vit.data.files import FileTree, cache_fault, in_threads, raise_if_transient, read_once, remembered
from peft_vit.data.index import ImageIndex
from peft_vit.data.inspection.copies import compared_thumbnail, copy_pairs, groups_of, with_first
from peft_vit.data.inspection.duplicates import VERSION, grey_thumbnails, near_groups
from peft_vit.data.pixels import (
    REMEDY,
    Facts,
    cached_pixels,
    decode_image,
    decoders,
    formats,
    on_white,
    read_facts,
    to_pixels,
)
from peft_vit.data.splits import Splits

_ENOUGH, _COMPARED_SIDE = 256, 64  # pixels a side of a JPEG that is decoded, and of what is compared
NUMBERED = re.compile(r"((?:.*/)?)([^/]*?)([^0-9A-Za-z/]*)([0-9]+)[.][^./]*")  # folder, start, sign, number
# Pairs; of the images, and of pairs those on two sides; pairs that are looked at.
_LEAST_NEIGHBOURS, LEAST_SHARE, _MOST_NEIGHBOURS = 20, 0.1, 512
_MOST_COMPARED, _NEIGHBOURING = 20_000, 16  # images whose pixels are compared, and in turn by name


class PixelStore:
    """Images as training takes them, (S, S, 3) at some sizes S, kept until it is known which of them train.

    Use as a context manager: what is not handed over to the cache of decoded images in it is gone.

    Args:
        sizes: sides in pixels; none: nothing is kept.
        interpolation: of resizing.
        resize: how images become square, see `to_pixels`.
    """

    def __init__(
        self, sizes: Sequence[int], interpolation: Interpolation = "bicubic", resize: Resize = "squash"
    ) -> None:
        self.sizes, self.interpolation, self.resize = tuple(sizes), interpolation, resize
        self._places: dict[str, int] = {}  # by name
        self._stack = ExitStack()
        self._files: dict[int, BinaryIO] = {}

    def __enter__(self) -> Self:
        with cache_fault(cache_dir()):
            cache_dir().mkdir(parents=True, exist_ok=True)
            for size in self.sizes:
                self._files[size] = self._stack.enter_context(TemporaryFile(dir=cache_dir()))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, name: str, pixels: Sequence[np.ndarray]) -> None:
        """Keep an image, at each of the sizes."""
        self._places[name] = len(self._places)
        for size, image in zip(self.sizes, pixels, strict=True):
            with cache_fault(cache_dir()):
                self._files[size].write(image.tobytes())

    def hand_over(self, index: ImageIndex, splits: Splits) -> None:
        """Put what a run trains, validates and tests on where `cached_pixels` finds it, at all sizes.

        Args:
            index: of images that were inspected.
            splits: of it.
        """
        assert index.names is not None
        if not set(index.names) <= self._places.keys():  # the inspection was in the cache: nothing was decoded
            return
        rows = [self._places[name] for name in index.names]

        def image(pixels: np.ndarray, i: int) -> Image.Image:
            return Image.fromarray(pixels[rows[i]])

        for size, file in self._files.items():
            file.flush()
            pixels = np.memmap(file, np.uint8, "r", shape=(len(self._places), size, size, 3))
            decoded = replace(index, read=partial(image, pixels))
            for part in splits.parts if splits.divided is None else (splits.divided,):
                cached_pixels(decoded, part, size)


class Decoded(NamedTuple):
    """What decoding N files came to.

    Attributes:
        copies: equal numbers for exact copies, (N,); -1 of what can't be read.
        groups: likewise for near ones too.
        sides: shorter and longer side of each, pixels, (N, 2).
        faults: why files can't be read, by name.
        animated: names of those of several frames.
        links: pairs of crops, mirrored images and frames, (M, 2), see `copy_pairs`.
        alike: names of neighbours, see `neighbours_alike`.
        compared: among how many files near copies were looked for; None: all.
    """

    copies: np.ndarray
    groups: np.ndarray
    sides: np.ndarray
    faults: dict[str, str]
    animated: Sequence[str]
    links: np.ndarray
    alike: Sequence[Sequence[str]]
    compared: int | None


def decoded_once(
    tree: FileTree, names: list[str], store: PixelStore, on_progress: Callable[[int, int], None]
) -> Decoded:
    """Decode files, or find in the cache what it came to."""
    hashed = tree.hashed(names)
    readers = f"{VERSION} {decoders()} {formats()} {bool(store.sizes)}"  # that can't read some files
    shapes = {"copies": (len(names),), "groups": (len(names),), "sides": (len(names), 2), "links": (-1, 2)}

    def read(saved: dict[str, Any]) -> Decoded:
        arrays = {name: np.array(saved[name], dtype=np.int64).reshape(shape) for name, shape in shapes.items()}
        return Decoded(**saved | arrays)

    def compute() -> dict[str, Any]:
        return _decoded(tree, names, hashed.each, store, on_progress)._asdict()

    return remembered("inspected", "\n".join([readers, hashed.sha256, *names]), compute, read)


def compared_rows(count: int) -> np.ndarray:
    """Return which of N images are compared by their pixels, (N,) bool: all, or runs of neighbours in their order."""
    runs, share = np.arange(count) // _NEIGHBOURING, min(1.0, _MOST_COMPARED / max(1, count))
    return np.floor((runs + 1) * share) > np.floor(runs * share)


def read_heads(tree: FileTree, names: Sequence[str]) -> dict[str, Facts]:
    """Return the facts of a folder's files by their heads, without those that have to be decoded to be sure.

    Of a zip these are all.
    """
    if not tree.location.is_dir():
        return {}

    def head(place: Path) -> str:
        with suppress(Exception):  # who decodes it says why
            facts = read_facts(read_bytes(place))
            return " ".join(str(int(fact)) for fact in facts) if facts.is_complete else ""
        return ""

    kind = f"heads-{hashlib.sha256(f'{decoders()} {formats()}'.encode()).hexdigest()[:16]}"
    known = read_once(kind, {name: tree.location / name for name in names}, head)
    return {name: Facts._make(map(int, text.split())) for name, text in known.items() if text}


def _decoded(
    tree: FileTree,
    names: list[str],
    contents: Mapping[str, str],
    store: PixelStore,
    on_progress: Callable[[int, int], None],
) -> Decoded:
    """Decode files, of which `contents` says which are equal."""
    is_compared, facts = compared_rows(len(names)), dict[str, Facts]()
    if not (all_compared := bool(is_compared.all())):
        store, facts = PixelStore(()), read_heads(tree, names)
    to_decode = [at for at, name in enumerate(names) if is_compared[at] or name not in facts]
    faults: dict[str, str] = {}
    first: dict[bytes, int] = {}  # where the first one of images with the same pixels stands
    same = np.arange(len(names))  # where the first one stands that has a file's pixels
    thumbnails: dict[int, np.ndarray] = {}  # of one of each, (32, 32, 3)
    with warnings.catch_warnings(action="ignore"):  # of Pillow's, see `decode_image`
        decoded = in_threads(lambda at: _decode(tree, names[at], store), to_decode)
        for done, (at, one) in enumerate(zip(to_decode, decoded, strict=True), start=1):
            if isinstance(one, str):
                faults[names[at]] = one.removesuffix(f"; {REMEDY}")
                facts.pop(names[at], None)
            else:
                facts[names[at]] = one.facts
                same[at] = first.setdefault(one.digest, at)
                if same[at] == at and is_compared[at]:
                    thumbnails[at] = one.thumbnail
                store.add(names[at], one.pixels)
            on_progress(done, len(to_decode))
    sides, copies = np.zeros((len(names), 2), dtype=np.int64), np.full(len(names), -1, dtype=np.int64)
    read = np.array([at for at, name in enumerate(names) if name in facts], dtype=np.int64)
    for at in read:
        sides[at] = facts[names[at]][:2]
    sets = groups_of(same, read[with_first([contents[names[at]] for at in read])])
    copies[read] = np.unique(sets[read], return_inverse=True)[1]
    groups, links, alike = copies, np.empty((0, 2), np.int64), list[tuple[str, str]]()
    if thumbnails:
        where, colored = np.array([*thumbnails]), np.stack([*thumbnails.values()])  # (M,), (M, 32, 32, 3)
        grey = grey_thumbnails(colored, np.arange(len(where)))
        groups = groups_of(copies, where[with_first(near_groups(grey))])
        links = where[copy_pairs(colored)]
        row = np.full(copies.max() + 1, -1)  # of a set among the thumbnails
        row[copies[where]] = np.arange(len(where))
        shown = read[is_compared[read] & (row[copies[read]] >= 0)]
        alike = neighbours_alike([names[at] for at in shown], grey[row[copies[shown]]])
    animated = [names[at] for at in read if facts[names[at]].is_animated]
    compared = None if all_compared else int(is_compared.sum())
    return Decoded(copies, groups, sides, faults, animated, links, alike, compared)


class _One(NamedTuple):
    facts: Facts
    digest: bytes
    thumbnail: np.ndarray  # (32, 32, 3)
    pixels: list[np.ndarray]  # for the store


def _decode(tree: FileTree, name: str, store: PixelStore) -> _One | str:
    """Return what is needed of a file's pixels, or why it can't be read."""
    try:
        content = tree.read(name)
        enough = None if store.sizes else _ENOUGH
        image = on_white(decode_image(partial(bytes, content), name, enough=enough)).convert("RGB")
        facts = read_facts(content)
    except Exception as error:  # a foreign file or archive can fail in any way
        raise_if_transient(error, tree.file(name))
        return error.message if isinstance(error, UserError) else f"can't be read ({error})"
    mark = repr(((facts.short, facts.long), image.size)).encode()
    digest = hashlib.blake2b(mark + image.tobytes(), digest_size=16).digest()
    pixels = [to_pixels(image, size, 3, store.interpolation, store.resize) for size in store.sizes]
    return _One(facts, digest, compared_thumbnail(to_pixels(image, _COMPARED_SIDE, 3)), pixels)


def neighbours_alike(names: Sequence[str], thumbnails: np.ndarray) -> list[tuple[str, str]]:
    """Return neighbours by name that are nearest each other, if at least half of all neighbours are; else none.

    Frames of a clip that differ more than copies do are known by their names: images of a folder whose names differ in
    their last number alone. If half of these neighbours have the next one among the two that their thumbnails correlate
    with most, of all images, a line says so. Of digits, solar cells and emoji, all of them or 300, 4 to 21 % do; of
    stamps fewer than a tenth have such names. Of made-up clips, windows that move over four photographs by 2, 5 and
    10 % of their side from frame to frame, it is 100, 95 and 71 %; by 20 %, 33 %: these are not found. The rule was
    chosen on these same sets. There is no such line where groups of copies join nine of ten of these neighbours.

    Args:
        names: of N images, relative to the folder.
        thumbnails: of `grey_thumbnails`, (N, 256).
    """
    matches = ((NUMBERED.fullmatch(name), at) for at, name in enumerate(names) if thumbnails[at].any())
    ordered = sorted((m[1], m[2] + m[3], int(m[4]), at) for m, at in matches if m is not None)
    pairs = [(a[3], b[3]) for a, b in pairwise(ordered) if a[:2] == b[:2]]
    if len(pairs) < max(_LEAST_NEIGHBOURS, LEAST_SHARE * len(names)):
        return []
    first, second = np.array(pairs[:: -(-len(pairs) // _MOST_NEIGHBOURS)]).T  # (M,) each
    with_all = thumbnails[first] @ thumbnails.T  # (M, N)
    with_all[np.arange(len(first)), first] = -1
    near = (with_all > with_all[np.arange(len(first)), second, None]).sum(1) < 2  # (M,)
    if 2 * near.sum() < len(near):
        return []
    return [(names[a], names[b]) for a, b in zip(first[near], second[near], strict=True)]
