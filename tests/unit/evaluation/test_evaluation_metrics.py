"""Every measure against scikit-learn, or a slow loop written from its definition."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score

from peft_vit.evaluation import expected_calibration_error, measure
from peft_vit.evaluation.metrics import area_under_roc, balanced_accuracy, log_softmax

pytestmark = pytest.mark.part("trainer")


def slow_ece(confidence, correct, bins) -> float:
    total = 0.0
    for m in range(1, bins + 1):
        inside = [i for i, c in enumerate(confidence) if (m - 1) / bins < c <= m / bins or (m == 1 and c == 0)]
        if inside:
            gap = np.mean([correct[i] for i in inside]) - np.mean([confidence[i] for i in inside])
            total += len(inside) / len(confidence) * abs(gap)
    return total


def pairwise_auroc(score, labels) -> float:
    """Return the share of (positive, negative) pairs in the right order; ties count half."""
    pairs = [(p, n) for p in score[labels == 1] for n in score[labels == 0]]
    return float(np.mean([(p > n) + 0.5 * (p == n) for p, n in pairs]))


@pytest.mark.parametrize("classes", [2, 5])
def test_against_definitions(classes) -> None:
    rng = np.random.default_rng(classes)
    logits = (2 * rng.normal(size=(200, classes))).astype(np.float32)
    logits[:40] = np.round(logits[:40])  # ties
    labels = rng.choice(classes, 200, p=np.linspace(1, 3, classes) / np.linspace(1, 3, classes).sum())
    result = measure(logits, labels)
    exponent = np.exp(logits.astype(np.float64))
    probability = exponent / exponent.sum(1, keepdims=True)
    predicted = probability.argmax(1)
    assert result.n == 200
    assert result.accuracy == np.mean(predicted == labels)
    recalls = [np.mean(predicted[labels == k] == k) for k in range(classes)]
    assert result.balanced_accuracy == pytest.approx(np.mean(recalls), rel=1e-12)
    assert result.nll == pytest.approx(log_loss(labels, probability, labels=range(classes)), rel=1e-9)
    expected = slow_ece(probability.max(1), predicted == labels, 15)
    assert result.ece == pytest.approx(expected, rel=1e-9)
    if classes == 2:
        assert result.auroc == pytest.approx(
            pairwise_auroc(logits[:, 1].astype(float) - logits[:, 0], labels), rel=1e-9
        )
    else:
        assert result.auroc is None


@pytest.mark.parametrize("bins", [1, 4, 10, 15])
def test_calibration_at_the_edges_of_bins(bins) -> None:
    rng = np.random.default_rng(bins)
    confidence = np.concatenate([rng.random(60), np.arange(bins + 1) / bins, [0.0, 1.0]])  # half of them on an edge
    correct = rng.random(len(confidence)) < 0.6
    expected = slow_ece(confidence, correct, bins)
    assert expected_calibration_error(confidence, correct, bins) == pytest.approx(expected, rel=1e-12)
    assert expected_calibration_error(np.ones(4), np.ones(4, bool)) == 0.0


def test_a_confidence_on_an_edge_belongs_to_the_bin_below() -> None:
    confidence, correct = np.array([0.5, 0.4, 0.6]), np.array([True, False, False])
    assert expected_calibration_error(confidence, correct, 2) == pytest.approx((abs(1 - 0.9) + 0.6) / 3)


def test_extreme_logits_and_one_class_stay_finite() -> None:
    logits = np.array([[1e4, -1e4], [-1e4, 1e4], [3e38, 0.0]], np.float32)
    result = measure(logits, np.array([0, 0, 0]))
    assert np.isfinite(log_softmax(logits.astype(np.float64))).all()
    assert result.auroc is None  # one class only
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.nll == pytest.approx(2e4 / 3)


def test_balanced_accuracy_is_over_the_classes_that_have_an_image() -> None:
    labels, predicted = np.array([0, 0, 2, 2, 2, 5]), np.array([0, 1, 2, 2, 4, 0])  # of 1 and 4 there is none
    with pytest.warns(UserWarning, match="not in y_true"):
        expected = balanced_accuracy_score(labels, predicted)
    assert balanced_accuracy(predicted, labels) == expected == pytest.approx((1 / 2 + 2 / 3) / 3)


@pytest.mark.parametrize("seed", range(5))
def test_the_area_under_the_curve_is_scikit_learns(seed) -> None:
    rng = np.random.default_rng(seed)
    labels = (rng.random(300) < 0.1 + 0.2 * seed).astype(int)
    scores = np.round(labels + rng.normal(size=300), seed)  # whole numbers, and ever fewer ties
    assert area_under_roc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), rel=1e-14)
