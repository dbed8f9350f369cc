"""How often prediction sets hold the true class of new images: thresholds come from folds, the model from all images.

A planted task of three normal clouds in eight dimensions, whose class means a model learns: with few images it knows
them badly, and before its temperature is fitted it is too sure of itself. Prints the table of
docs/explanation/statistics.md.
"""

from __future__ import annotations

import numpy as np

from peft_vit.statistics import (
    class_scores,
    conformal_quantile,
    fit_temperature,
    fold_coverage,
    prediction_sets,
    probabilities,
)

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


def main() -> None:
    """Print the table."""
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
