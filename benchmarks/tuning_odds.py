"""How often what `peft_vit.statistics.odds` says is right, over simulated tunings with known truths.

    python benchmarks/tuning_odds.py                 simulate for two minutes, write the result, fill the document
    python benchmarks/tuning_odds.py --table         fill docs/explanation/tuning.md from the result that is there

A tuning has 6 to 12 models: adapters and probes, each the best of up to five variants (sizes, rates) that successive
halving leaves of them on the same folds, and forms of them that were rounded after training. On image i run j of
candidate c is right where a normal variable is above a threshold that follows from its true accuracy:

    difficulty of i  +  what c finds hard of i  +  chance  +  how good run j is  +  how well the training images suit c

With limits to the bytes, which half of the tunings have, no float model may be taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import special

ROOT = Path(__file__).resolve().parents[1]
RESULT, DOCUMENT = ROOT / "benchmarks" / "results" / "tuning_odds.json", ROOT / "docs" / "explanation" / "tuning.md"
MARK = "tuning-odds"
MARGIN, FOLDS, TUNINGS, SEED = 0.01, 5, 400, 20261129
TRUTHS: dict[str, float | None] = {
    "none loses": 0.0,
    "one loses 0.5 points": 0.005,
    "one loses 1 point": 0.01,
    "one loses 1.01 points": 0.0101,
    "one loses 2 points": 0.02,
    "one loses 4 points": 0.04,
    "each loses something": None,  # exponential, 1.5 points on average, of seven in ten
}
_EDGES = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


@dataclass(frozen=True)
class Tuning:
    """What folds show, and what is true.

    Attributes:
        scores: (C, R, N), NaN where a variant was dropped.
        folds: (R, N).
        truth: (C,), accuracy on new images, expected of a run.
        sizes: of files, in a unit of their own.
        models: positions of what may be taken: of each model the best variant.
        floats: of them, those with float weights.
        limited: no float model may be taken.
    """

    scores: np.ndarray
    folds: np.ndarray
    truth: np.ndarray
    sizes: list[int]
    models: list[int]
    floats: list[int]
    limited: bool


@dataclass(frozen=True)
class Noise:
    """What a right prediction depends on besides the truth.

    Attributes:
        own: share of the variance that two candidates don't have in common.
        repeated: of it, what is the same each time that an image is predicted.
        run: standard deviation of a run's accuracy.
        training: that of what a set of training images does for a candidate.
    """

    own: float
    repeated: float
    run: float
    training: float


def kinds_of_models(rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Return the position of the model that each is a rounded form of, -1 for none, and the bits of each."""
    parents, bits = [-1, -1], [32, 32]
    for _ in range(rng.integers(4, 11)):
        if rng.random() < 0.5:
            parents.append(int(rng.choice([place for place, parent in enumerate(parents) if parent < 0])))
            bits.append(int(rng.choice([2, 3, 4, 8])))
        else:
            parents.append(-1)
            bits.append(int(rng.choice([4, 8, 32])))
    return parents, bits


def losses_of(rng: np.random.Generator, sizes: Sequence[int], loss: float | None) -> np.ndarray:
    """Return what each model truly loses: one of them, every other time the smallest, or most of them."""
    if loss is None:
        return rng.exponential(0.015, len(sizes)) * (rng.random(len(sizes)) < 0.7)
    losses = np.zeros(len(sizes))
    losses[int(np.argmin(sizes)) if rng.random() < 0.5 else rng.integers(len(sizes))] = loss
    return losses


