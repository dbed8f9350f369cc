"""Three sets of labelled images out of Debian's packages, as class folders.

- `clipart`: `openclipart-png`, nine of its folders. Pictures whose names begin alike, or that look alike, are a group.
- `figures`: units of `wesnoth-1.18-data` by race. Frames and variants of a figure are a group.
- `scripts`: letters of ten scripts of India and Sri Lanka, drawn with `fonts-noto-core`. A letter in all its fonts is a
  group.

    apt-get download openclipart-png wesnoth-1.18-data fonts-noto-core
    for file in *.deb; do dpkg-deb -x $file unpacked; done
    python -m experiments.floor.scripts.sets unpacked outputs/floor

It writes `OUT/SET-DRAW/train` and `test`: about 300 images to learn from and up to 600 to test on, as many of each
class as possible, for draws 0 and 1. Each group is on one
side, and a file's name ends with its number there.
"""

from __future__ import annotations

import argparse
import re
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SETS, DRAWS = ("clipart", "figures", "scripts"), 2
_TRAIN, _TEST = 300, 600  # images, of all classes
_SIDE = 224  # at most, in pixels
_CLIPART = ("animals", "buildings", "food", "office", "people", "plants", "recreation", "tools", "transportation")
_NOT = ("/cards/", "/aiga-symbols/", "/roadsigns/", "/pantyhose/", "/chess")  # signs, and series of one drawing
_RACES = {
    "drakes": ("drakes",),
    "dwarves": ("dwarves",),
    "elves": ("elves-wood",),
    "humans": ("human-loyalists", "human-outlaws"),
    "mages": ("human-magi", "undead-necromancers"),
    "monsters": ("monsters",),
    "orcs": ("orcs", "goblins"),
    "saurians": ("saurians", "nagas"),
    "undead": ("undead", "undead-skeletal"),
}
_SCRIPTS = (
    ("Bengali", "Devanagari", "Gujarati", "Gurmukhi", "Kannada"),
    ("Malayalam", "Oriya", "Sinhala", "Tamil", "Telugu"),
)
_FONTS = ("Sans{}-Regular", "Sans{}-Bold", "Serif{}-Regular", "Serif{}-Bold")
_ALIKE = 0.985  # correlation of two thumbnails


class Picture(NamedTuple):
    """A labelled image, and what it must stay together with."""

    label: str
    group: str
    image: Image.Image


