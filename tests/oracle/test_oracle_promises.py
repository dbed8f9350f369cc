"""Sets of labels and intervals of numbers, against crepes and MAPIE, and how often they hold on images to come."""

import numpy as np
import pytest
from crepes import ConformalRegressor
from mapie.risk_control import MultiLabelClassificationController

from peft_vit.base.statistics import ErrorScale, conformal_quantile, error_scale, recall_threshold


def labelled(rng, images: int):
    """Return probabilities and labels of images, (N, 4) each, of which a few have no label."""
    p = rng.beta(0.6, 1.2, (images, 4))
    return p, (rng.random((images, 4)) < p).astype(float)


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_the_threshold_of_label_sets_is_mapies(coverage) -> None:
    p, labels = labelled(np.random.default_rng(1), 70)
    own, grid = labels.any(1), np.arange(0, 1, 0.001)
    theirs = MultiLabelClassificationController(lambda x: x, target_level=coverage, predict_params=grid)
    theirs.calibrate(p[own], labels[own])
    assert 0 <= recall_threshold(p, labels, coverage) - float(theirs.best_predict_param[0]) <= 0.001


def test_label_sets_hold_on_images_to_come() -> None:
    rng, held = np.random.default_rng(2), []
    for _ in range(400):
        p, labels = labelled(rng, 40)
        least = recall_threshold(p, labels, 0.9)
        q, truth = labelled(rng, 200)
        own = truth.any(1)
        held.append(float((((q >= least) & (truth == 1)).sum(1)[own] / truth.sum(1)[own]).mean()))
    assert np.mean(held) > 0.9 - 2 * np.std(held) / 20
    assert np.mean(held) < 0.94  # and no more than it has to


def test_label_sets_need_enough_images_and_count_each_once() -> None:
    p, labels = labelled(np.random.default_rng(3), 60)
    some = np.flatnonzero(labels.any(1))[:9]
    assert np.isfinite(recall_threshold(p[some], labels[some], 0.9))  # 1 / (9 + 1) <= 0.1
    assert recall_threshold(p[some[:8]], labels[some[:8]], 0.9) == -np.inf
    twice = np.concatenate([p, p]), np.concatenate([labels, labels]), 0.9
    assert recall_threshold(*twice, np.tile(np.arange(60), 2)) == recall_threshold(p, labels, 0.9)
    unknown = np.where(labels == 0, np.nan, labels)
    assert recall_threshold(p, unknown, 0.9) == recall_threshold(p, labels, 0.9)


@pytest.mark.parametrize("coverage", [0.8, 0.9])
def test_intervals_with_a_scale_are_crepes(coverage) -> None:
    rng = np.random.default_rng(4)
    predicted = rng.uniform(0, 4, 80)
    truth = predicted + rng.normal(size=80) * (0.2 + predicted)
    scale, quotients = error_scale(predicted, truth)
    further = rng.uniform(-1, 5, 20)  # also beyond
    own = np.abs(truth - predicted) / quotients
    theirs = ConformalRegressor().fit(truth - predicted, sigmas=own)
    low, high = theirs.predict_int(further, sigmas=scale.of(further), confidence=coverage).T
    reach = conformal_quantile(quotients, coverage) * scale.of(further)
    assert low == pytest.approx(further - reach)
    assert high == pytest.approx(further + reach)


def test_a_scale_is_a_kernels_mean_without_ones_own_image() -> None:
    rng = np.random.default_rng(5)
    predicted, truth = rng.normal(size=30), rng.normal(size=30)
    errors, width = np.abs(predicted - truth), predicted.std() / 2
    scale, quotients = error_scale(predicted, truth)
    at = np.linspace(predicted.min(), predicted.max(), 17)

    def by_hand(left_out) -> ErrorScale:
        rest = [i for i in range(30) if i != left_out]
        sizes = []
        for y in at:
            near = [float(np.exp(-(((y - predicted[i]) / width) ** 2) / 2)) for i in rest]
            total = sum(k * errors[i] for k, i in zip(near, rest, strict=True)) + 10 * errors[rest].mean()
            sizes.append(total / (sum(near) + 10))
        return ErrorScale(tuple(at), tuple(sizes))

    assert scale.sizes == pytest.approx(by_hand(None).sizes)
    expected = [errors[i] / float(by_hand(i).of(predicted[i])) for i in range(30)]
    assert quotients == pytest.approx(expected)
    doubled = [np.tile(values, 2) for values in (predicted, truth, np.arange(30))]
    again, _ = error_scale(*doubled)
    assert again.sizes == pytest.approx(scale.sizes)  # an image that was held out twice counts once
    one, _ = error_scale([2.0, 2.0], [1.0, 4.0])
    assert one == ErrorScale((2.0,), (1.5,))  # all that is predicted is the same


@pytest.mark.parametrize("images", [20, 40])
def test_intervals_hold_on_images_to_come_and_grow_where_errors_do(images) -> None:
    rng, held, wide = np.random.default_rng(6), [], []
    for _ in range(300):
        predicted = rng.uniform(0, 1, images + 200)
        errors = rng.normal(size=images + 200) * (0.1 + predicted)
        scale, quotients = error_scale(predicted[:images], predicted[:images] + errors[:images])
        reach = conformal_quantile(quotients, 0.9) * scale.of(predicted[images:])
        held.append(float((np.abs(errors[images:]) <= reach).mean()))
        wide.append(reach[predicted[images:].argmax()] / reach[predicted[images:].argmin()])
    assert 0.89 < np.mean(held) < 0.93
    assert np.mean(wide) > 1.3
