"""Losses, heads, measures and decisions of several labels and of numbers, against scikit-learn and torch."""

import numpy as np
import pytest
import torch
from scipy.stats import beta, spearmanr
from sklearn import metrics as oracle
from sklearn.linear_model import LogisticRegression, Ridge
from timm.loss import AsymmetricLossMultiLabel
from torch.nn import functional as F

from peft_vit.base.errors import UserError
from peft_vit.base.statistics import TemperaturePrior, bootstrap_interval
from peft_vit.core.records import Decision, Predictions
from peft_vit.core.tasks import MULTILABEL, REGRESSION
from peft_vit.core.tasks.multilabel import average_precision
from peft_vit.core.tasks.regression import _spearman
from peft_vit.deploy.presentation import ManyLabels, Numbers

pytestmark = pytest.mark.part("trainer")
RNG = np.random.default_rng(0)
OUTPUTS = np.round(2 * RNG.normal(size=(60, 3)), 1)  # with ties
LABELS = (RNG.random((60, 3)) < (0.5, 0.2, 0.4)).astype(float)
UNKNOWN = np.where(RNG.random((60, 3)) < 0.2, np.nan, LABELS)
PRIOR = TemperaturePrior(median=1.5, spread=0.35)
NUMBERS = RNG.normal((10, 200), (2, 30), (60, 2))
FITTED = REGRESSION.fitted(NUMBERS)


# --- several labels ---------------------------------------------------------------------------------------------------


def test_measures_of_labels_are_scikit_learns() -> None:
    decision = MULTILABEL.decide(OUTPUTS, LABELS, PRIOR)
    told = MULTILABEL.predicted(OUTPUTS, decision) >= decision.thresholds
    measured = MULTILABEL.measure(OUTPUTS, LABELS, decision)
    assert measured.more == pytest.approx(
        {
            "map": oracle.average_precision_score(LABELS, OUTPUTS),
            "auroc": oracle.roc_auc_score(LABELS, OUTPUTS),
            "f1_micro": oracle.f1_score(LABELS, told, average="micro"),
            "f1_macro": oracle.f1_score(LABELS, told, average="macro"),
            "exact_match": oracle.accuracy_score(LABELS, told),
        }
    )
    nll = F.binary_cross_entropy_with_logits(*map(torch.tensor, (OUTPUTS / decision.temperature, LABELS)))
    assert measured.nll == pytest.approx(3 * float(nll))
    weights = RNG.integers(0, 3, (2, 60)).astype(float)  # as the bootstrap draws images
    expected = [oracle.average_precision_score(LABELS[:, 0], OUTPUTS[:, 0], sample_weight=own) for own in weights]
    assert average_precision(OUTPUTS[:, 0], LABELS[:, 0] == 1, weights) == pytest.approx(expected)


def test_f1_is_at_thresholds_of_validation_also_in_its_interval() -> None:
    decision = MULTILABEL.decide(OUTPUTS, UNKNOWN, PRIOR)
    scores, known = MULTILABEL.predicted(OUTPUTS, decision), ~np.isnan(UNKNOWN)
    told = scores >= decision.thresholds
    measured = MULTILABEL.measure(OUTPUTS, UNKNOWN, decision).more
    assert measured["f1_micro"] == pytest.approx(oracle.f1_score(UNKNOWN[known], told[known]))
    each = [oracle.f1_score(y[k], said[k]) for y, said, k in zip(UNKNOWN.T, told.T, known.T, strict=True)]
    assert measured["f1_macro"] == pytest.approx(np.mean(each))
    assert MULTILABEL.measure(OUTPUTS / decision.temperature, UNKNOWN).more == pytest.approx(measured)  # chosen there
    for name in ("f1_macro", "f1_micro"):
        metric = MULTILABEL.metric(name)
        interval = metric.interval(UNKNOWN, scores, decision.thresholds)
        assert interval.estimate == pytest.approx(measured[name])
        assert interval.low < interval.estimate < interval.high
        gain = metric.gain(UNKNOWN, scores, scores, (1.1,) * 3, decision.thresholds)  # nothing was told before
        assert gain.estimate == pytest.approx(measured[name])


