"""The replay of kept studies as tunings: the document says what the result holds, and draws are what they say."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments.scripts import evidence
from experiments.tuning.scripts import odds_replay

pytestmark = pytest.mark.part("analyzer")


def test_the_document_says_what_the_result_holds() -> None:
    text, result = odds_replay.DOCUMENT.read_text(), json.loads(odds_replay.RESULT.read_text())
    assert "<!-- odds-calibration -->" in text
    assert evidence.filled(text, dict(odds_replay.tables(result))) == text, (
        "run experiments/tuning/scripts/odds_replay.py"
    )


def test_each_image_is_predicted_by_the_run_of_its_fold_and_truth_comes_from_others() -> None:
    seeds, images = 12, 400
    right = np.zeros((2, seeds, images))
    right[0] = np.arange(seeds)[:, None]  # tells which seed predicted
    right[1, :, ::2] = 1
    tuning = odds_replay.draw(odds_replay.Predicted(right, [9.0, 1.0], [0]), np.random.default_rng(0))
    runs = {
        (r, fold): set(tuning.scores[0, r][tuning.folds[r] == fold])
        for r in range(len(tuning.folds))
        for fold in range(5)
    }
    assert all(len(of_run) == 1 for of_run in runs.values())
    assert len(set.union(*runs.values())) == 5 * len(tuning.folds)
    taken = tuning.scores.shape[2]
    assert tuning.truth[0] == pytest.approx(np.arange(seeds).mean())
    assert tuning.truth[1] * (images - taken) + tuning.scores[1, 0].sum() == pytest.approx(images / 2)
