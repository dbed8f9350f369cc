"""Several labels an image, and numbers: `train` beside its own linear head, each on the same test images.

| set | labels | where images come from |
| --- | --- | --- |
| `elpv-degrees` | the probability that a solar cell is defective: 0, 1/3, 2/3 or 1 (regression) | ELPV |
| `elpv-labels` | monocrystalline (else polycrystalline), defective | ELPV |
| `digits` | which of ten digits are on a canvas of 112 x 112 with two to four, about 45 pixels each | scikit-learn's |
| `emoji-people` | woman, man, and five tones of skin: as Unicode's names say | npm's emoji-datasource-google 16 |

A draw takes 400 test images, and N training images from what is left, and writes both, with a table of labels. No digit
is on canvases of both, and no emoji in two tones of skin. Then `train` is `peft-vit train`, and `probe` the same with
`--method linear`: ridge, or a logistic regression a label, on frozen features. Images are 84 pixels wide; canvases of
digits 112, so that a digit remains legible.

    python benchmarks/labels_and_numbers.py elpv-degrees --images 500 --draw 3
    python benchmarks/labels_and_numbers.py emoji-people --emoji FOLDER --images 500 --draw 3 --by probe

adds rows to `benchmarks/results/labels_and_numbers.csv`: the metric that decides and its value, a second one, loss and
seconds. What is there already is passed over.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from common import RESULTS, append_row, rows_of
from few_labels import images_of
from PIL import Image

import peft_vit
from peft_vit.base.packages import ELPV_WHEEL, fetch_wheel
from peft_vit.data.files import open_tree
from peft_vit.data.pixels import decode_image
from peft_vit.runs.this_machine.machine import git_state

# What a set yields: a picture, its cells by column, and a number that is equal for images that belong to one side.
Labelled = tuple[Image.Image, dict[str, Any], int]
_TEST_IMAGES = 400
_CANVAS, _IMAGE_SIZE = 112, 84
_SECOND = {"mae": "spearman", "map": "f1_macro"}
_COLUMNS = (
    *("set", "task", "train_images", "test_images", "draw", "by", "metric", "value", "other_metric", "other", "nll"),
    *("image_size", "steps", "seconds", "threads", "commit"),
)
_TONES = {"1F3FB": "light", "1F3FC": "medium_light", "1F3FD": "medium", "1F3FE": "medium_dark", "1F3FF": "dark"}


def _elpv(*, degrees: bool) -> Iterator[Labelled]:
    tree = open_tree(fetch_wheel(ELPV_WHEEL))
    table = tree.only("labels.csv")
    for number, line in enumerate(tree.lines(table)):
        name, probability, module = line.split()
        file = str(PurePosixPath(table).parent / name)
        labels = {"mono": int(module == "mono"), "defective": int(float(probability) >= 0.5)}
        picture = decode_image(lambda file=file: tree.read(file), file)
        yield picture, {"defect": float(probability)} if degrees else labels, number


def _digits(draw: int, images: int) -> Iterator[Labelled]:
    """Yield canvases: first those for tests, of half of the digits, then those for training, of the other half."""
    rng = np.random.default_rng([draw, 10])
    digits = list(images_of("digits"))
    halves = np.array_split(rng.permutation(len(digits)), 2)
    for number in range(_TEST_IMAGES + images):
        own = halves[number >= _TEST_IMAGES]
        canvas = Image.new("L", (_CANVAS, _CANVAS))
        there = set()
        places = rng.permutation(4)[: rng.integers(2, 5)].tolist()  # quarters of the canvas
        for place in places:
            name, picture = digits[rng.choice(own)]
            there.add(name)
            size = int(rng.integers(40, 51))
            room = _CANVAS // 2 - size
            corner = (_CANVAS // 2 * (place % 2), _CANVAS // 2 * (place // 2))
            shift = rng.integers(0, room + 1, 2).tolist()
            canvas.paste(picture.resize((size, size), Image.Resampling.BICUBIC), tuple(np.add(corner, shift).tolist()))
        yield canvas, {f"digit_{name}": int(name in there) for name in "0123456789"}, int(number >= _TEST_IMAGES)


def _emoji_people(folder: Path) -> Iterator[Labelled]:
    """Yield the emoji of people and hands that come in tones of skin, in each tone and in yellow."""
    for number, own in enumerate(json.loads((folder / "emoji.json").read_text())):
        variations = own.get("skin_variations", {})
        if own["category"] != "People & Body" or not variations:
            continue
        words = set(re.split("[^a-z]+", own["name"].lower()))
        drawn = {"": own, **{tone: variations[code] for code, tone in _TONES.items() if code in variations}}
        for tone, form in drawn.items():
            file = folder / "img" / "google" / "64" / form["image"]
            if not file.exists():
                continue
            with_alpha = decode_image(file.read_bytes, str(file)).convert("RGBA")
            picture = Image.new("RGBA", with_alpha.size, "white")
            picture.alpha_composite(with_alpha)
            sexes = {name: int(name in words) for name in ("woman", "man")}
            yield picture.convert("RGB"), sexes | {name: int(tone == name) for name in _TONES.values()}, number


def write_draw(name: str, images: int, draw: int, emoji: Path, folder: Path) -> None:
    """Write the images of a draw and `labels.csv`, if they are not there."""
    if folder.exists():
        return
    if name == "digits":
        pairs = list(_digits(draw, images))
        test = np.array([side == 0 for *_, side in pairs])
        order = np.arange(len(pairs))
    else:
        pairs, seen = [], set()
        for labelled in _emoji_people(emoji) if name == "emoji-people" else _elpv(degrees=name == "elpv-degrees"):
            if (content := labelled[0].tobytes()) not in seen:
                seen.add(content)
                pairs.append(labelled)
        groups = np.array([group for *_, group in pairs])
        rng = np.random.default_rng([draw, len(pairs)])
        order = rng.permutation(len(pairs))
        shuffled = rng.permutation(groups.max() + 1)
        images_of_group = np.bincount(groups)[shuffled]
        before = np.cumsum(images_of_group) - images_of_group
        test = np.isin(groups, shuffled[before < _TEST_IMAGES])
    writing = folder.with_name(f".{folder.name}-{os.getpid()}")
    writing.mkdir(parents=True)
    with (writing / "labels.csv").open("w", newline="") as lines:
        out = csv.DictWriter(lines, ["path", "split", *pairs[0][1]])
        out.writeheader()
        for split, places in {"test": order[test[order]][:_TEST_IMAGES], "train": order[~test[order]][:images]}.items():
            for place in places.tolist():
                pairs[place][0].save(writing / f"{place:05}.png")
                out.writerow({"path": f"{place:05}.png", "split": split, **pairs[place][1]})
    if not folder.exists():  # another process may have been faster
        writing.rename(folder)


def row_of(folder: Path, by: str, image_size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train, and return what the run's record says of the test images."""
    started = time.monotonic()
    trained = peft_vit.train(
        folder / "labels.csv",
        method="linear" if by == "probe" else "lora",
        image_size=image_size,
        **({} if by == "probe" else {"steps": options.steps}),
        minutes=options.minutes,
        threads=options.threads,
        output=options.work / "runs" / f"{folder.name}-{by}",
    )
    record = trained.record
    assert record is not None
    assert record.test is not None
    metric = record.spec.experiment.training.metric
    return {
        "task": record.spec.task, "test_images": record.test.n, "by": by,
        "metric": metric, "value": record.test.value(metric),
        "other_metric": _SECOND[metric], "other": record.test.value(_SECOND[metric]), "nll": record.test.nll,
        "image_size": image_size,
        "steps": None if by == "probe" else options.steps,
        "seconds": time.monotonic() - started, "threads": options.threads,
    }  # fmt: skip