def test_the_asymmetric_loss_is_timms() -> None:
    outputs, weights = 2 * torch.tensor(OUTPUTS), torch.tensor([0.5, 1.0, 1.5])
    timms = AsymmetricLossMultiLabel(gamma_neg=4, gamma_pos=0, clip=0.05)
    loss = MULTILABEL.loss(outputs, torch.tensor(LABELS), None, name="asymmetric")
    assert loss.item() == pytest.approx(timms(outputs, torch.tensor(LABELS)).item())
    columns = [timms(outputs[:, [k]], torch.tensor(LABELS[:, [k]])).item() for k in range(3)]
    weighted = MULTILABEL.loss(outputs, torch.tensor(LABELS), weights, name="asymmetric")
    assert weighted.item() == pytest.approx(np.dot(columns, weights.numpy()))
    known = ~np.isnan(UNKNOWN)
    expected = timms(outputs[known][:, None], torch.tensor(UNKNOWN[known])[:, None]).item()
    loss = MULTILABEL.loss(outputs, torch.tensor(UNKNOWN), None, name="asymmetric")
    assert loss.item() == pytest.approx(expected * known.sum() / 60)
    far = torch.tensor([[90.0, -90.0]], requires_grad=True)  # absent and surely told, there and surely not
    MULTILABEL.loss(far, torch.tensor([[0.0, 1.0]]), None, name="asymmetric").backward()
    assert far.grad.isfinite().all()


def test_what_is_not_known_counts_nowhere() -> None:
    known = ~np.isnan(UNKNOWN)
    each = [oracle.average_precision_score(y[k], z[k]) for y, z, k in zip(UNKNOWN.T, OUTPUTS.T, known.T, strict=True)]
    assert MULTILABEL.measure(OUTPUTS, UNKNOWN).more["map"] == pytest.approx(np.mean(each))
    outputs = torch.tensor(OUTPUTS, requires_grad=True)
    loss = MULTILABEL.loss(outputs, torch.tensor(UNKNOWN), None)
    loss.backward()
    expected = F.binary_cross_entropy_with_logits(
        torch.tensor(OUTPUTS[known]), torch.tensor(UNKNOWN[known]), reduction="sum"
    )
    assert loss.item() == pytest.approx(float(expected) / 60)
    assert not outputs.grad.numpy()[~known].any()
    outputs = outputs.detach()
    parts = [
        MULTILABEL.loss(outputs[rows], torch.tensor(UNKNOWN[rows]), None) * len(rows)
        for rows in (range(7), range(7, 60))
    ]
    assert sum(map(float, parts)) / 60 == pytest.approx(loss.item())  # whatever the micro-batches
    only = UNKNOWN.copy()
    only[:, 1] = np.where(np.isnan(only[:, 1]), np.nan, 0.0)
    assert np.isfinite(MULTILABEL.measure(OUTPUTS, only).more["map"])  # a label that no image of a split has


def test_a_head_is_a_logistic_regression_a_label() -> None:
    z = RNG.normal(size=(60, 4))
    labels = UNKNOWN.copy()
    labels[labels[:, 2] == 1, 2] = np.nan  # of the third only that it is not there
    ((weight, bias),) = MULTILABEL.linear_heads(z, labels, [0.1], np.ones(60))
    for k in (0, 1):
        known = ~np.isnan(labels[:, k])
        own = LogisticRegression(C=1 / (0.1 * 60), tol=1e-9, max_iter=9999).fit(z[known], labels[known, k])
        assert weight[k] == pytest.approx(own.coef_[0], abs=1e-4)
        assert bias[k] == pytest.approx(own.intercept_[0], abs=1e-4)
    assert not weight[2].any()
    assert bias[2] < -2


def test_thresholds_have_the_largest_f1() -> None:
    decision = MULTILABEL.decide(OUTPUTS, UNKNOWN, PRIOR)
    scores = MULTILABEL.predicted(OUTPUTS, decision)
    for k, threshold in enumerate(decision.thresholds):
        known = ~np.isnan(UNKNOWN[:, k])
        truth, own = UNKNOWN[known, k], scores[known, k]
        best = max(oracle.f1_score(truth, own >= level) for level in own)
        assert oracle.f1_score(truth, own >= threshold) == pytest.approx(best)
    assert MULTILABEL.decide(OUTPUTS[:0], UNKNOWN[:0], PRIOR).thresholds == (0.5,) * 3
    predictions = [ManyLabels().prediction(row, ["a", "b", "c"], decision, None, 2) for row in OUTPUTS[:2]]
    assert [dict(prediction.labels).keys() for prediction in predictions] == [
        {name for name, p, least in zip("abc", row, decision.thresholds, strict=True) if p >= least}
        for row in scores[:2]
    ]


