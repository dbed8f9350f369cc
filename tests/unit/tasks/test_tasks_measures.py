"""Every measure against scikit-learn, or a slow loop written from its definition."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score

from peft_vit.core.tasks import CLASSIFICATION
from peft_vit.core.tasks.classification import expected_calibration_error, log_softmax

pytestmark = pytest.mark.part("trainer")


def slow_ece(confidence, correct, bins) -> float:
    total = 0.0
    for m in range(1, bins + 1):
        inside = [i for i, c in enumerate(confidence) if (m - 1) / bins < c <= m / bins or (m == 1 and c == 0)]
        if inside:
            gap = np.mean([correct[i] for i in inside]) - np.mean([confidence[i] for i in inside])
            total += len(inside) / len(confidence) * abs(gap)
    return total


@pytest.mark.parametrize(("classes", "decimals"), [(2, 0), (2, 1), (2, 9), (5, 1)])
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_measures_are_scikit_learns(classes: int, decimals: int) -> None:
    rng = np.random.default_rng(classes)
    logits = np.round(2 * rng.normal(size=(200, classes)), decimals).astype(np.float32)  # ties, ever fewer
    labels = rng.choice(np.arange(classes) % 4, 200)  # of the fifth class there is no image
    result = CLASSIFICATION.measure(logits, labels)
    probability = softmax(logits.astype(np.float64), axis=1)
    predicted = probability.argmax(1)
    assert (result.n, result.accuracy) == (200, np.mean(predicted == labels))
    assert result.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, predicted), rel=1e-12)
    assert result.nll == pytest.approx(log_loss(labels, probability, labels=range(classes)), rel=1e-9)
    assert result.ece == pytest.approx(slow_ece(probability.max(1), predicted == labels, 15), rel=1e-9)
    area = roc_auc_score(labels, logits[:, 1].astype(float) - logits[:, 0]) if classes == 2 else None
    assert result.auroc == (area and pytest.approx(area, rel=1e-12))


@pytest.mark.parametrize("bins", [1, 4, 10, 15])
def test_calibration_at_the_edges_of_bins(bins) -> None:
    rng = np.random.default_rng(bins)
    confidence = np.concatenate([rng.random(60), np.arange(bins + 1) / bins, [0.0, 1.0]])  # half of them on an edge
    correct = rng.random(len(confidence)) < 0.6
    expected = slow_ece(confidence, correct, bins)
    assert expected_calibration_error(confidence, correct, bins) == pytest.approx(expected, rel=1e-12)
    assert expected_calibration_error(np.ones(4), np.ones(4, bool)) == 0.0


def test_extreme_logits_and_one_class_stay_finite() -> None:
    logits = np.array([[1e4, -1e4], [-1e4, 1e4], [3e38, 0.0]], np.float32)
    result = CLASSIFICATION.measure(logits, np.array([0, 0, 0]))
    assert np.isfinite(log_softmax(logits.astype(np.float64))).all()
    assert result.auroc is None  # one class only
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.nll == pytest.approx(2e4 / 3)
