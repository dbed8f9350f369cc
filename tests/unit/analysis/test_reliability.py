"""Calibration against plain loops, scikit-learn and planted confidences."""

from itertools import pairwise
from typing import Any

import numpy as np
import planted
import pytest
from peft_vit.lab.analysis.reliability import MEASURES, OVERCONFIDENCE, calibration
from sklearn.metrics import brier_score_loss

from peft_vit.base.statistics.reliability import Bin, calibration_error, equal_count_bins, equal_width_bins
from peft_vit.core.records import Predictions, RunRecord
from peft_vit.core.tasks.classification import expected_calibration_error

EXPERIMENTS = planted.experiments()


def drawn(n: int, seed: int, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p = rng.uniform(0.3, 1.0, n)
    if ties:
        p = np.round(p, 1)
    return p, rng.random(n) < p**2


def checked(bins: tuple[Bin, ...], groups: list[list[tuple[float, bool]]]) -> None:
    """Hold bins and their error against a plain loop: the gap of each group, weighted with its share."""
    n, error = sum(map(len, groups)), 0.0
    assert [bin_.count for bin_ in bins] == [len(group) for group in groups]
    for bin_, group in zip(bins, groups, strict=True):
        if not group:
            assert (bin_.confidence, bin_.accuracy) == (None, None)
            continue
        confidence, accuracy = (sum(values) / len(group) for values in zip(*group, strict=True))
        assert (bin_.confidence, bin_.accuracy) == pytest.approx((confidence, accuracy), abs=1e-12)
        assert bin_.low - 1e-12 <= confidence <= bin_.high + 1e-12
        error += len(group) / n * abs(accuracy - confidence)
    assert calibration_error(bins) == pytest.approx(error, abs=1e-12)


def test_equal_width_bins_by_a_plain_loop_and_their_error_is_the_one_of_the_records() -> None:
    p, hit = drawn(500, 1, ties=True)
    groups = [[pair for pair in zip(p, hit, strict=True) if m / 15 < pair[0] <= (m + 1) / 15] for m in range(15)]
    checked(equal_width_bins(p, hit), groups)
    p, hit = drawn(1000, 2)
    assert calibration_error(equal_width_bins(p, hit)) == pytest.approx(expected_calibration_error(p, hit), abs=1e-12)


def test_equal_count_bins_by_sorting() -> None:
    p, hit = drawn(300, 3)
    pairs = sorted(zip(p.tolist(), hit.tolist(), strict=True))
    bins = equal_count_bins(p, hit)
    checked(bins, [pairs[20 * m : 20 * (m + 1)] for m in range(15)])
    assert (bins[0].low, bins[-1].high) == (p.min(), p.max())


def test_equal_confidences_stay_in_one_bin_whatever_the_order() -> None:
    p, hit = drawn(200, 4, ties=True)
    bins = equal_count_bins(p, hit, 5)
    order = np.random.default_rng(0).permutation(200)
    assert equal_count_bins(p[order], hit[order], 5) == bins
    assert all(left.high < right.low for left, right in pairwise(bins))


def test_brier_equals_scikit_learn_for_two_classes() -> None:
    rng = np.random.default_rng(5)
    positive = rng.random(400)  # probability of class 1
    label = rng.random(400) < positive
    predicted = positive > 0.5
    confidence = np.maximum(positive, 1 - positive)
    columns = {"labels": label.tolist(), "predicted": predicted.tolist(), "probability": confidence.tolist()}
    (run,) = planted.study_of([recorded("lora_r8", 0, Predictions(images=list(range(400)), **columns))]).runs
    assert MEASURES["brier"](run) == pytest.approx(brier_score_loss(label, positive), abs=1e-12)


def predictions(right: int, wrong: int, confidence: float) -> Predictions:
    n = right + wrong
    return Predictions(
        images=list(range(n)), labels=[0] * n, predicted=[0] * right + [1] * wrong, probability=[confidence] * n
    )


def recorded(name: str, seed: int, predicted: Predictions | None, **test: float) -> RunRecord:
    changes: dict[str, Any] = {"predictions": predicted}
    if test:
        changes["test"] = planted.metrics(0.8).model_copy(update=test)
    return planted.record(EXPERIMENTS[name], seed, 0.8, changes=changes)


def test_planted_overconfidence_is_found() -> None:
    # 7 of 10 right at confidence 0.9, then 8 of 10: accuracy 0.75 over both.
    records = [recorded("lora_r8", 0, predictions(7, 3, 0.9)), recorded("lora_r8", 1, predictions(8, 2, 0.9))]
    (pooled,) = calibration(planted.study_of(records))
    measured = (OVERCONFIDENCE, MEASURES["adaptive_ece"], MEASURES["brier"])
    means = [np.mean([of(run) for run in planted.study_of(records).runs]) for of in measured]
    # (7 * 0.01 + 3 * 0.81) / 10 = 0.25; (8 * 0.01 + 2 * 0.81) / 10 = 0.17
    assert means == pytest.approx([0.15, 0.15, 0.21])
    (filled,) = [b for b in pooled.bins if b.count]
    assert (filled.count, filled.accuracy) == (20, 0.75)
    assert filled.confidence == pytest.approx(0.9)
    assert (pooled.seeds, pooled.without) == ((0, 1), ())


def test_records_without_predictions_are_named() -> None:
    empty = Predictions(images=[], labels=[], predicted=[], probability=[])
    some = [recorded("lora_r8", seed, of) for seed, of in enumerate((None, empty, predictions(1, 1, 0.5)))]
    (row,) = calibration(planted.study_of(some))
    assert (row.seeds, row.without) == ((2,), (0, 1))
    study = planted.study_of([*some[:2], *(recorded("lora_r2", seed, None) for seed in range(2))])
    none = calibration(study)[-1]
    assert (MEASURES["brier"](study.runs[0]), none.bins, none.without) == (None, (), (0, 1))
