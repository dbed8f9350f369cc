"""How often prediction sets hold the true class of new images.

Either thresholds come from folds, and the model from all images, or from validation images, which have chosen one of
several checkpoints that are equally good on new images.

On folds: a planted task of three normal clouds in eight dimensions, whose class means a model learns: with few images
it knows them badly, and before its temperature is fitted it is too sure of itself. Prints what
docs/explanation/statistics.md tells.
"""

from __future__ import annotations

import numpy as np

from peft_vit.base.statistics import (
    class_scores,
    conformal_quantile,
    fit_temperature,
    prediction_sets,
    probabilities,
    row_weights,
)
from peft_vit.core.tasks import CLASSIFICATION
from peft_vit.runs.measures.held_out import PRIOR

TRIALS, FOLDS, NEW, DIMENSIONS = 400, 5, 400, 8
COVERAGES = (0.8, 0.9, 0.95)
CENTERS = 1.3 * np.eye(3, DIMENSIONS)


def logits_of(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return (n, 3) of a model that has learned class means from x (N, D) and y (N,), for images (n, D)."""
    means = np.stack([x[y == k].mean(0) for k in range(3)])
    return -2.0 * ((at[:, None] - means) ** 2).sum(-1)


def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images (n, D) and classes (n,), as many of each."""
    y = rng.permutation(np.arange(n) % 3)
    return CENTERS[y] + rng.normal(size=(n, DIMENSIONS)), y


def trial(rng: np.random.Generator, n: int, repetitions: int) -> list[tuple[float, float, float]]:
    """Return, by asked coverage, that of new images, that on folds, and the classes in a set."""
    x, y = draw(rng, n)
    rows = []
    for repetition in range(repetitions):
        fold = rng.permutation(n) % FOLDS
        for f in range(FOLDS):
            out = np.flatnonzero(fold == f)
            logits = logits_of(x[fold != f], y[fold != f], x[out])
            rows.append((logits, y[out], out, np.full(len(out), repetition * FOLDS + f)))
    logits, labels, images, runs = (np.concatenate(part) for part in zip(*rows, strict=True))
    temperature = fit_temperature(logits, labels)
    p = probabilities(logits, temperature)
    new_x, new_y = draw(rng, NEW)
    new = probabilities(logits_of(x, y, new_x), temperature)
    found = []
    for coverage in COVERAGES:
        inside = prediction_sets(new, conformal_quantile(class_scores(p, labels), coverage, images))
        on_folds, _ = fold_coverage(p, labels, images, runs, coverage)
        found.append((inside[np.arange(NEW), new_y].mean(), on_folds, inside.sum(1).mean()))
    return found


def fold_coverage(
    probability: np.ndarray, labels: np.ndarray, images: np.ndarray, runs: np.ndarray, coverage: float
) -> tuple[float, float]:
    """Return how often sets hold the true class, and their mean size, by the scores of other runs' images.

    A run's images get the quantile of all scores of images that it did not hold out. Images count alike, however often
    they were held out.

    Args:
        probability: (m, classes), held out.
        labels: (m,) true classes.
        images: (m,) which image each row is of.
        runs: (m,) which run predicted it.
        coverage: that was asked.
    """
    p, y, which, by = probability, labels, images, runs
    scores = class_scores(p, y)
    covered, sizes = np.zeros(len(y)), np.zeros(len(y))
    for run in np.unique(by):
        own = by == run
        others = ~np.isin(which, which[own])
        inside = prediction_sets(p[own], conformal_quantile(scores[others], coverage, which[others]))
        covered[own], sizes[own] = inside[np.arange(own.sum()), y[own]], inside.sum(1)
    weight, count = row_weights(len(y), which)
    weight /= count
    return float(covered @ weight), float(sizes @ weight)


def coverage_after_choice(
    rng: np.random.Generator, checkpoints: int, images: int = 30, trials: int = TRIALS, asked: float = 0.9
) -> float:
    """Return how often sets hold the class of new images, where some have chosen the checkpoint and the threshold.

    The checkpoint with the highest accuracy is taken, of equal ones that with the lowest NLL. Half of what makes an
    image hard is the same for all of them.
    """
    held = []
    for _ in range(trials):
        y = rng.integers(3, size=images + NEW)
        shared, own = rng.normal(size=(images + NEW, 3)), rng.normal(size=(checkpoints, images + NEW, 3))
        logits = 3 * (1.5 * np.eye(3)[y] + np.sqrt(0.5) * shared + np.sqrt(0.5) * own)  # (checkpoints, N, 3)
        of_validation, labels = logits[:, :images], y[:images]
        right = (of_validation.argmax(2) == labels).mean(1)
        nll = [-np.log(1 - class_scores(probabilities(one, 1.0), labels)).mean() for one in of_validation]
        taken = np.lexsort((nll, -right))[0]
        calibrated = CLASSIFICATION.meaning(of_validation[taken], labels, PRIOR)
        assert calibrated is not None
        p = probabilities(logits[taken, images:], calibrated.temperature)
        held.append(prediction_sets(p, calibrated.threshold(asked))[np.arange(NEW), y[images:]].mean())
    return float(np.mean(held))


def main() -> None:
    """Print the tables."""
    for checkpoints in (1, 3, 10, 30):
        held = coverage_after_choice(np.random.default_rng(0), checkpoints)
        print(f"best of {checkpoints} by 30 images, 90 % asked: {100 * held:.1f} %", flush=True)
    print("| images | repetitions | asked | new images | on folds | classes in a set |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for n in (60, 200, 400):
        for repetitions in (1, 3):
            rng = np.random.default_rng(0)
            means = np.mean([trial(rng, n, repetitions) for _ in range(TRIALS)], axis=0)  # (coverages, 3)
            for coverage, (new, on_folds, size) in zip(COVERAGES, means, strict=True):
                shares = " | ".join(f"{100 * share:.1f}" for share in (coverage, new, on_folds))
                print(f"| {n} | {repetitions} | {shares} | {size:.2f} |", flush=True)


if __name__ == "__main__":
    main()
