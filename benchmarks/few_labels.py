"""What few labels give: `train` and `tune`, beside what one would do instead, each on the same test images.

A draw takes labels of each class (of a folder of one's own: so many images as they come) and 400 test images from what
is left, each different image once, and writes both as PNG into `train/` and `test/`. Then

- `train`, `regression`: `peft-vit train`, and the same with `--method linear`; `tune`: `--max-bytes 16MB`, 20 minutes;
  `hour`: the same in 60; `unlimited`: in 20, without a limit of bytes;
- `sklearn`: scikit-learn's logistic regression on frozen features, of the class token and with the patches' mean, at
  three image sizes, standardized, its strength by five folds among 11 from 1e-4 to 10: a row each;
- `peft`: LoRA r=8 on all linear layers by hand, in float32: timm, torchvision, PEFT, AdamW at 1e-3, one cycle, batches
  of 32, flips; for 3 and for 10 epochs: a row each.

    python benchmarks/few_labels.py elpv --labels 50 --draw 3 --by train regression sklearn peft
    python benchmarks/few_labels.py FOLDER --images 300 --draw 3 --by tune

`stamps` are the folders at the top of Debian's `tuxpaint-stamps-default` with 40 PNG or more, `emoji` the categories of
npm's `emoji-datasource-google` (`npm pack` it and unpack it here, into `package/`), without skin tones; `oxygen` the
categories of Debian's `oxygen-icon-theme` with 40 icons of 64 px or more, by which nothing here was chosen. Draws 2 and
3 of stamps and emoji were made by a script that is not kept. A draw is passed over where a class has too few images for
`tune`.

`former train`, `former tune` and the like are rows of the engine before `tune` began with `train` (`train` with ten
minutes; above draw 3 of `stamps`, and `hour` of digits' draw 3, on an Intel Xeon with AMX). Icons are of such a Xeon,
too. All other rows are of AMD EPYCs with AVX-512, on one thread, `train` with six minutes, the default here. Of two
tunings, draw 1 of solar cells and draw 2 of digits, only the accuracy was kept. Rows of `few_labels_avx2.csv` are of a
machine limited to AVX2 by `ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2`, beside other work.

It adds rows to `benchmarks/results/few_labels.csv`: accuracy (balanced, if classes are uneven in training), NLL and ECE
of calibrated probabilities (ten bins of equal mass), test images that were called unlike the training images, bytes of
the delivered file, seconds, and the accuracy's 95 % interval over test images. What is there already is passed over.

    python benchmarks/few_labels.py --table

prints means over draws. Of scikit-learn and PEFT that is the best of all sizes, features and epochs: the one with the
best mean *on the test images*, which nobody could have chosen. `--readme` prints README's table: of six sets, the
draws on which everything was done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from beside_peft import backbone, by_hand, image_folder, one_cycle
from common import append_row, rows_of
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import peft_vit
from peft_vit.core.config import DataConfig
from peft_vit.core.tasks.classification import CLASSIFICATION
from peft_vit.data import open_index
from peft_vit.data.pixels import decode_image

RESULTS = Path(__file__).parent / "results" / "few_labels.csv"
_SETS = ("elpv", "digits", "fashion-mnist")
_SOURCES = {  # of Debian's and of npm's packages
    "stamps": Path("/usr/share/tuxpaint/stamps"),
    "emoji": Path("package"),
    "oxygen": Path("/usr/share/icons/oxygen/base/64x64"),
}
_FEWEST_STAMPS = 40
_TEST_IMAGES = 400
_SIZES = (112, 154, 224)
_WAYS = ("train", "regression", "sklearn", "peft", "tune")
_TUNED: dict[str, tuple[str | None, int]] = {"tune": ("16MB", 20), "hour": ("16MB", 60), "unlimited": (None, 20)}
_COLUMNS = (
    *("set", "train_images", "test_images", "draw", "by", "accuracy", "metric", "image_size", "nll", "ece", "unlike"),
    *("bytes", "seconds", "threads", "commit", "low", "high"),
)


def images_of(name: str) -> Iterator[tuple[str, Image.Image]]:
    """Yield the class and the picture of each image of a set, or of a folder of class folders, in a fixed order."""
    if name in _SETS:
        index = open_index(DataConfig.model_validate({"dataset": name, "image_size": 56, "validation_images": 0}))
        for i in range(len(index.labels)):
            yield index.label(i).replace("/", "-"), index.read(i)
        return
    for class_name, file in _files_of(name, _SOURCES.get(name, Path(name))):
        yield class_name, decode_image(file.read_bytes, str(file)).convert("RGB")


def _files_of(name: str, source: Path) -> Iterator[tuple[str, Path]]:
    if name in ("stamps", "oxygen"):
        for folder in sorted(source.iterdir()):
            files = sorted(folder.rglob("*.png"), key=lambda file: str(file.relative_to(source)).replace("/", "-"))
            yield from ((folder.name, file) for file in files if len(files) >= _FEWEST_STAMPS)
    elif name == "emoji":
        for one in sorted(json.loads((source / "emoji.json").read_text()), key=lambda one: str(one["image"])):
            file = source / "img" / "google" / "64" / str(one["image"])
            if one["category"] != "Component" and file.exists():
                yield str(one["category"]), file
    else:
        yield from ((file.parent.name, file) for file in sorted(source.glob("*/*")))


def write_draw(name: str, labels: int | None, images: int | None, draw: int, folder: Path) -> None:
    """Write `train/` and `test/` of a draw, if they are not there."""
    if folder.exists():
        return
    by_class: dict[str, list[Image.Image]] = {}
    seen = set()
    for class_name, picture in images_of(name):
        if (digest := hashlib.sha256(picture.tobytes()).digest()) not in seen:
            seen.add(digest)
            by_class.setdefault(class_name, []).append(picture)
    pairs = [(class_name, picture) for class_name in sorted(by_class) for picture in by_class[class_name]]
    order = np.random.default_rng([draw, len(pairs)]).permutation(len(pairs))
    left = dict.fromkeys(by_class, labels or len(pairs))
    parts: dict[str, list[int]] = {"train": [], "test": []}
    for place in order.tolist():
        own = pairs[place][0]
        if left[own] and len(parts["train"]) < (images or len(pairs)):
            left[own] -= 1
            parts["train"].append(place)
        elif len(parts["test"]) < _TEST_IMAGES:
            parts["test"].append(place)
    writing = folder.with_name(f".{folder.name}-{os.getpid()}")
    for part, places in parts.items():
        for place in places:
            file = writing / part / pairs[place][0] / f"{place:05}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pairs[place][1].save(file)
    if not folder.exists():  # another process may have been faster
        writing.rename(folder)


def _metric(folder: Path) -> str:
    return CLASSIFICATION.deciding(np.bincount(ImageFolder(folder / "train").targets)).name


def _scored(metric: str, predicted: NDArray[np.int64], labels: NDArray[np.int64]) -> dict[str, Any]:
    score = CLASSIFICATION.metric(metric).interval(labels, predicted)
    return {"accuracy": score.estimate, "low": score.low, "high": score.high}


def by_sklearn(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a row of each image size and of each kind of features."""
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    metric = _metric(folder)
    for image_size in _SIZES:
        started = time.monotonic()
        model, seen = backbone(image_size, 2).eval(), {}
        for part in ("train", "test"):
            images = image_folder(folder, part, image_size)
            with torch.inference_mode():
                tokens = [model.forward_features(batch) for batch, _ in DataLoader(images, 32)]  # (B, 1 + P, D) each
            means = [torch.cat([own[:, 0], own[:, 1:].mean(1)], 1) for own in tokens]  # (B, 2 D) each
            seen[part] = torch.cat(means).numpy(), np.array(images.targets)
        (values, labels), (test, truth) = seen["train"], seen["test"]
        for features, width in (("cls", values.shape[1] // 2), ("cls+mean", values.shape[1])):
            strengths = np.logspace(-4, 1, 11)
            logistic = LogisticRegressionCV(
                Cs=strengths,
                cv=min(5, np.bincount(labels).min()),
                max_iter=3000,
                use_legacy_attributes=False,
                scoring="balanced_accuracy" if metric != "accuracy" else "accuracy",
                l1_ratios=(0.0,),
            )
            predicted = (
                make_pipeline(StandardScaler(), logistic).fit(values[:, :width], labels).predict(test[:, :width])
            )
            row = {"by": f"sklearn {features}", "image_size": image_size, "seconds": time.monotonic() - started}
            yield row | _scored(metric, predicted, truth)


def by_peft(folder: Path, image_size: int, epochs: int, threads: int) -> dict[str, Any]:
    """Return the row of a script with PEFT."""
    predicted, labels, size, seconds = by_hand(
        folder, image_size, flips=True, threads=threads, epochs=epochs, schedule=one_cycle
    )
    return {
        "by": f"peft {epochs} epochs",
        "image_size": image_size,
        "bytes": size,
        "seconds": seconds,
        **_scored(_metric(folder), predicted, labels),
    }


def equal_mass_ece(confidence: NDArray[np.float64], right: NDArray[np.bool_], bins: int = 10) -> float:
    """Return the mean gap between confidence and accuracy over bins of as many images each."""
    parts = np.array_split(np.argsort(confidence, kind="stable"), bins)
    gaps = [len(part) * abs(confidence[part].mean() - right[part].mean()) for part in parts]
    return float(sum(gaps) / len(confidence))


def by_peft_vit(folder: Path, name: str, minutes: float, threads: int, output: Path) -> dict[str, Any]:
    """Return the row of `train` or of a way to tune."""
    started = time.monotonic()
    common: dict[str, Any] = {"minutes": minutes, "threads": threads, "output": output}
    if name in _TUNED:
        trained = peft_vit.tune(folder, max_bytes=_TUNED[name][0], **common)
    else:
        trained = peft_vit.train(folder, method="linear" if name == "regression" else "lora", **common)
    seconds, record = time.monotonic() - started, trained.record
    assert record.predictions is not None
    assert record.tested_calibration is not None
    predicted, labels = (np.asarray(getattr(record.predictions, of)) for of in ("predicted", "labels"))
    right = predicted == labels
    files = sorted(trained.path.glob("model/model.*"))
    return {
        "by": name,
        "image_size": record.spec.data.image_size,
        **_scored(_metric(folder), predicted, labels),
        "nll": record.tested_calibration.nll,
        "ece": equal_mass_ece(np.asarray(record.tested_calibration.probability), right),
        "unlike": record.tested_calibration.unlike,
        "bytes": sum(file.stat().st_size for file in files) if name in _TUNED else None,
        "seconds": seconds,
    }


def table(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """Yield a line of Markdown a set and number of labels: means over draws, of accuracies in %."""
    yield "| images | labels | draws | `train` | regression | scikit-learn | PEFT | `tune` | NLL | ECE | unlike |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    frame = pd.DataFrame(rows).replace("", np.nan)
    measured = ["accuracy", "nll", "ece", "unlike", "test_images", "train_images"]
    frame = frame.astype(dict.fromkeys(measured, float))
    frame["unlike"] /= frame["test_images"]
    for (name, images), cell in frame.groupby(["set", "train_images"], sort=False):
        drawn = set(cell.loc[cell["by"] == "train", "draw"])
        of_draws = cell[cell["draw"].isin(drawn)]
        kind = of_draws["by"].str.split().str[0]
        at = of_draws["image_size"].where(kind == "sklearn", "")
        means = of_draws.groupby([kind, of_draws["by"], at])[["accuracy", "nll", "ece", "unlike"]].mean()
        best = {way: means.loc[way].sort_values("accuracy").iloc[-1] for way in kind.unique()}
        right = (f"{100 * best[way]['accuracy']:.1f}" if way in best else "" for way in _WAYS)
        said = (
            " / ".join(f"{best[way][of]:.{digits}f}" for way in _WAYS[:2] if way in best)
            for of, digits in (("nll", 2), ("ece", 2), ("unlike", 3))
        )
        yield f"| {name} | {images:.0f} | {len(drawn)} | {' | '.join([*right, *said])} |"


_NAMES = {"elpv": "solar cells", "fashion-mnist": "clothing", "oxygen": "icons"}
_README = ("sklearn", "peft", "train", "tune")
_CELLS = (  # of README
    *(("elpv", 512), ("emoji", 300), ("stamps", 300), ("oxygen", 300)),
    *(("digits", 200), ("fashion-mnist", 200)),
)
_AVX2 = RESULTS.with_name("few_labels_avx2.csv")


def readme(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """Yield README's table: accuracies in %, means over the draws on which everything was done; minutes, megabytes."""
    frame = pd.DataFrame(rows).replace("", np.nan)
    frame = frame.astype(dict.fromkeys(("accuracy", "seconds", "bytes", "train_images", "low", "high"), float))
    frame["kind"] = frame["by"].str.split().str[0]
    frame["at"] = frame["image_size"].where(frame["kind"] == "sklearn", "")
    lines, minutes = [], {kind: list[float]() for kind in _README}
    limited = {(row["set"], row["by"]): float(row["accuracy"]) for row in rows_of(_AVX2)}
    by_cell = frame.groupby(["set", "train_images"])
    for name, images in _CELLS:
        cell = by_cell.get_group((name, images))
        done = [set(cell.loc[cell["kind"] == kind, "draw"]) for kind in _README]
        if not (draws := set.intersection(*done)):
            continue
        means = (
            cell[cell["draw"].isin(draws)].groupby(["kind", "by", "at"])[["accuracy", "seconds", "low", "high"]].mean()
        )
        shown = []
        for kind in _README:
            best = means.loc[kind].sort_values("accuracy").iloc[-1]
            shown.append(f"{100 * best['accuracy']:.1f}")
            minutes[kind].append(best["seconds"] / 60)
            if (right := limited.get((name, kind))) is not None:
                shown[-1] += f" (AVX2: {100 * right:.1f})"
            if kind == "tune":  # half of the interval over test images; draws are apart
                shown[-1] += f"<sub>±{50 * (best['high'] - best['low']) / len(draws) ** 0.5:.1f}</sub>"
        times = f"<sub>×{len(draws)}</sub>" if len(draws) > 1 else ""
        lines.append(f"| {images:.0f} {_NAMES.get(name, name)}{times} | {' | '.join(shown)} |")
    yield "| learnt from | scikit-learn | PEFT, 86 MB | `train`, 86 MB | `tune`, 14 MB |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    yield from lines
    yield f"| minutes, median | {' | '.join(f'{np.median(own):.0f}' for own in minutes.values())} |"


def main() -> None:
    """Make the draw, and add a row for each way that has none."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("set", nargs="?", help=f"{', '.join(_SETS)}, or a folder of class folders")
    asked.add_argument("--labels", type=int, help="training images a class")
    asked.add_argument("--images", type=int, help="training images, as they come")
    asked.add_argument("--draw", type=int)
    asked.add_argument("--by", nargs="+", default=["train"])
    asked.add_argument("--minutes", type=float)
    asked.add_argument("--peft-image-size", type=int, default=112)
    asked.add_argument("--threads", type=int, default=2)
    asked.add_argument("--work", type=Path, default=Path("few-labels"))
    asked.add_argument("--results", type=Path, default=RESULTS)
    asked.add_argument("--table", action="store_true", help="print what is there, nothing else")
    asked.add_argument("--readme", action="store_true", help="print README's table, nothing else")
    options = asked.parse_args()
    if options.table or options.readme:
        print(*(readme if options.readme else table)(rows_of(options.results)), sep="\n")
        return
    if options.set is None or options.draw is None:
        asked.error("a set and --draw, or --table")
    torch.set_num_threads(options.threads)
    name, many = Path(options.set).name, options.images or options.labels
    folder = options.work / f"{name}-{many}-{options.draw}"
    write_draw(options.set, options.labels, options.images, options.draw, folder)
    train, test = (len(ImageFolder(folder / part).samples) for part in ("train", "test"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    same = {
        "set": name, "train_images": train, "test_images": test, "draw": options.draw, "metric": _metric(folder),
        "threads": options.threads, "commit": commit.stdout.strip(),
    }  # fmt: skip
    for by in options.by:
        there = [(row["set"], row["train_images"], row["draw"], row["by"]) for row in rows_of(options.results)]
        if any(row[:3] == (name, str(train), str(options.draw)) and row[3].split()[0] == by for row in there):
            continue
        if by == "sklearn":
            rows = list(by_sklearn(folder))
        elif by == "peft":
            rows = [by_peft(folder, options.peft_image_size, epochs, options.threads) for epochs in (3, 10)]
        else:
            minutes = options.minutes or (_TUNED[by][1] if by in _TUNED else 6)
            output = options.work / "runs" / f"{folder.name}-{by}"
            rows = [by_peft_vit(folder, by, minutes, options.threads, output)]
        for row in rows:
            append_row(options.results, _COLUMNS, same | row)


if __name__ == "__main__":
    main()