def test_sets_hold_an_images_labels_as_often_as_asked() -> None:
    decision = MULTILABEL.decide(OUTPUTS, UNKNOWN, PRIOR)
    scores, there = MULTILABEL.predicted(OUTPUTS, decision), UNKNOWN == 1
    held, sizes = MULTILABEL.covered(decision, OUTPUTS, UNKNOWN)
    own = there.any(1)
    inside = scores[own] >= decision.threshold(0.9)[0]
    assert held[0.9] == pytest.approx(np.mean([row[true].mean() for row, true in zip(inside, there[own], strict=True)]))
    assert sizes[0.9] == pytest.approx(inside.sum(1).mean())
    assert sizes[0.8] < sizes[0.9] < sizes[0.95]
    predictions = [ManyLabels().prediction(row, ["a", "b", "c"], decision, 0.9, 1) for row in OUTPUTS[own]]
    assert [len(prediction.classes) for prediction in predictions] == inside.sum(1).tolist()
    assert ManyLabels().prediction(OUTPUTS[own][0], ["a", "b", "c"], decision, None, 1).classes == ()
    cells = ManyLabels().cells(predictions[0], True)
    assert list(cells) == ["labels", "class", "probability", "set"]
    assert MULTILABEL.covered(decision, OUTPUTS, np.zeros_like(LABELS)) == ({}, {})  # no image has a label


def test_rare_labels_weigh_more_and_a_sure_head_is_softened() -> None:
    weights = MULTILABEL.loss_weights(np.array([1000, 10, 100]), "effective")
    assert weights.mean() == pytest.approx(1)
    assert weights[1] / weights[0] == pytest.approx((1 - 0.999**1000) / (1 - 0.999**10))
    assert MULTILABEL.loss_weights(np.array([1000, 10, 100]), "balanced") == pytest.approx(
        3 * np.array([1, 100, 10]) / 111
    )
    sure = torch.tensor(40 * (LABELS - 0.5))
    factor = MULTILABEL.training_temperature(sure, torch.tensor(LABELS))
    assert float(MULTILABEL.loss(sure / factor, torch.tensor(LABELS), None)) > 0.5
    assert MULTILABEL.temperature(sure / 8, torch.tensor(LABELS)) < 1


def test_the_metric_that_decides_has_an_interval_and_a_paired_gain() -> None:
    metric = MULTILABEL.deciding(np.array([3, 3, 3]))
    records = MULTILABEL.predictions(OUTPUTS, UNKNOWN, np.arange(60))
    again = Predictions.model_validate_json(records.model_dump_json())
    scores = MULTILABEL.predicted(OUTPUTS)
    interval = metric.interval(again.labels, again.predicted)
    assert interval.estimate == pytest.approx(MULTILABEL.measure(OUTPUTS, UNKNOWN).more["map"])
    assert interval.low < interval.estimate < interval.high
    gain = metric.gain(UNKNOWN, scores, np.nan_to_num(UNKNOWN))
    assert gain.estimate == pytest.approx(1 - interval.estimate)
    assert gain.low > 0
    same = metric.gain(UNKNOWN, scores, scores)  # as of shares of right images, other images may tell them apart
    assert (same.low, same.estimate, same.high) == pytest.approx((0.05 ** (1 / 60) - 1, 0, 1 - 0.05 ** (1 / 60)))


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_measures_of_numbers_are_scikit_learns() -> None:
    one = REGRESSION.fitted(NUMBERS[:, :1])
    outputs = (NUMBERS[:, :1] - 10) / 2 + 0.5 * RNG.normal(size=(60, 1))
    predicted = one.predicted(outputs)[:, 0]
    measured, truth = one.measure(outputs, NUMBERS[:, :1]), NUMBERS[:, 0]
    assert {name: measured.more[name] for name in ("mae", "rmse", "r2")} == pytest.approx(
        {
            "mae": oracle.mean_absolute_error(truth, predicted),
            "rmse": oracle.root_mean_squared_error(truth, predicted),
            "r2": oracle.r2_score(truth, predicted),
        }
    )
    ranked = one.measure(np.round(outputs), NUMBERS[:, :1])  # with ties
    expected = spearmanr(truth, one.predicted(np.round(outputs))[:, 0]).statistic
    assert ranked.more["spearman"] == pytest.approx(expected)
    assert one.metric("spearman").interval(NUMBERS[:, :1], one.predicted(np.round(outputs))).estimate == pytest.approx(
        expected
    )
    drawn = RNG.integers(0, 3, (1, 60)).astype(float)
    again = np.repeat(np.arange(60), drawn[0].astype(int))  # as often as the bootstrap draws them
    of_drawn = _spearman(NUMBERS[:, :1], np.round(outputs), drawn)[0]
    assert of_drawn == pytest.approx(spearmanr(truth[again], np.round(outputs)[again, 0]).statistic)
    metric = one.metric("mae")
    assert metric.sign == -1
    assert metric.quality(measured) > metric.quality(one.measure(np.zeros((60, 1)), NUMBERS[:, :1]))
    bounds = metric.interval(NUMBERS[:, :1], one.predicted(outputs))
    assert bounds.low < measured.more["mae"] < bounds.high


