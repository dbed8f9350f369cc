"""Loss, class weights and measures of classes: against sums in float64, scikit-learn, torch and timm."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from peft_vit.core.tasks import CLASSIFICATION
from peft_vit.core.tasks.classification import expected_calibration_error, log_softmax

pytestmark = pytest.mark.part("trainer")

LABELS = np.array([0, 0, 0, 0, 0, 0, 1, 1, 2])
LOGITS = np.random.default_rng(3).normal(size=(9, 3))


def class_weights() -> torch.Tensor:
    return torch.tensor(CLASSIFICATION.loss_weights(CLASSIFICATION.counts(LABELS, 3), "balanced"), dtype=torch.float32)


def by_image(weighted: bool) -> np.ndarray:
    """Return -w[y] log softmax(z)[y] of each image, w[c] = n / (classes n_c)."""
    exponentials = np.exp(LOGITS)
    plain = -np.log(exponentials[np.arange(9), LABELS] / exponentials.sum(1))
    return plain * (np.array([9 / (3 * 6), 9 / (3 * 2), 9 / (3 * 1)])[LABELS] if weighted else 1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 9])  # 2 and 4 leave a last batch of one
def test_a_batchs_loss_is_its_weighted_sum_over_its_images(batch_size, weighted) -> None:
    weights = class_weights() if weighted else None
    order = np.random.default_rng(0).permutation(9)
    total = 0.0
    for start in range(0, 9, batch_size):
        rows = order[start : start + batch_size]
        logits = torch.tensor(LOGITS[rows], dtype=torch.float32)
        loss = CLASSIFICATION.loss(logits, torch.tensor(LABELS[rows]), weights)
        assert loss.item() == pytest.approx(by_image(weighted)[rows].mean(), rel=1e-5)
        total += loss.item() * len(rows)
    assert total == pytest.approx(by_image(weighted).sum(), rel=1e-5)  # whatever the batches


def test_effective_weights_are_in_proportion_to_those_of_the_paper() -> None:
    counts = np.array([5000, 500, 20])
    weights = CLASSIFICATION.loss_weights(counts, "effective")
    assert (counts * weights).sum() == pytest.approx(counts.sum())  # over the images they average to 1
    each_once = [sum(0.999**k for k in range(n)) for n in counts]  # of the n-th image 0.999^(n - 1) is new
    assert weights[1:] / weights[0] == pytest.approx(each_once[0] / np.array(each_once[1:]))
    balanced = CLASSIFICATION.loss_weights(counts, "balanced")
    assert weights[2] / weights[0] < balanced[2] / balanced[0]


SHARES = np.random.default_rng(4).dirichlet(np.ones(3), size=9)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_smoothed_labels_and_shares_are_those_of_torch_and_timm(smoothing) -> None:
    logits, labels = torch.tensor(LOGITS), torch.tensor(LABELS)
    loss = CLASSIFICATION.loss(logits, labels, None, smoothing)
    torch.testing.assert_close(loss, nn.CrossEntropyLoss(label_smoothing=smoothing)(logits, labels))
    torch.testing.assert_close(loss, LabelSmoothingCrossEntropy(smoothing)(logits, labels))
    smoothed = torch.tensor((1 - smoothing) * SHARES + smoothing / 3)
    torch.testing.assert_close(
        CLASSIFICATION.loss(logits, torch.tensor(SHARES), None, smoothing), SoftTargetCrossEntropy()(logits, smoothed)
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_each_share_of_a_label_has_the_weight_of_its_class(smoothing) -> None:
    weights = class_weights()
    log_shares = LOGITS - np.log(np.exp(LOGITS).sum(1, keepdims=True))
    for labels, targets in ((torch.tensor(LABELS), np.eye(3)[LABELS]), (torch.tensor(SHARES), SHARES)):
        smoothed = (1 - smoothing) * targets + smoothing / 3
        expected = -(np.array([0.5, 1.5, 3.0]) * smoothed * log_shares).sum() / 9
        loss = CLASSIFICATION.loss(torch.tensor(LOGITS), labels, weights.double(), smoothing)
        assert loss.item() == pytest.approx(expected, rel=1e-9)
    hard = CLASSIFICATION.loss(torch.tensor(LOGITS), torch.tensor(LABELS), weights.double(), smoothing)
    as_torch = nn.CrossEntropyLoss(weights.double(), reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(hard, as_torch(torch.tensor(LOGITS), torch.tensor(LABELS)) / 9)


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
