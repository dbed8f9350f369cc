"""How often odds of choices are right on real predictions: kept studies again, as if they were tunings.

    .venv/bin/python -m experiments.tuning.scripts.odds_replay 200      # draws of each study; a minute
    .venv/bin/python -m experiments.tuning.scripts.odds_replay          # the page alone

Every run of a study predicts the same test images, and seeds have training images of their own. A draw takes 100 to 600
of these images as those of a tuning, deals them into one or two repetitions of five folds, and lets a run of another
seed predict each fold. What is true is what all seeds have on the images that are left, whose own error is added to
the covariance. In half of the draws no float model may be taken. Draws of a study overlap: they are no new evidence
each. The result goes to results/odds_replay.json and docs/odds.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.tuning_odds import Judged, Tuning, calibration_table, calibrations, judge, row, truths_table
from experiments.methods.scripts.study_evidence import kept_studies, unpacked
from experiments.scripts.evidence import EXPERIMENTS, filled
from peft_vit.base.files import write_atomically
from peft_vit.runs.records.scan import read_records

RESULT = EXPERIMENTS / "tuning" / "results" / "odds_replay.json"
DOCUMENT = EXPERIMENTS / "tuning" / "docs" / "odds.md"
SEED, FOLDS, LEAST_SEEDS = 20261129, 5, 10


@dataclass(frozen=True)
class Predicted:
    """A study's predictions of its test images.

    Attributes:
        right: (C, S, N) of experiments, seeds, images.
        sizes: bytes of each experiment's model.
        floats: positions of those whose backbone keeps float weights.
    """

    right: np.ndarray
    sizes: list[float]
    floats: list[int]


def predicted(name: str) -> Predicted | None:
    """Return what a kept study predicted; None if its seeds do not all test the same images, or are few."""
    with unpacked(name) as folder:
        records = {(one.spec.experiment.name, one.spec.seed): one for one in read_records(folder)}
    experiments, seeds = (list(dict.fromkeys(key[place] for key in records)) for place in (0, 1))
    found = {key: record.predictions for key, record in records.items() if record.predictions is not None}
    images = {tuple(predictions.images) for predictions in found.values()}
    if len(images) != 1 or len(seeds) < LEAST_SEEDS or len(found) < len(experiments) * len(seeds):
        return None
    right = [[np.equal(found[one, seed].labels, found[one, seed].predicted) for seed in seeds] for one in experiments]
    first = [records[one, seeds[0]] for one in experiments]
    sizes = [float(one.bytes.stored_bytes) for one in first if one.bytes is not None]
    return Predicted(
        np.array(right, dtype=float), sizes, [at for at, size in enumerate(sizes) if size > 0.5 * max(sizes)]
    )


def draw(study: Predicted, rng: np.random.Generator) -> Tuning:
    """Return a tuning on some of a study's test images."""
    _, seeds, images = study.right.shape
    repetitions, taken = int(rng.integers(1, 3)), int(rng.integers(100, min(600, int(0.6 * images))))
    shuffled = rng.permutation(images)
    used, left = shuffled[:taken], shuffled[taken:]
    folds = np.array([rng.permutation(taken) % FOLDS for _ in range(repetitions)])  # (R, N)
    run_of = rng.permutation(seeds)[: repetitions * FOLDS].reshape(repetitions, FOLDS)
    scores = np.array([study.right[:, run_of[r][folds[r]], used] for r in range(repetitions)]).swapaxes(0, 1)
    rest = study.right[:, :, left]  # (C, S, rest)
    return Tuning(
        scores,
        folds,
        rest.mean((1, 2)),
        study.sizes,
        study.floats,
        bool(rng.random() < 0.5),
        np.cov(rest.mean(1)) / len(left),
    )


def measure(draws: int) -> dict[str, Any]:
    """Return what became of every study's draws, and how well claims are calibrated over all."""
    judged: dict[str, list[Judged]] = {}
    for place, name in enumerate(kept_studies()):
        if (study := predicted(name)) is not None:
            judged[name] = [judge(draw(study, np.random.default_rng([SEED, place, at]))) for at in range(draws)]
    every = [one for of_study in judged.values() for one in of_study]
    return {"truths": [row(name, of_study) for name, of_study in judged.items()], **calibrations(every)}


def tables(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the page's tables by the names of their marks."""
    yield "odds-studies", truths_table(result, "study")
    yield "odds-calibration", calibration_table(result)


def main() -> None:
    """Draw and write, or only fill the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("draws", type=int, nargs="?", help="of each study")
    if draws := parser.parse_args().draws:
        write_atomically(RESULT, (json.dumps(measure(draws), indent=1) + "\n").encode())
    text = filled(DOCUMENT.read_text(encoding="utf-8"), dict(tables(json.loads(RESULT.read_text(encoding="utf-8")))))
    write_atomically(DOCUMENT, text.encode())


if __name__ == "__main__":
    main()