def test_the_loss_is_hubers_on_standardized_numbers() -> None:
    outputs = torch.tensor(3 * RNG.normal(size=(60, 2)))
    targets = torch.tensor((NUMBERS - NUMBERS.mean(0)) / NUMBERS.std(0))
    loss = FITTED.loss(outputs, torch.tensor(NUMBERS), None)
    assert loss.item() == pytest.approx(2 * F.huber_loss(outputs, targets).item())
    assert FITTED.losses(outputs, torch.tensor(NUMBERS)).mean().item() == pytest.approx(
        F.mse_loss(outputs, targets).item()
    )
    mse, quantile = (FITTED.loss(outputs, torch.tensor(NUMBERS), None, name=name) for name in ("mse", "quantile"))
    assert mse.item() == pytest.approx(F.mse_loss(outputs, targets).item())  # of two numbers, halved
    pinball = 2 * oracle.mean_pinball_loss(targets.numpy(), outputs.numpy(), alpha=0.5)
    assert quantile.item() == pytest.approx(pinball)
    assert FITTED.predicted(targets.numpy()) == pytest.approx(NUMBERS)


STRENGTHS = (1.0, 0.1, 0.001)


@pytest.mark.parametrize("width", [4, 90])  # more features than images, too
def test_images_of_a_group_are_left_out_together_and_weights_count(width) -> None:
    """As fits without each group do it, one after the other."""
    z, weights = RNG.normal(size=(60, width)) + 3, RNG.uniform(0.2, 3, 60)
    groups = np.repeat(np.arange(25), [1, 2, 3, 4, 2] * 5)
    order = RNG.permutation(60)
    z, groups = z[order], groups[order]
    targets = (NUMBERS - NUMBERS.mean(0)) / NUMBERS.std(0)
    for l2, outputs in zip(STRENGTHS, FITTED.held_out_outputs(z, NUMBERS, groups, STRENGTHS, weights), strict=True):
        for group in range(25):
            out = groups == group
            fit = Ridge(alpha=l2 * weights.sum()).fit(z[~out], targets[~out], sample_weight=weights[~out])
            assert outputs[out] == pytest.approx(fit.predict(z[out]))
    for l2, (weight, bias) in zip(STRENGTHS, FITTED.linear_heads(z, NUMBERS, STRENGTHS, weights), strict=True):
        fit = Ridge(alpha=l2 * weights.sum()).fit(z, targets, sample_weight=weights)
        assert weight == pytest.approx(fit.coef_)
        assert bias == pytest.approx(fit.intercept_)


