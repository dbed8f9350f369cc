"""Temperature and prediction sets: against plain loops, a grid, exact laws of coverage, and planted tasks."""

import math
from fractions import Fraction

import numpy as np
import prediction_sets as planted_sets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_vit.base.statistics import (
    TemperaturePrior,
    conformal_quantile,
    fit_temperature,
    prediction_sets,
    probabilities,
)
from peft_vit.base.statistics.conformal import TEMPERATURES


def mean_nll(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """Return it by a loop over images, in Python's own floats."""
    total = 0.0
    for row, label in zip((logits / temperature).tolist(), labels.tolist(), strict=True):
        top = max(row)
        total += top + math.log(sum(math.exp(z - top) for z in row)) - row[label]
    return total / len(labels)


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_temperature_has_the_least_likelihood_of_a_fine_grid(scale) -> None:
    rng = np.random.default_rng(3)
    truth = rng.normal(size=(400, 4))
    labels = np.array([rng.choice(4, p=row) for row in probabilities(truth, 1.0)])
    temperature = fit_temperature(scale * truth, labels)
    grid = np.geomspace(temperature / 1.2, temperature * 1.2, 201)  # its middle is what was found
    assert np.argmin([mean_nll(scale * truth, labels, candidate) for candidate in grid]) == 100
    assert temperature == pytest.approx(scale, rel=0.25)  # what was planted


def test_temperature_ends_where_likelihood_would_go_on() -> None:
    logits = np.array([[2.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(logits, [0, 1]) == pytest.approx(TEMPERATURES[0])
    assert fit_temperature(logits, [1, 0]) == pytest.approx(TEMPERATURES[1])


def test_a_prior_holds_where_few_images_tell_nothing_and_gives_way_to_many() -> None:
    prior = TemperaturePrior(median=1.5, spread=0.35)
    right = np.array([[8.0, 0.0], [0.0, 9.0], [7.0, 1.0]])
    assert fit_temperature(right, [0, 1, 0]) == pytest.approx(TEMPERATURES[0])
    assert fit_temperature(right, [0, 1, 0], prior) == pytest.approx(1.5, rel=0.1)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 3)) * 6
    labels = [rng.choice(3, p=row) for row in probabilities(logits, 3.0)]
    assert fit_temperature(logits, labels, prior) == pytest.approx(fit_temperature(logits, labels), rel=0.02)
    fewer = fit_temperature(logits, labels, prior._replace(most_images=20))
    assert fewer == pytest.approx(fit_temperature(logits, labels, prior, np.arange(4000) % 20), rel=1e-6)
    assert 1.5 < fewer < 2.7  # 3 is what all of them say


def test_an_image_with_several_rows_counts_once() -> None:
    prior = TemperaturePrior(median=1.5, spread=0.35)
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(30, 3)) * 4
    labels = np.array([rng.choice(3, p=row) for row in probabilities(logits, 2.0)])
    labels[:12] = logits[:12].argmax(1)
    images = np.array([0] * 12 + list(range(1, 19)))  # one has twelve rows
    for known in (prior, None):
        twice = fit_temperature(np.tile(logits, (2, 1)), np.tile(labels, 2), known, np.tile(np.arange(30), 2))
        assert twice == pytest.approx(fit_temperature(logits, labels, known), rel=1e-6)
        temperature = fit_temperature(logits, labels, known, images)

        def loss(t: float, known: TemperaturePrior | None = known) -> float:
            rows = [mean_nll(logits[[row]], labels[[row]], t) for row in range(30)]
            distance = 0.0 if known is None else math.log(t / known.median) ** 2 / (2 * known.spread**2)
            return np.mean(rows[:12]) + sum(rows[12:]) + distance

        grid = np.geomspace(temperature / 1.1, temperature * 1.1, 201)
        assert abs(np.argmin([loss(t) for t in grid]) - 100) <= 1


def slow_quantile(scores: list[float], coverage: Fraction) -> float:
    """Return the least score with as many scores up to it as the definition asks for."""
    needed = math.ceil((len(scores) + 1) * coverage)
    return min((s for s in scores if sum(other <= s for other in scores) >= needed), default=math.inf)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 99))
def test_quantile_is_that_of_its_definition_with_ties_and_few_scores(scores, percent) -> None:
    assert conformal_quantile(scores, percent / 100) == slow_quantile(scores, Fraction(percent, 100))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.integers(1, 5), st.integers(1, 99))
def test_scores_that_are_repeated_count_once(scores, times, percent) -> None:
    images = np.tile(np.arange(len(scores)), times)
    repeated = conformal_quantile(np.tile(scores, times), percent / 100, images)
    assert repeated == conformal_quantile(scores, percent / 100)


def test_images_with_more_scores_do_not_weigh_more() -> None:
    scores, images = [0.1, 0.8, 0.9, 0.5, 0.6], [0, 0, 0, 1, 2]
    assert conformal_quantile(scores, 0.25, images) == 0.5  # 1 of 3: a third and one whole
    assert conformal_quantile(scores, 0.5, images) == 0.6  # 2 of 3: a third and two
    assert conformal_quantile(scores, 0.75, images) == 0.9  # all


def test_sets_hold_what_their_definition_says_and_never_nothing() -> None:
    p = [[0.6, 0.3, 0.1], [0.34, 0.33, 0.33], [0.5, 0.5, 0.0]]
    assert prediction_sets(p, 0.1).astype(int).tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 0]]  # of equal ones the first
    assert prediction_sets(p, 0.665).astype(int).tolist() == [[1, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert prediction_sets(p, 0.72).astype(int).tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 0]]
    assert prediction_sets(p, math.inf).all()


@pytest.mark.parametrize("repetitions", [1, 3])
def test_sets_of_folds_cover_new_images_of_a_planted_task(repetitions) -> None:
    rng = np.random.default_rng(5)
    trials = [planted_sets.trial(rng, 60, repetitions) for _ in range(150)]
    covered, estimated, _ = np.moveaxis(np.array(trials), -1, 0)  # (150, coverages) each
    error = covered.std(0) / math.sqrt(len(covered))
    assert (covered.mean(0) >= planted_sets.COVERAGES - 3 * error).all()
    assert (covered.mean(0) <= np.array(planted_sets.COVERAGES) + 0.05).all()  # and they are not all classes
    assert estimated.mean(0) == pytest.approx(covered.mean(0), abs=0.02)  # what the folds say is what new images see


def test_thresholds_hold_as_often_as_asked_where_images_chose_nothing_and_less_often_where_they_chose() -> None:
    held = {
        checkpoints: planted_sets.coverage_after_choice(np.random.default_rng(2), checkpoints, trials=200)
        for checkpoints in (1, 30)
    }
    assert held[1] == pytest.approx(28 / 31, abs=0.015)  # ceil(31 * 0.9) of 31; four standard errors
    assert held[30] < 0.87