def simulate(rng: np.random.Generator, loss: float | None) -> Tuning:
    """Draw a tuning of 150 to 600 images in one to three repetitions of five folds."""
    images, repetitions = int(rng.integers(150, 601)), int(rng.integers(1, 4))
    parents, bits = kinds_of_models(rng)
    sizes = [1000 * width + place for width, place in zip(bits, rng.permutation(len(bits)).tolist(), strict=True)]
    lost = losses_of(rng, sizes, loss)
    best = rng.uniform(0.65, 0.97)
    own = rng.uniform(0.03, 0.15)
    differ = np.arccos(1 - own) / np.pi * 4 * best * (1 - best)  # images, about, that two runs are not both right on
    training = np.sqrt(rng.uniform(0, 0.5) * differ / 2 / images)
    noise = Noise(own, rng.uniform(0.05, 0.4), rng.uniform(0, 0.012), training)
    folds = np.array([rng.permutation(images) % FOLDS for _ in range(repetitions)])  # (R, N)

    of_variant = np.array([m for m, parent in enumerate(parents) if parent < 0 for _ in range(rng.integers(1, 6))])
    behind = rng.exponential(0.015, len(of_variant))
    for model in np.unique(of_variant):
        behind[of_variant == model] -= behind[of_variant == model].min()
    truth = best - lost[of_variant] - behind
    accuracy, latent = runs(rng, truth, of_variant, folds, noise)  # (C, R, N) each
    right = special.ndtri(accuracy) + latent > 0
    done, taken = halved(right, folds, of_variant)

    scores, truths, place_of = [np.where(done, right, np.nan)], [truth], dict(taken)
    for model, parent in enumerate(parents):
        if parent >= 0:
            source, differs = taken[parent], rng.uniform(0.003, 0.02) * 6 / bits[model]
            change = lost[parent] - lost[model]
            threshold = special.ndtri(np.clip(accuracy[source] + change, 0.02, 0.998)) * np.sqrt(1 + differs)
            moved = latent[source] + np.sqrt(differs) * rng.standard_normal(images)
            place_of[model] = len(truth) + len(scores) - 1
            scores.append((threshold + moved > 0)[None].astype(float))
            truths.append(np.array([truth[source] + change]))
    positions = [place_of[model] for model in range(len(parents))]
    of_position = dict(zip(positions, sizes, strict=True))
    floats = [place for place, width in zip(positions, bits, strict=True) if width == 32]
    every = np.concatenate(truths)
    all_sizes = [of_position.get(place, 0) for place in range(len(every))]
    return Tuning(np.concatenate(scores), folds, every, all_sizes, positions, floats, bool(rng.random() < 0.5))


def runs(
    rng: np.random.Generator, truth: np.ndarray, model: np.ndarray, folds: np.ndarray, noise: Noise
) -> tuple[np.ndarray, np.ndarray]:
    """Return the accuracy that each run has, and normal variables of images: (C, R, N) both.

    Variants of a model have six tenths in common of what is their own.
    """
    (repetitions, images), variants, models = folds.shape, len(truth), int(model.max()) + 1

    def shared(*shape: int) -> np.ndarray:
        common, alone = rng.standard_normal((models, *shape)), rng.standard_normal((variants, *shape))
        return np.sqrt(0.6) * common[model] + np.sqrt(0.4) * alone

    of_run = noise.run * rng.standard_normal((variants, repetitions, FOLDS))
    runs_of_images = np.take_along_axis(of_run, np.broadcast_to(folds, (variants, *folds.shape)), 2)
    accuracy = (truth + noise.training * shared())[:, None, None] + runs_of_images
    latent = np.sqrt(1 - noise.own) * rng.standard_normal(images)  # (N,)
    latent = latent + np.sqrt(noise.own * noise.repeated) * shared(images)[:, None]
    latent = latent + np.sqrt(noise.own * (1 - noise.repeated)) * rng.standard_normal((variants, repetitions, images))
    return np.clip(accuracy, 0.02, 0.998), latent


def halved(right: np.ndarray, folds: np.ndarray, model: np.ndarray) -> tuple[np.ndarray, dict[int, int]]:
    """Return which predictions were made, and each model's variant: two folds, the better half five, the best all."""
    done, taken = np.zeros(right.shape, dtype=bool), {}
    first = folds[0] < 2
    for one in np.unique(model).tolist():
        variants = np.flatnonzero(model == one)
        done[variants, 0] = first
        half = variants[np.argsort(-right[variants, 0][:, first].mean(1), kind="stable")][: (len(variants) + 1) // 2]
        done[half, 0] = True
        taken[one] = int(half[right[half, 0].mean(1).argmax()])
        done[taken[one]] = True
    return done, taken