def test_intervals_of_numbers_are_where_scale_and_quantile_put_them() -> None:
    outputs = (NUMBERS - NUMBERS.mean(0)) / NUMBERS.std(0) + 0.3 * RNG.normal(size=(60, 2))
    decision = FITTED.decide(outputs, NUMBERS, PRIOR)
    predicted = FITTED.predicted(outputs)
    held, widths = FITTED.covered(decision, outputs, NUMBERS)
    assert 0.85 < held[0.9] < 0.96
    assert widths[0.8] < widths[0.9] < widths[0.95]
    prediction = Numbers().prediction(outputs[0], ["a", "b"], decision, None, 1)
    value, low, high = prediction.numbers["b"]
    scale = np.interp(predicted[0, 1], decision.scale_at[1], decision.scale[1])
    assert (value, value - low) == pytest.approx((predicted[0, 1], decision.threshold(0.9)[1] * scale))
    assert high - value == pytest.approx(value - low)
    cells = Numbers().cells(prediction, False)
    assert list(cells) == ["a", "a_low", "a_high", "b", "b_low", "b_high"]
    with pytest.raises(UserError, match="coverage: the model has thresholds of these shares"):
        decision.threshold(0.99)
    again = Decision.model_validate_json(decision.model_dump_json())
    one, other = (Numbers().prediction(outputs[0], ["a", "b"], meaning, 0.8, 1) for meaning in (again, decision))
    assert one.numbers == other.numbers
    none = FITTED.decide(outputs[:0], NUMBERS[:0], PRIOR)
    assert Numbers().prediction(outputs[0], ["a", "b"], none, None, 1).numbers.keys() == {"a", "b"}


def test_splits_hold_each_part_of_the_numbers_range() -> None:
    strata = REGRESSION.strata(NUMBERS[:, :1])
    assert np.bincount(strata).tolist() == [6] * 10
    assert NUMBERS[strata == 9, 0].min() > NUMBERS[strata == 0, 0].max()
    assert REGRESSION.strata(NUMBERS).shape == (60, 20)


def test_a_bootstrap_interval_of_a_mean_is_students() -> None:
    values = RNG.normal(5, 2, 400)
    bounds = bootstrap_interval(400, lambda weights: weights @ values / weights.sum(1))
    half = 1.96 * values.std() / 20
    assert bounds.estimate == pytest.approx(values.mean())
    assert (bounds.low, bounds.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05)
    assert bootstrap_interval(1, lambda weights: weights.sum(1)).low is None


def test_images_that_are_ranked_perfectly_leave_room_below() -> None:
    labels = np.repeat([[1.0, 0.0], [0.0, 1.0]], 6, axis=0)  # six images have each label, and six have not
    unseen = 1 - beta.ppf(0.05, 6, 1)  # of six pairs none is the wrong way round: Clopper and Pearson's limit
    for name in ("map", "auroc", "f1_macro", "f1_micro"):
        bounds = MULTILABEL.metrics[name].interval(labels, labels)
        assert (bounds.estimate, bounds.high) == (1.0, 1.0)
        assert bounds.low == pytest.approx(1 - unseen)
    nothing = MULTILABEL.metrics["auroc"].interval(labels, 1 - labels)
    assert (nothing.estimate, nothing.low, nothing.high) == pytest.approx((0.0, 0.0, unseen))
    rare = MULTILABEL.metrics["map"].interval(labels[:7], labels[:7])  # one image has the second label
    assert rare.low == pytest.approx(0.05)
    gain = MULTILABEL.metrics["map"].gain(labels, labels, labels)
    assert (gain.low, gain.high) == pytest.approx((-(1 - 0.05 ** (1 / 12)), 1 - 0.05 ** (1 / 12)))
    numbers = np.arange(12.0)[:, None]
    ranked = REGRESSION.metrics["spearman"].interval(numbers, 2 * numbers)
    assert (ranked.estimate, ranked.low, ranked.reason) == (1.0, None, "all resamples agree")


@pytest.mark.parametrize(("apart", "name"), [(1.5, "map"), (1.5, "auroc"), (2.5, "map"), (2.5, "auroc")])
def test_a_bound_of_perfect_rankings_is_wrong_in_at_most_a_twentieth(apart: float, name: str) -> None:
    rng, labels = np.random.default_rng(0), np.repeat([1.0, 0.0], 6)[:, None]
    truth = (
        MULTILABEL.metrics[name]
        .interval(np.repeat([[1.0], [0.0]], 4000, 0), rng.normal(size=(8000, 1)) + np.repeat([[apart], [0.0]], 4000, 0))
        .estimate
    )
    scores = rng.normal(size=(4000, 12, 1)) + apart * labels
    perfect = scores[:, :6].min((1, 2)) > scores[:, 6:].max((1, 2))
    low = MULTILABEL.metrics[name].interval(labels, labels).low
    assert low is not None
    assert perfect.mean() * (truth < low) <= 0.05
    assert truth < 1.0  # which [1, 1] would have missed whenever the ranking is perfect
