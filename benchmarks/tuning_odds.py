"""How often what `peft_vit.base.statistics.odds` says is right, over simulated tunings with known truths.

    .venv/bin/python benchmarks/tuning_odds.py
    .venv/bin/python benchmarks/tuning_odds.py --table

The first simulates for half a minute and writes the result; both fill docs/explanation/tuning.md from it.

A tuning has 6 to 12 models: adapters and probes, each the best of up to five variants (sizes, rates) by successive
halving on the same folds, and forms of them that were rounded after training. With several repetitions the third that
is worst in the first has no more. On image i run j of model c is right where a normal variable is above a threshold
that follows from its true accuracy:

    difficulty of i  +  what c finds hard of i  +  chance  +  how good run j is  +  how well the training images suit c

What a set of training images does there is drawn, once for a model. So there are tunings of linear models as well, each
trained on the images outside a fold, and at last on all: their folds share training images as those of `tune` do. Of
normal clouds the accuracy of a linear model on new images is known.

In half of the tunings no float model may be taken.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from peft_vit.base.statistics.odds import ModelChoice, choose_model, means_of_images

FOLDER = Path(__file__).resolve().parent
RESULT = FOLDER / "results" / "tuning_odds.json"
DOCUMENT = FOLDER.parent / "docs" / "explanation" / "tuning.md"
MARK = "tuning-odds"
MARGIN, FOLDS, TUNINGS, SEED = 0.01, 5, 400, 20261129
TRUTHS: dict[str, float | None] = {
    "none loses": 0.0,
    "one loses 0.5 points": 0.005,
    "one loses 1.01 points": 0.0101,
    "one loses 2 points": 0.02,
    "one loses 4 points": 0.04,
    "each loses something": None,  # exponential, 1.5 points on average, of seven in ten
}
TRAINED = "linear models, trained on folds"
_EDGES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)


@dataclass(frozen=True)
class Tuning:
    """What folds show, and what is true.

    Attributes:
        scores: (C, R, N), NaN where a model was dropped.
        folds: (R, N).
        truth: (C,), accuracy on new images, expected of a run.
        sizes: of files, in a unit of their own.
        floats: positions of those with float weights.
        limited: no float model may be taken.
        error: (C, C), covariance of the truth, where it was measured itself.
    """

    scores: np.ndarray
    folds: np.ndarray
    truth: np.ndarray
    sizes: Sequence[float]
    floats: list[int]
    limited: bool
    error: np.ndarray | float = 0.0


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
    taken = halved(right, folds, of_variant)
    right_of = {model: right[variant] for model, variant in taken.items()}  # (R, N) of each model
    truth_of = {model: truth[variant] for model, variant in taken.items()}
    for model, parent in enumerate(parents):
        if parent >= 0:
            source, differs = taken[parent], rng.uniform(0.003, 0.02) * 6 / bits[model]
            truth_of[model] = truth[source] + lost[parent] - lost[model]
            rounded = np.clip(accuracy[source] + truth_of[model] - truth[source], 0.02, 0.998)
            moved = latent[source] + np.sqrt(differs) * rng.standard_normal(images)
            right_of[model] = np.sqrt(1 + differs) * special.ndtri(rounded) + moved > 0
    scores = np.array([right_of[model] for model in range(len(parents))], dtype=float)  # (C, R, N)
    if repetitions > 1:
        scores[np.argsort(scores[:, 0].mean(1))[: len(parents) // 3], 1:] = np.nan
    floats = [model for model, width in enumerate(bits) if width == 32]
    known = np.array([truth_of[model] for model in range(len(parents))])
    return Tuning(scores, folds, known, sizes, floats, bool(rng.random() < 0.5))


def trained(rng: np.random.Generator) -> Tuning:
    """Train ridge classifiers, and forms of them with rounded weights, on one to three repetitions of five folds.

    A model knows most of 16 features of 100 to 600 images. Its truth is the accuracy on new images of the last
    training, on all of these.
    """
    images, repetitions, width = int(rng.integers(100, 601)), int(rng.integers(1, 4)), 16
    mean = rng.exponential(size=width)
    mean *= rng.uniform(0.5, 1.6) / np.linalg.norm(mean)  # of a class; the other's is its negative
    y = rng.choice([-1.0, 1.0], images)
    x = rng.standard_normal((images, width)) + y[:, None] * mean
    folds = np.array([rng.permutation(images) % FOLDS for _ in range(repetitions)])  # (R, N)
    models = [
        (np.sort(rng.permutation(width)[: rng.integers(12, width + 1)]), 10 ** rng.uniform(-1, 1.5))
        for _ in range(rng.integers(3, 8))
    ]
    rounded = [(int(rng.integers(len(models))), int(rng.choice([3, 4, 6]))) for _ in range(rng.integers(1, 5))]
    bits = [32, 32, *rng.choice([4, 8, 32], len(models) - 2).tolist(), *(width for _, width in rounded)]

    def heads(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return weights (C, D) and biases (C,) of what is fitted to some images."""
        weights, biases = np.zeros((len(bits), width)), np.zeros(len(bits))
        for place, (columns, penalty) in enumerate(models):
            z = np.column_stack([x[rows][:, columns], np.ones(len(rows))])
            *weights[place, columns], biases[place] = np.linalg.solve(
                z.T @ z + penalty * np.eye(z.shape[1]), z.T @ y[rows]
            )
        for place, (parent, width_of) in enumerate(rounded, start=len(models)):
            step = np.abs(weights[parent]).max() / (2 ** (width_of - 1) - 0.5)
            weights[place] = (np.floor(weights[parent] / step) + 0.5) * step * (weights[parent] != 0)
            biases[place] = biases[parent]
        return weights, biases

    scores = np.empty((len(bits), repetitions, images))
    for repetition, fold in np.ndindex(repetitions, FOLDS):
        out = folds[repetition] == fold
        weights, biases = heads(np.flatnonzero(~out))
        scores[:, repetition, out] = (weights @ x[out].T + biases[:, None]) * y[out] > 0
    if repetitions > 1:
        scores[np.argsort(scores[:, 0].mean(1))[: len(bits) // 3], 1:] = np.nan
    weights, biases = heads(np.arange(images))
    length = np.linalg.norm(weights, axis=1)
    truth = sum(special.ndtr((weights @ mean + side * biases) / length) for side in (1, -1)) / 2
    sizes = [1000 * wide + place for place, wide in enumerate(bits)]
    floats = [model for model, wide in enumerate(bits) if wide == 32]
    return Tuning(scores, folds, truth, sizes, floats, bool(rng.random() < 0.5))


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


def halved(right: np.ndarray, folds: np.ndarray, model: np.ndarray) -> dict[int, int]:
    """Return each model's variant: of all that had two folds the better half has the first five, of which the best."""
    taken, first = {}, folds[0] < 2
    for one in np.unique(model).tolist():
        variants = np.flatnonzero(model == one)
        half = variants[np.argsort(-right[variants, 0][:, first].mean(1), kind="stable")][: (len(variants) + 1) // 2]
        taken[one] = int(half[right[half, 0].mean(1).argmax()])
    return taken


@dataclass(frozen=True)
class Claim:
    """What is said of a model, against the best float one that was found, and whether it is so.

    Attributes:
        sure: that it does not lose more than the margin.
        right: it does not.
        shown: it is called shown.
    """

    sure: float
    right: bool
    shown: bool


@dataclass(frozen=True)
class Judged:
    """A tuning's claims.

    Attributes:
        chosen: on the model that is taken; None: it is the reference.
        others: on every model but the reference.
        loss: of the one that is taken, true.
        covered: its accuracy lies in its interval.
    """

    chosen: Claim | None
    others: tuple[Claim, ...]
    loss: float
    covered: bool


def judge(tuning: Tuning) -> Judged:
    """Choose by what the folds show, and say what is true of it."""
    models = range(len(tuning.truth))
    fitting = [place for place in models if not (tuning.limited and place in tuning.floats)] or list(models)
    measured = means_of_images(tuning.scores, tuning.folds)
    measured = replace(measured, covariance=measured.covariance + tuning.error)
    choice = choose_model(measured, tuning.sizes, fitting, tuning.floats, MARGIN)
    claims = {place: claim(tuning, choice, place) for place in models if place != choice.reference}
    score = choice.estimates[choice.chosen].score
    return Judged(
        claims.get(choice.chosen),
        tuple(claims.values()),
        float(tuning.truth[choice.reference] - tuning.truth[choice.chosen]),
        bool(score.low <= tuning.truth[choice.chosen] <= score.high),
    )


def claim(tuning: Tuning, choice: ModelChoice, place: int) -> Claim:
    """Return what is said of a model."""
    odds, loss = choice.estimates[place], tuning.truth[choice.reference] - tuning.truth[place]
    return Claim(1 - odds.chance_of_loss, bool(loss <= MARGIN + 1e-9), odds.shown)


def log_score(sure: np.ndarray, right: np.ndarray) -> float:
    """Return the mean of minus the logarithm of the probability of what is so; the smaller, the better."""
    kept = np.clip(sure, 1e-6, 1 - 1e-6)
    return float(-np.log(np.where(right, kept, 1 - kept)).mean())


def calibration(claims: Sequence[Claim]) -> dict[str, Any]:
    """Return how sure claims are and how many are right, in bins, and their log score beside the base rate's."""
    sure, right = np.array([one.sure for one in claims]), np.array([one.right for one in claims])
    bins = []
    for low, high in pairwise(_EDGES):
        inside = (sure >= low) & ((sure < high) | (high == 1))
        if inside.any():
            share = float(right[inside].mean())
            bins.append({"claims": int(inside.sum()), "said": float(sure[inside].mean()), "right": share})
    base = np.full(len(claims), right.mean())
    return {"bins": bins, "log_score": log_score(sure, right), "log_score_of_base_rate": log_score(base, right)}


def row(name: str, judged: Sequence[Judged]) -> dict[str, Any]:
    """Return what became of one kind of truth; shares of tunings, but for `losing_shown`, of models that lose more."""
    chosen = [one.chosen for one in judged if one.chosen is not None]
    losing = [one for tuning in judged for one in tuning.others if not one.right]
    return {
        "truth": name,
        "tunings": len(judged),
        "shown": sum(one.shown for one in chosen) / len(judged),
        "shown_and_wrong": sum(one.shown and not one.right for one in chosen) / len(judged),
        "chosen_and_wrong": sum(not one.right for one in chosen) / len(judged),
        "said_wrong": sum(1 - one.sure for one in chosen) / len(judged),
        "losing_shown": sum(one.shown for one in losing) / max(1, len(losing)),
        "loss": float(np.mean([one.loss for one in judged])),
        "covered": float(np.mean([one.covered for one in judged])),
    }


def measure(tunings: int, seed: int = SEED) -> dict[str, Any]:
    """Return rows of truths, and how well claims are calibrated over all of them."""
    judged = {
        name: [judge(simulate(np.random.default_rng([seed, place, number]), loss)) for number in range(tunings)]
        for place, (name, loss) in enumerate(TRUTHS.items())
    }
    every = [one for of_truth in judged.values() for one in of_truth]
    of_trained = [judge(trained(np.random.default_rng([seed, len(TRUTHS), number]))) for number in range(tunings)]
    return {
        "truths": [row(name, of_truth) for name, of_truth in (judged | {TRAINED: of_trained}).items()],
        **calibrations(every),
        "trained": calibrations(of_trained),
    }


def calibrations(judged: Sequence[Judged]) -> dict[str, Any]:
    """Return how well claims on what is taken, and on every model, are calibrated."""
    return {
        "chosen": calibration([one.chosen for one in judged if one.chosen is not None]),
        "all": calibration([claim for one in judged for claim in one.others]),
    }


def truths_table(result: Mapping[str, Any], what: str = "planted") -> str:
    """Return a row for each kind of truth as Markdown."""
    lines = [
        f"| {what} | tunings | shown | shown and wrong | models that lose more, shown | taken and wrong: is | said "
        "| lost, points | 95 % intervals that hold |",
        f"| --- |{' ---: |' * 8}",
    ]
    for one in result["truths"]:
        shares = ("shown", "shown_and_wrong", "losing_shown", "chosen_and_wrong", "said_wrong")
        cells = [f"{one['tunings']:,}", *(f"{100 * one[key]:.1f} %" for key in shares)]
        lines.append(
            f"| {one['truth']} | {' | '.join(cells)} | {100 * one['loss']:+.2f} | {100 * one['covered']:.1f} % |"
        )
    return "\n".join(lines)


def calibration_table(result: Mapping[str, Any]) -> str:
    """Return how many claims are right of those that are said to be so sure, as Markdown."""
    lines = ["| claims | said, % → right, % (claims) | log score | of the base rate |", "| --- | --- | ---: | ---: |"]
    kinds = {"": result} | ({", trained": result["trained"]} if "trained" in result else {})
    names = (("chosen", "on what is taken"), ("all", "on every model"))
    for found, name in [(of[key], name + kind) for kind, of in kinds.items() for key, name in names]:
        bins = ", ".join(
            f"{100 * one['said']:.0f} → {100 * one['right']:.0f} ({one['claims']:,})" for one in found["bins"]
        )
        lines.append(f"| {name} | {bins} | {found['log_score']:.3f} | {found['log_score_of_base_rate']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Simulate and write, or only fill the document."""
    parser = argparse.ArgumentParser(description="How often the odds of choices are right.")
    parser.add_argument("--tunings", type=int, default=TUNINGS, help="of each kind of truth")
    parser.add_argument("--table", action="store_true", help="fill the document from the result that is there")
    asked = parser.parse_args()
    if not asked.table:
        from benchmarks.common import machine, write

        started = time.perf_counter()
        result = {
            "machine": machine(threads=1),
            "date": datetime.date.today().isoformat(),
            "versions": {name: importlib.metadata.version(name) for name in ("numpy", "scipy")},
            "setting": {"tunings": asked.tunings, "seed": SEED, "margin": MARGIN, "folds": FOLDS},
            **measure(asked.tunings),
        }
        write("tuning_odds", result, RESULT.parent)
        print(f"{time.perf_counter() - started:.0f} s")
    from benchmarks.marks import filled

    result = json.loads(RESULT.read_text(encoding="utf-8"))
    content = truths_table(result) + "\n\n" + calibration_table(result)
    print(content)
    DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8"), {MARK: content}), encoding="utf-8")


if __name__ == "__main__":
    main()
