"""Class weights count an image the same in every batch: against sums in float64."""

import numpy as np
import pytest
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from peft_vit.core.tasks import CLASSIFICATION

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


def test_weights_average_to_one_over_the_training_images() -> None:
    assert class_weights().double().numpy()[LABELS].mean() == pytest.approx(1.0)


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
