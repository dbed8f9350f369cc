"""What `train --from` is worth when images and classes come later, beside training anew, on images of neither.

A draw is that of `few_labels.py`. A first call has every other training image; in draws with an even number it lacks
the last class, where there are more than two. Then all training images are there, and

- `from` starts at the first call's model, with a third of the minutes;
- `anew` starts from the pretrained model;
- `anew, a third` has a third of the minutes, too.

    python benchmarks/more_later.py digits stamps elpv --draws 1 2 --minutes 2 --image-size 56

adds a row for each to `benchmarks/results/more_later.csv`: the score on the draw's test images (balanced, if classes
are uneven in training), that of images of the class that came, and seconds of the call. What is there is passed over.

On a machine that others use too, `PYTHONPATH=benchmarks/processor_clock` makes minutes and seconds the processor's.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import RESULTS, append_row, rows_of
from few_labels import write_draw
from torchvision.datasets import ImageFolder

import peft_vit
from peft_vit.core.tasks.classification import CLASSIFICATION
from peft_vit.runs.this_machine.machine import git_state

FILE = RESULTS / "more_later.csv"
_IMAGES = {"digits": 200, "stamps": 300, "elpv": 512}  # in the end
_WAYS = {"first": 1.0, "from": 1 / 3, "anew": 1.0, "anew, a third": 1 / 3}  # shares of the minutes
_KEY = ("set", "draw", "by")
_COLUMNS = (
    *("set", "draw", "by", "images", "new_class", "test_images", "metric", "score", "of_new_class", "method"),
    *("image_size", "steps", "seconds", "minutes", "threads", "commit"),
)


def write_first(folder: Path, lacks: str) -> None:
    """Link every other training image into `first/`, without those of a class."""
    for file, _ in ImageFolder(folder / "train").samples[::2]:
        place = folder / "first" / Path(file).relative_to(folder / "train")
        if place.parent.name != lacks and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, place)


def scored(trained: Any, folder: Path, lacks: str) -> dict[str, Any]:
    """Return how often a model is right on a draw's test images; a class that it does not know is wrong."""
    test = ImageFolder(folder / "test")
    known = {name: k for k, name in enumerate(test.classes)}
    said = trained.predict([Path(file) for file, _ in test.samples])
    labels, predicted = np.array(test.targets), np.array([known[one.class_name] for one in said])
    metric = CLASSIFICATION.deciding(np.bincount(ImageFolder(folder / "train").targets))
    right = (predicted == labels)[labels == known.get(lacks)]
    return {
        "test_images": len(labels),
        "metric": metric.name,
        "score": metric.interval(labels, predicted).estimate,
        "of_new_class": float(right.mean()) if len(right) else None,
    }


def main() -> None:
    """Train what is not there, and print what is."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("sets", nargs="+", choices=_IMAGES)
    asked.add_argument("--draws", type=int, nargs="+", default=[1, 2])
    asked.add_argument("--minutes", type=float, default=2)
    asked.add_argument("--by", nargs="+", choices=_WAYS, default=["first", "from", "anew"])
    asked.add_argument("--image-size", type=int, default=56)
    asked.add_argument("--threads", type=int, default=1)
    asked.add_argument("--work", type=Path, default=Path("more-later"))
    options = asked.parse_args()
    torch.set_num_threads(options.threads)
    for draw in options.draws:
        for name in options.sets:
            folder = options.work / f"{name}-{draw}-{options.minutes:g}-minutes"
            write_draw(name, None, _IMAGES[name], draw, folder)
            classes = ImageFolder(folder / "train").classes
            lacks = classes[-1] if len(classes) > 2 and draw % 2 == 0 else ""
            write_first(folder, lacks)
            first = folder / "runs-first" / "latest"
            for by in options.by:
                minutes = _WAYS[by] * options.minutes
                key = (name, str(draw), by, f"{minutes:.2f}")
                if any((*(row[of] for of in _KEY), f"{float(row['minutes']):.2f}") == key for row in rows_of(FILE)):
                    continue
                images, started = folder / ("first" if by == "first" else "train"), time.monotonic()
                trained = peft_vit.train(
                    images,
                    minutes=minutes,
                    threads=options.threads,
                    image_size=options.image_size,
                    output=folder / f"runs-{by.replace(', ', '-').replace(' ', '-')}",
                    from_run=first if by == "from" else None,
                )
                seconds, record = time.monotonic() - started, trained.record
                row = scored(trained, folder, lacks) | {
                    "set": name, "draw": draw, "by": by, "images": len(ImageFolder(images).samples),
                    "new_class": lacks, "method": record.spec.experiment.method, "seconds": seconds,
                    "image_size": record.spec.data.image_size, "steps": len(record.steps or ()),
                    "minutes": minutes, "threads": options.threads, "commit": git_state()[0][:8],
                }  # fmt: skip
                append_row(FILE, _COLUMNS, row)
    frame = pd.DataFrame(rows_of(FILE)).astype({"score": float, "seconds": float, "minutes": float})
    frame = frame[np.isclose(frame["minutes"] / frame["by"].map(_WAYS), options.minutes, rtol=0.01)]
    wide = frame.pivot_table(index=["set", "draw"], columns="by", values=["score", "seconds"])
    gain = 100 * (wide["score"]["from"] - wide["score"]["anew"])
    print(wide.to_string(), gain.to_string(), sep="\n")
    share = wide["seconds"]["from"].sum() / wide["seconds"]["anew"].sum()
    print(f"from less anew: {gain.mean():+.2f} points (standard error {gain.sem():.2f}), in {share:.2f} of the time")


if __name__ == "__main__":
    main()