def main() -> None:
    """Make the draw, and add a row for each way that has none."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("set", choices=("elpv-degrees", "elpv-labels", "digits", "emoji-people"))
    asked.add_argument("--images", type=int, required=True, help="training images; a fifth of them validates")
    asked.add_argument("--draw", type=int, required=True)
    asked.add_argument("--by", nargs="+", choices=("train", "probe"), default=["probe", "train"])
    asked.add_argument("--steps", type=int, default=120)
    asked.add_argument("--minutes", type=float, default=60, help="when they are too few, it has less steps")
    asked.add_argument("--threads", type=int, default=2)
    asked.add_argument("--emoji", type=Path, default=Path("package"), help="emoji-datasource-google, unpacked")
    asked.add_argument("--work", type=Path, default=Path("labels-and-numbers"))
    asked.add_argument("--results", type=Path, default=RESULTS / "labels_and_numbers.csv")
    options = asked.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.work / f"{options.set}-{options.images}-{options.draw}"
    write_draw(options.set, options.images, options.draw, options.emoji, folder)
    image_size = _CANVAS if options.set == "digits" else _IMAGE_SIZE
    commit, _ = git_state()
    same = {"set": options.set, "train_images": options.images, "draw": options.draw, "commit": (commit or "")[:8]}
    for by in options.by:
        key = (options.set, str(options.images), str(options.draw), by)
        if any(key == (row["set"], row["train_images"], row["draw"], row["by"]) for row in rows_of(options.results)):
            continue
        append_row(options.results, _COLUMNS, same | row_of(folder, by, image_size, options))


if __name__ == "__main__":
    main()
