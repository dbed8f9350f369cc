"""What was measured, what follows for the truth, and which model is taken; by a second route, or in a plain case."""

from __future__ import annotations

import numpy as np
import pytest
import tuning_odds
from scipy import stats

from peft_vit.base.statistics import odds
from peft_vit.base.statistics.odds import FoldMeans, choose_model, means_of_images, posterior

RIGHT = (0.8, 0.8, 0.6)  # of three candidates; those that fail together do so on the same images


def drawn(seed: int, images: int = 200, repetitions: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Return scores (3, R, N) and folds (R, N)."""
    rng = np.random.default_rng(seed)
    hard = rng.random(images)
    scores = np.array([hard + 0.1 * rng.standard_normal((repetitions, images)) < right for right in RIGHT])
    return scores.astype(float), np.array([rng.permutation(images) % 5 for _ in range(repetitions)])


def difference_variance(measured: FoldMeans, a: int = 0, b: int = 1) -> float:
    v = measured.covariance
    return float(v[a, a] + v[b, b] - 2 * v[a, b])


def normal(means: list[float], deviation: float, correlation: float = 0.0) -> FoldMeans:
    """Return measured means whose errors are normal."""
    size = len(means)
    covariance = deviation**2 * (correlation + (1 - correlation) * np.eye(size))
    return FoldMeans(np.array(means), covariance, np.zeros(size), 500.0, 500)


@pytest.mark.parametrize("repetitions", [1, 2, 4])
def test_complete_folds_have_plain_means_and_nadeau_and_bengios_variance(repetitions: int) -> None:
    scores, folds = drawn(0, repetitions=repetitions)
    measured = means_of_images(scores, folds)
    assert measured.means == pytest.approx(scores.mean((1, 2)))
    of_fold = (scores[0] - scores[1]).var() / 40  # 40 images each
    least = of_fold * (1 / (5 * repetitions) + 1 / 4)
    assert least * 0.999 < difference_variance(measured) < least + 0.5 * of_fold / (5 * repetitions)  # runs may scatter


def test_runs_that_scatter_more_than_their_images_count_as_fewer() -> None:
    scores, folds = drawn(1, images=400)
    bad = np.isin(folds, (0, 1))
    unstable = scores.copy()
    unstable[0][bad] *= np.random.default_rng(1).random(bad.sum()) < 0.7  # two runs of five lose a third
    plain, scattered = means_of_images(scores, folds), means_of_images(unstable, folds)
    assert difference_variance(scattered) > 2 * difference_variance(plain)
    assert scattered.run_variance[0] > 0.02**2


def test_a_dropped_candidate_is_compared_on_the_folds_that_it_has() -> None:
    folds = np.array([np.arange(20) % 5, np.arange(20) // 4])
    easy = np.array([[0.3, 0.1, -0.1, -0.2, -0.1], [0.2, -0.2, 0.1, -0.1, 0.0]])
    scores = np.array([[0.5 + level + easy[r][folds[r]] for r in range(2)] for level in (0.0, 0.05, -0.1)])
    scores[1, 0][folds[0] > 1], scores[1, 1] = np.nan, np.nan  # had the two easiest folds
    scores[2, 1] = np.nan
    measured = means_of_images(scores, folds)
    assert measured.means == pytest.approx([0.5, 0.55, 0.4])
    assert np.nanmean(scores[1]) - np.nanmean(scores[0]) > 0.2


def test_a_candidate_with_fewer_folds_is_known_less_well() -> None:
    scores, folds = drawn(2)
    complete = difference_variance(means_of_images(scores, folds))
    scores[1, 0][folds[0] > 1], scores[1, 1] = np.nan, np.nan
    assert difference_variance(means_of_images(scores, folds)) > 2 * complete


def test_classes_count_the_same_in_balanced_accuracy() -> None:
    scores, _ = drawn(3, repetitions=1)
    classes, folds = np.repeat([0, 1, 2], [140, 50, 10]), np.arange(200)[None] % 5
    measured = means_of_images(scores, folds, classes)
    expected = np.mean([scores[..., classes == k].mean((1, 2)) for k in range(3)], axis=0)
    assert measured.means == pytest.approx(expected)
    difference = scores[0, 0] - scores[2, 0]
    of_classes = sum(difference[classes == k].var() / np.sum(classes == k) / 9 for k in range(3))
    assert 2.2 < difference_variance(measured, 0, 2) / of_classes < 3  # and training images, and folds that scatter
    assert difference_variance(measured, 0, 2) > 2 * difference_variance(means_of_images(scores, folds), 0, 2)


def test_two_that_never_differed_are_not_proven_equal() -> None:
    scores, folds = drawn(4, images=60)
    few = means_of_images(scores[[0, 0]], folds)
    assert 0.01 < posterior(few).chance_of_loss(1, 0, 0.01) < 0.2
    scores, folds = drawn(4, images=2000)
    assert posterior(means_of_images(scores[[0, 0]], folds)).chance_of_loss(1, 0, 0.01) < 1e-6


@pytest.mark.parametrize("missing", [slice(None), slice(0, 100)])
def test_a_candidate_that_can_not_be_compared_is_refused(missing: slice) -> None:
    scores, folds = np.ones((2, 1, 200)), (np.arange(200) // 40)[None]
    scores[0, :, missing] = np.nan
    scores[1, :, 80:] = np.nan
    with pytest.raises(ValueError, match="no scores, or shares no fold"):
        means_of_images(scores, folds)


def test_the_posterior_is_that_of_its_prior_by_weighted_draws() -> None:
    measured = normal([0.84, 0.80, 0.80, 0.79], 0.02, 0.5)
    known = posterior(measured)
    rng, draws = np.random.default_rng(0), 200_000
    s = rng.beta(odds._SHRINKAGE, 1, draws)
    root = np.linalg.cholesky(measured.covariance)
    delta = np.sqrt(1 / s - 1)[:, None] * (rng.standard_normal((draws, 4)) @ root.T)
    contrasts = np.eye(4)[1:] - np.eye(4)[0]  # (3, 4): what a flat mean leaves
    gaps = contrasts @ measured.means - delta @ contrasts.T
    likelihood = stats.multivariate_normal(cov=contrasts @ measured.covariance @ contrasts.T).pdf(gaps)
    loss = delta[:, 0] - delta[:, 1]
    assert known.loss(1, 0)[0].mean() == pytest.approx(np.average(loss, weights=likelihood), abs=0.0005)
    for margin in (0.01, 0.03):
        expected = np.average(loss > margin, weights=likelihood)
        assert known.chance_of_loss(1, 0, margin) == pytest.approx(expected, abs=0.01)
        beyond = np.average(np.maximum(loss - margin, 0), weights=likelihood)
        assert known.excess_loss(1, 0, margin) == pytest.approx(beyond, abs=0.0005)


def test_the_best_of_many_equal_ones_was_lucky_and_one_far_behind_was_not_unlucky() -> None:
    errors = 0.02 * np.random.default_rng(5).standard_normal(20)
    equal = posterior(normal((0.8 + errors).tolist(), 0.02))
    best = int(errors.argmax())
    assert equal.means.mean(0)[best] < 0.8 + 0.4 * errors[best]
    apart = posterior(normal([*(0.8 + errors[:5]).tolist(), 0.6], 0.02))
    assert apart.means.mean(0)[5] < 0.62


def test_fewer_degrees_of_freedom_make_less_sure() -> None:
    few = FoldMeans(np.array([0.8, 0.75]), 0.01**2 * np.eye(2), np.zeros(2), 4.0, 500)
    many = FoldMeans(few.means, few.covariance, few.run_variance, 500.0, 500)
    assert posterior(few).chance_of_loss(1, 0, 0.01) < posterior(many).chance_of_loss(1, 0, 0.01)


@pytest.mark.parametrize(
    ("means", "fitting", "chosen"),
    [
        ([0.80, 0.80, 0.80], (0, 1, 2), 2),  # the smallest
        ([0.80, 0.80, 0.60], (0, 1, 2), 1),  # which the smallest is not worth
        ([0.80, 0.60, 0.55], (0, 1, 2), 0),
        ([0.80, 0.60, 0.55], (1, 2), 1),  # nothing within the limits is worth it: the best
    ],
)
def test_the_smallest_that_loses_little_is_taken(means: list[float], fitting: tuple[int, ...], chosen: int) -> None:
    choice = choose_model(normal(means, 0.003), [86, 14, 9], fitting, [0], margin=0.01)
    assert (choice.chosen, choice.reference) == (chosen, 0)
    worth = choice.estimates[chosen]
    assert worth.shown == (means[chosen] == 0.8)
    assert worth.score.low < means[chosen] < worth.score.high
    assert worth.loss == pytest.approx(0.8 - means[chosen], abs=0.005)
    assert worth.chance_of_loss == pytest.approx(0.0 if worth.shown else 1.0, abs=0.05)


@pytest.mark.parametrize(("middle", "chosen"), [(14.5, 1), (16, 2)])
def test_of_models_that_are_about_as_small_the_best_is_taken(middle: float, chosen: int) -> None:
    choice = choose_model(normal([0.80, 0.80, 0.795], 0.003), [86, middle, 14], (0, 1, 2), [0], margin=0.01)
    assert choice.estimates[2].excess_loss < 0.001
    assert choice.chosen == chosen


def test_a_share_stays_within_its_bounds_and_an_unstable_recipe_is_known_less_well() -> None:
    certain = normal([0.999, 0.9], 0.004)
    score = choose_model(certain, [2, 1], [0], [0], 0.01).estimates[0].score
    assert 0.97 < score.low < 0.999 < score.high <= 1.0
    unstable = FoldMeans(certain.means, certain.covariance, np.full(2, 0.03**2), 500.0, 500)
    wide = choose_model(unstable, [2, 1], [0], [0], 0.01).estimates[0].score
    assert wide.high - wide.low > 0.1


def test_of_trainings_that_share_their_images_no_more_claims_are_wrong_than_is_said() -> None:
    judged = [tuning_odds.judge(tuning_odds.trained(np.random.default_rng([1, number]))) for number in range(250)]
    sure = [claim for tuning in judged for claim in tuning.others if claim.sure >= 0.95]
    assert len(sure) > 250
    assert sum(not claim.right for claim in sure) <= sum(1 - claim.sure for claim in sure)
    assert np.mean([tuning.covered for tuning in judged]) > 0.92


def test_claims_are_counted_by_how_sure_they_are() -> None:
    claims = [tuning_odds.Claim(0.9, number < 9, False) for number in range(10)]
    claims += [tuning_odds.Claim(0.1, number < 1, False) for number in range(10)]
    found = tuning_odds.calibration(claims)
    assert [(one["claims"], one["right"]) for one in found["bins"]] == [(10, 0.1), (10, 0.9)]
    assert found["log_score"] == pytest.approx(stats.bernoulli(0.9).entropy())
    assert found["log_score_of_base_rate"] == pytest.approx(np.log(2))
