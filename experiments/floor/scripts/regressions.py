"""Which frozen features a logistic regression should have: the class token, with the patches' mean, of four blocks.

    python -m experiments.floor.scripts.regressions FOLDER 112

`FOLDER` is that of `sets`. Each regression is fitted as `train` and `tune` do, to images and their flips, its penalty
chosen by five folds; so is which features it has, in `chosen`. Features are `standardized`, each, or `scaled`, each
part by one number. A row for each in `results/regressions.csv`: what folds say, and what is on test images.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from experiments.floor.scripts.images import RESULTS, Rows, Side, flips_of, measured, pretrained, read_side, runtime_of
from experiments.floor.scripts.sets import DRAWS, SETS
from peft_vit.base.seeding import numpy_generator
from peft_vit.base.statistics import fit_temperature
from peft_vit.base.statistics.drawing import assign_folds
from peft_vit.core.training import FLIP_AXES, RuntimeConfig
from peft_vit.core.training.metrics import autocast

_L2 = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # of the penalty, strong to weak
_FOLDS, _BLOCKS = 5, 4
Floats = NDArray[np.float64]


@torch.inference_mode()
def features_of(model: Any, side: Side, runtime: RuntimeConfig, axes: tuple[int, ...]) -> dict[str, Floats]:
    """Return features by name: of the last blocks, from the last on, class tokens; and the patches' mean."""
    parts: dict[str, list[Any]] = {f"class{place}": [] for place in range(_BLOCKS)} | {"mean": []}
    for batch, _ in side.images.ordered_batches(32, runtime.mean, runtime.std):
        shown = batch.flip(axes) if axes else batch
        with autocast(runtime.device, runtime.precision):
            layers = model.get_intermediate_layers(shown, n=_BLOCKS, return_prefix_tokens=True, norm=True)
        for place, (patches, prefix) in enumerate(reversed(layers)):
            parts[f"class{place}"].append(prefix[:, 0].float().numpy())
            if place == 0:
                parts["mean"].append(patches.float().mean(1).numpy())
    return {name: np.concatenate(values).astype(np.float64) for name, values in parts.items()}


PARTS = {
    "class": ("class0",),
    "class+mean": ("class0", "mean"),
    "four": tuple(f"class{place}" for place in range(_BLOCKS)),
}


def prepared(train: list[Floats], test: list[Floats], standardized: bool) -> tuple[Floats, Floats]:
    """Return parts side by side, centred, and divided by each feature's deviation or by one number for each part."""
    both: tuple[list[Floats], list[Floats]] = ([], [])
    for fitted, other in zip(train, test, strict=True):
        centre, spread = fitted.mean(0), fitted.std(0)
        scale = spread if standardized else np.sqrt((spread**2).mean())
        both[0].append((fitted - centre) / scale)
        both[1].append((other - centre) / scale)
    return np.concatenate(both[0], 1), np.concatenate(both[1], 1)


def logits_of(train: list[Floats], labels: NDArray[np.int64], test: list[Floats], standardized: bool, l2: Any) -> Any:
    """Return the logits of test images for each strength, by the objective of the package's probe."""
    x, other = prepared(train, test, standardized)
    if len(x) < x.shape[1]:  # what lies across all training images has no weight, so turn to their span
        turned = np.linalg.svd(x, full_matrices=False)[2].T
        x, other = x @ turned, other @ turned
    model = LogisticRegression(tol=1e-4, max_iter=1000, warm_start=True)
    logits = []
    for strength in l2:
        model.set_params(C=1 / (strength * len(x))).fit(x.astype(np.float32), labels)
        logits.append(other @ model.coef_.T.astype(np.float64) + model.intercept_)
    return logits


def regress(
    ways: list[list[Floats]],
    labels: NDArray[np.int64],
    groups: NDArray[np.int64],
    test: list[Floats],
    standardized: bool,
) -> tuple[float, Floats, Floats]:
    """Return the strength that folds choose, logits of left-out training images, and of test images.

    Args:
        ways: parts of the training images' features in each way in which they are shown.
        labels: of the images.
        groups: of the images.
        test: parts of test images' features.
        standardized: see `prepared`.
    """
    fold_of = assign_folds(labels, groups, _FOLDS, numpy_generator(0, "held_out"))
    held_out = [np.empty((len(labels), labels.max() + 1)) for _ in _L2]

    def parts(rows: NDArray[np.bool_]) -> list[Floats]:
        return [np.concatenate([way[place][rows] for way in ways]) for place in range(len(test))]

    for fold in range(_FOLDS):
        rest = fold_of != fold
        own = [part[~rest] for part in ways[0]]
        fitted = logits_of(parts(rest), np.tile(labels[rest], len(ways)), own, standardized, _L2)
        for of_strength, values in zip(held_out, fitted, strict=True):
            of_strength[~rest] = values
    right = [(values.argmax(1) == labels).mean() for values in held_out]
    best = max(range(len(_L2)), key=right.__getitem__)
    everything = np.ones(len(labels), dtype=bool)
    (tested,) = logits_of(parts(everything), np.tile(labels, len(ways)), test, standardized, _L2[best : best + 1])
    return _L2[best], held_out[best], tested


def main() -> None:
    """Do all draws at a size."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("folder", type=Path)
    asked.add_argument("size", type=int)
    asked.add_argument("--sets", nargs="*", default=SETS)
    given = asked.parse_args()
    values = ("l2", "held_out", "accuracy", "nll", "seconds", "features_s")
    rows = Rows(RESULTS / "regressions.csv", ("set", "draw", "image_size", "features", "scale"), values)
    for name, number in ((name, number) for number in range(DRAWS) for name in given.sets):
        if rows.has(name, number, given.size, "chosen", "scaled"):
            continue
        train, test = (read_side(given.folder / f"{name}-{number}" / part, given.size) for part in ("train", "test"))
        backbone = pretrained(given.size, len(train.classes))
        runtime = runtime_of(backbone)
        began = time.perf_counter()
        of_test, *of_train = [
            features_of(backbone.model.eval(), side, runtime, axes)
            for side, axes in ((test, ()), *((train, axes) for axes in FLIP_AXES[flips_of(name)]))
        ]
        features_s = round(time.perf_counter() - began, 1)
        labels, truth = train.images.labels, test.images.labels
        for scale in ("standardized", "scaled"):
            found = {}
            for kind, parts in PARTS.items():
                began = time.perf_counter()
                ways = [[way[part] for part in parts] for way in of_train]
                tested = [of_test[part] for part in parts]
                l2, held_out, logits = regress(ways, labels, train.groups, tested, scale == "standardized")
                temperature = fit_temperature(held_out, labels)
                own = 100 * float((held_out.argmax(1) == labels).mean())
                result = {
                    "l2": l2,
                    "held_out": round(own, 3),
                    **measured(logits, truth, temperature),
                    "seconds": round(time.perf_counter() - began, 1),
                    "features_s": features_s,
                }
                found[kind] = result
                if not rows.has(name, number, given.size, kind, scale):
                    rows.add(set=name, draw=number, image_size=given.size, features=kind, scale=scale, **result)
            best = max(found.values(), key=lambda result: result["held_out"])  # of equal ones the smallest
            rows.add(set=name, draw=number, image_size=given.size, features="chosen", scale=scale, **best)


if __name__ == "__main__":
    main()