def on_white(file: Path) -> Image.Image:
    """Return a picture in RGB, without transparency, no larger than it is needed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of drawings that are large on purpose
        opened = Image.open(file, formats=("PNG",))  # noqa: TID251 - this format alone
        image = opened.convert("RGBA")
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def clipart(folder: Path) -> Iterator[Picture]:
    """Yield drawings by subject."""
    for label in _CLIPART:
        for file in sorted((folder / "usr/share/openclipart/png" / label).rglob("*.png")):
            if not any(part in str(file) for part in _NOT):
                begins = re.sub("[^a-z]", "", file.stem.lower())[:7]
                yield Picture(label, f"{label}/{file.parent.name}/{begins}", on_white(file))


def figures(folder: Path) -> Iterator[Picture]:
    """Yield units by race; a figure is named by what stands before its first action."""
    units = folder / "usr/share/games/wesnoth/1.18/data/core/images/units"
    for label, races in _RACES.items():
        for file in sorted(file for race in races for file in (units / race).rglob("*.png")):
            if not any(word in file.stem for word in ("ColorMap", "glow", "flame", "die", "death-", "halo")):
                name = re.split(r"[-+~\d]", file.stem)[0]
                yield Picture(label, f"{label}/{file.relative_to(units).parts[0]}/{name}", on_white(file))


def letters(folder: Path) -> Iterator[Picture]:
    """Yield letters by script, black on white."""
    fonts = folder / "usr/share/fonts/truetype/noto"
    for label in (name for line in _SCRIPTS for name in line):
        files = [fonts / f"Noto{kind.format(label)}.ttf" for kind in _FONTS]
        for code in range(0x900, 0xE00):
            named = unicodedata.name(chr(code), "").startswith(f"{label.upper()} ")
            if not named or unicodedata.category(chr(code)) != "Lo":
                continue
            for file in files:
                if file.exists() and (drawn := _letter(chr(code), file)) is not None:
                    yield Picture(label, f"{label}/{code:x}", drawn)


def _letter(letter: str, file: Path) -> Image.Image | None:
    font = ImageFont.truetype(str(file), 72)
    left, top, right, bottom = font.getbbox(letter)
    if right <= left or font.getmask(letter) == font.getmask("\U0010ffff"):  # the font lacks it
        return None
    image = Image.new("RGB", (128, 128), "white")
    place = (64 - (left + right) / 2, 64 - (top + bottom) / 2)
    ImageDraw.Draw(image).text(place, letter, fill="black", font=font)
    return image


_READ = {"clipart": clipart, "figures": figures, "scripts": letters}


def joined(pictures: list[Picture]) -> list[Picture]:
    """Join groups that look alike, and leave out what is then of several classes."""
    small = [np.asarray(picture.image.resize((16, 16)), np.float32).ravel() for picture in pictures]
    z = np.stack([vector - vector.mean() for vector in small])
    z /= np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-3)
    name = {picture.group: picture.group for picture in pictures}

    def first(group: str) -> str:
        while name[group] != group:
            group = name[group]
        return group

    for i, j in np.argwhere(np.triu(z @ z.T > _ALIKE, 1)):
        name[first(pictures[i].group)] = first(pictures[j].group)
    labels = defaultdict(set)
    for picture in pictures:
        labels[first(picture.group)].add(picture.label)
    return [
        picture._replace(group=first(picture.group)) for picture in pictures if len(labels[first(picture.group)]) == 1
    ]


def draw(pictures: list[Picture], per_group: int, seed: int) -> tuple[list[Picture], list[Picture]]:
    """Return images to learn from, few of a group, and to test on, up to twice as many: at least half of the groups."""
    rng = np.random.default_rng(seed)
    names = sorted({picture.label for picture in pictures})
    sides: tuple[list[Picture], list[Picture]] = ([], [])
    for label in names:
        groups = defaultdict(list)
        for picture in pictures:
            if picture.label == label:
                groups[picture.group].append(picture)
        order = rng.permutation(sorted(groups))
        kept = [[groups[group][i] for i in rng.permutation(len(groups[group]))] for group in order]
        few = sum(len(group[:per_group]) for group in kept)
        train, wanted = list[Picture](), _TRAIN // len(names)
        while len(train) < min(wanted, few // 2):
            train += kept.pop()[:per_group]
        sides[0].extend(train[:wanted])
        rest = [picture for group in kept for picture in group[: 2 * per_group]]
        sides[1].extend(rest[i] for i in rng.permutation(len(rest))[: _TEST // len(names)])
    return sides


def write(pictures: Iterable[Picture], folder: Path) -> NDArray[np.int64]:
    """Write class folders, a file's name ending with its group; return how many images of each class there are."""
    counts: dict[str, int] = defaultdict(int)
    groups: dict[str, int] = {}
    for picture in pictures:
        (folder / picture.label).mkdir(parents=True, exist_ok=True)
        number = groups.setdefault(picture.group, len(groups))
        picture.image.save(folder / picture.label / f"{counts[picture.label]:03d}-{number}.png")
        counts[picture.label] += 1
    return np.array([counts[label] for label in sorted(counts)])


def main() -> None:
    """Make all sets."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("unpacked", type=Path)
    asked.add_argument("out", type=Path)
    given = asked.parse_args()
    for name, per_group in zip(SETS, (3, 4, 2), strict=True):
        pictures = list(_READ[name](given.unpacked))
        if name != "scripts":
            pictures = joined(pictures)
        print(name, len(pictures), "images in", len({picture.group for picture in pictures}), "groups")
        for number in range(DRAWS):
            parts = zip(("train", "test"), draw(pictures, per_group, number), strict=True)
            print(number, *(write(images, given.out / f"{name}-{number}" / part) for part, images in parts))


if __name__ == "__main__":
    main()
