"""The images of a folder by their numbers: what each holds, which are for the test, and how a browser gets one."""

from __future__ import annotations

import hashlib
import io
import os
from contextlib import suppress
from functools import cache, lru_cache, partial
from pathlib import Path
from threading import BoundedSemaphore

import numpy as np

from peft_vit.base.errors import UserError
from peft_vit.base.files import read_bytes, sha256_of
from peft_vit.data.files import open_tree
from peft_vit.data.inspection.copies import SIDE, compared_thumbnail, copy_pairs, groups_of
from peft_vit.data.pixels import decode_image, on_white, to_pixels
from peft_vit.data.sources.folders import is_image

TEST_EVERY = 5  # images, of which one is for the test
LARGE, SMALL = 1024, 256  # pixels a side of an image alone, and of one on a wall
_KEPT = 64  # encoded images
_AT_ONCE = 4  # images that are decoded: an image may take a gigabyte
_LOSSLESS = 256  # pixels a side
_COMPARED = 64  # likewise, of what is compared


class ImageFolder:
    """The images below a folder; what leads out of it is left out.

    Args:
        root: the folder.

    Attributes:
        names: of the N images, sorted.
        left_out: why, by name, of what is called as an image is, and can't be labelled.
        shuffled: their numbers in an order that is fixed.

    Raises:
        UserError: if it holds no image.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError("is not a folder; name the one that your images lie in", file=root)
        tree = open_tree(root)
        self.root = tree.location
        self.names = [name for name in tree.names if is_image(name)]
        self.left_out: dict[str, str] = {}
        is_inside = cache(lambda folder: Path(os.path.realpath(folder)).is_relative_to(self.root))
        for name in self.names:
            place = os.path.join(self.root, name)
            inside = is_inside(place if os.path.islink(place) else os.path.dirname(place))
            if fault := tree.fault(name) if inside else "lies outside of the folder, where a link leads":
                self.left_out[name] = fault
        if len(self.left_out) == len(self.names):
            reason = "holds no image that can be read; name another folder"
            raise UserError(reason, file=root, details="\n".join(self.faults()))
        self.number = {name: i for i, name in enumerate(self.names)}
        self.shuffled: list[int] = np.random.default_rng(0).permutation(len(self.names)).tolist()
        self.copies: dict[str, list[int]] = {}  # by content, of what was hashed so far
        self._alike: dict[int, list[int]] = {}
        self._decoding = BoundedSemaphore(_AT_ONCE)
        self.digest, self.encoded = cache(self._digest), lru_cache(_KEPT)(self._encoded)

    def faults(self) -> list[str]:
        """Return a line for each file that is left out."""
        return [f"{name} {why}" for name, why in dict(self.left_out).items()]

    def rename(self, i: int, name: str) -> None:
        """Call an image by the name that its file has by now."""
        del self.number[self.names[i]]
        self.names[i], self.number[name] = name, i

    def _digest(self, i: int) -> str:
        """Return the SHA-256 of a file's content, which is read once; of what can't be read, which is left out, ""."""
        try:
            digest = sha256_of(self._inside(i))
        except OSError as error:
            self.left_out[self.names[i]] = f"can't be read ({error.strerror})"
            return ""
        self.copies.setdefault(digest, []).append(i)
        return digest

    def find_copies(self) -> None:
        """Find crops, mirrored images and frames, once; this decodes all images, and nothing is on two sides then."""
        if self._alike:
            return
        places = list[int]()
        thumbnails = np.empty((len(self.names), SIDE, SIDE, 3), np.float16)
        for i, name in enumerate(self.names):
            with suppress(UserError, OSError):
                image = decode_image(partial(read_bytes, self._inside(i)), name, enough=_COMPARED)
                thumbnails[len(places)] = compared_thumbnail(to_pixels(image, _COMPARED, 3))
                places.append(i)
        if not places:
            return
        groups = groups_of(np.arange(len(places)), copy_pairs(thumbnails[: len(places)]))
        members: dict[int, list[int]] = {}
        for i, group in zip(places, groups.tolist(), strict=True):
            members.setdefault(group, []).append(i)
        self._alike = {i: of_group for of_group in members.values() for i in of_group}

    def alike(self, i: int) -> list[int]:
        """Return an image and its copies, as far as these are found, which are on one side."""
        return [*dict.fromkeys([i, *self.copies.get(self.digest(i), []), *self._alike.get(i, [])])]

    def is_test(self, i: int) -> bool:
        """Return whether an image is for the test: a fifth is, drawn by content alone, of copies by that of one.

        So images that come later move none, but for copies that were in no file of labels yet.
        """
        first = min(map(self.digest, self.alike(i)))
        drawn = hashlib.sha256(f"peft-vit test {first}".encode()).digest()
        return int.from_bytes(drawn[:8]) % TEST_EVERY == 0

    def is_sound(self, i: int, side: int) -> bool:
        """Return whether an image can be shown; one that can't is left out from here on."""
        try:
            self.encoded(i, side)
        except (UserError, OSError) as error:
            self.left_out[self.names[i]] = getattr(error, "message", str(error))
        return self.names[i] not in self.left_out

    def _encoded(self, i: int, side: int) -> tuple[bytes, str]:
        """Return an image as PNG or JPEG of at most so many pixels a side, and which of the two.

        Its own bytes are never handed out: they may hold a place, or what a browser runs.
        """
        with self._decoding:
            path = self._inside(i)
            image = on_white(decode_image(lambda: read_bytes(path), self.names[i], enough=side)).convert("RGB")
            image.thumbnail((side, side))
        kind = "png" if max(image.size) <= _LOSSLESS else "jpeg"
        content = io.BytesIO()
        image.save(content, kind, quality=90)
        return content.getvalue(), f"image/{kind}"

    def _inside(self, i: int) -> Path:
        """Return where an image is; raises OSError if it isn't below the folder, to which a link may have come."""
        path = Path(os.path.realpath(self.root / self.names[i]))
        if not path.is_relative_to(self.root):
            raise PermissionError(1, "leads out of the folder", str(path))
        return path
