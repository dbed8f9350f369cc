"""Which recipes are tried first, which go on, and what displaces the default."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulated_tunings
from simulated_tunings import MODEL, StandIns, fit_of, images_of

from peft_vit.core.records import Calibrated
from peft_vit.core.tasks import CLASSIFICATION, Scores, expected_gain
from peft_vit.core.tasks.classification import BALANCED_ACCURACY, usual_temperature
from peft_vit.fit.decide import (
    best_of,
    clearly_better,
    decide_model,
    gains_by_steps,
    posterior_by_size,
    temperature_before,
)
from peft_vit.fit.fit import Decisions
from peft_vit.fit.outcomes import FoldResults, Outcome, meaning_on
from peft_vit.fit.recipe import Recipe, lora
from peft_vit.fit.sizes import SizeResult, try_sizes
from peft_vit.fit.tune import LEARNING_RATES, candidate_recipes, fitted
from peft_vit.runs.costs.time_limit import Limit

LARGE, SMALL = (SizeResult(MODEL, size, 0.8, steps) for size, steps in ((64, 96), (48, 160)))


def test_the_default_is_tried_first_then_what_differs_from_it_in_one_thing() -> None:
    first, second, third, fourth, *rest = candidate_recipes([LARGE, SMALL])
    assert first == lora(MODEL, 64, 96)
    assert [second, third] == [lora(MODEL, 64, 48), lora(MODEL, 48, 160)]
    assert fourth == lora(MODEL, 64, 96, LEARNING_RATES[1])
    assert len({first, second, third, fourth, *rest}) == 2 * len(LEARNING_RATES) * 2
    assert [recipe.steps for recipe in candidate_recipes([replace(LARGE, steps=40)])] == [
        40
    ] * 3  # half of it is too little
    assert candidate_recipes([replace(LARGE, steps=19)]) == [lora(MODEL, 64, 19)]  # all that there was time for


def decided(truth: Any, minutes: float = 60.0, **changes: Any) -> tuple[StandIns, Any]:
    runner = StandIns(truth, {"nf4": 0.0}, **{"images": 600, **changes})
    return runner, simulated_tunings.one_tuning(runner, minutes)


def test_what_is_written_slowly_the_first_time_has_that_time_at_the_end_too() -> None:
    runner = StandIns(lambda *_: 0.8, images=600)
    fit, request = fit_of(runner, minutes=30.0)

    def write_output(*_: Any) -> None:
        runner.now += 240.0

    fit.environment = replace(fit.environment, write_output=write_output)
    fitted(fit, request, {MODEL: list(simulated_tunings.SIZES)})
    assert fit.limit.left_s >= 0


def test_a_linear_probe_that_was_chosen_stays_while_a_later_call_goes_on(tmp_path) -> None:
    runner = StandIns(lambda experiment, _: 0.9 if experiment["method"] == "linear" else 0.5, images=600)
    (first, request), (later, _) = (fit_of(runner, output=tmp_path, minutes=minutes) for minutes in (30.0, 60.0))
    fitted(first, request, {MODEL: list(simulated_tunings.SIZES)})
    assert first.decisions.delivered[0].is_probe
    written, later.file = [], first.file  # as it is read from tune.json
    later.environment = replace(later.environment, write_output=lambda tuning, *_: written.append(tuning.recipe))
    fitted(later, later.request, {MODEL: list(simulated_tunings.SIZES)})
    assert later.decisions.delivered[0].is_probe
    assert all(recipe.is_probe for recipe in written)


@pytest.mark.parametrize(("contenders", "displaced"), [(1, True), (10, False)])
def test_one_of_many_has_to_be_better_by_more_than_the_luckiest(contenders: int, displaced: bool) -> None:
    def outcome(right: Any) -> Outcome:  # logits of images of class 0
        return Outcome(np.arange(400), np.zeros(400, int), np.eye(2)[1 - right.astype(int)], 1.0, Path())

    usual, lucky = np.arange(400) < 300, (np.arange(400) >= 20) & (np.arange(400) < 332)  # 3 points, 1.7 errors
    default, best, *others = [lora(MODEL, 32, 24 + steps) for steps in range(1 + contenders)]
    outcomes = {recipe: {0: outcome(usual)} for recipe in (default, *others)} | {best: {0: outcome(lucky)}}
    assert best_of(FoldResults(Scores(), outcomes), [default, best, *others]) == (best if displaced else default)


def compared(labels: Any, *right: Any, seeds: int = 1) -> FoldResults:
    """Return folds of recipes that have some images right, in so many repetitions alike; logits are of two classes."""
    scores = Scores(CLASSIFICATION, BALANCED_ACCURACY)
    made = {}
    for steps, own in zip((48, 24), right, strict=True):
        logits = np.eye(2)[np.where(own, labels, 1 - labels)]
        outcome = Outcome(np.arange(len(labels)), labels, logits, 1.0, Path())
        made[lora(MODEL, 32, steps)] = dict.fromkeys(range(0, 5 * seeds, 5), outcome)
    return FoldResults(scores, made)


def test_the_error_of_a_difference_counts_classes_alike() -> None:
    labels, rng, own = (
        np.repeat([0, 1], [200, 20]),
        np.random.default_rng(0),
        (lora(MODEL, 32, 48), lora(MODEL, 32, 24)),
    )
    found = np.array([compared(labels, *(rng.random((2, 220)) < 0.8)).paired(*own) for _ in range(300)])
    assert found[:, 0].std() / found[:, 1].mean() == pytest.approx(1, abs=0.12)
    assert np.mean(found[:, 0] > 1.645 * found[:, 1]) < 0.09


def test_one_rare_image_does_not_outweigh_what_steps_usually_gain() -> None:
    """By hand: it is a 40th of the score, about as much as the error e, with m = 0.0066 of 48 steps against 24.

    The mean of the prior N(m, 0.01^2) and of what was seen has the sign of -0.025 * 0.01^2 + m e^2.
    """
    labels, whole = np.repeat([0, 1], [200, 20]), np.ones(220, bool)
    fewer = np.arange(220) != 200  # of all of the steps one rare image is wrong
    folds, recipe = compared(labels, fewer, whole), lora(MODEL, 32, 48)
    difference, error = folds.paired(recipe, recipe.half)
    assert difference == pytest.approx(-1 / 40, abs=2e-4)
    of_metric = (0.975**2 + 19 * 0.025**2 + 2 * 0.025**2) ** 0.5 / 40
    assert error == pytest.approx(of_metric + 0.02 / 220, rel=2e-4)  # its NLL is 1 nat higher, of 220 images
    assert gains_by_steps(folds, recipe)


def test_recipes_that_have_the_same_images_right_differ_by_as_much_as_their_nll_tells() -> None:
    """Of 300 pairs that are equally sure on average, one in six lies above an error by chance."""
    rng, labels = np.random.default_rng(0), np.zeros(100, int)
    own, other = lora(MODEL, 32, 48), lora(MODEL, 32, 24)
    found = []
    for _ in range(300):
        logits = [np.stack([2 + rng.random(100), np.zeros(100)], 1) for _ in range(2)]  # all are right
        outcomes = {
            recipe: {0: Outcome(np.arange(100), labels, z, 1.0, Path())}
            for recipe, z in zip((own, other), logits, strict=True)
        }
        folds = FoldResults(Scores(), outcomes)
        difference, error = folds.paired(own, other)
        nats = np.subtract(*(np.log1p(np.exp(-z[:, 0])) for z in logits))
        assert difference == pytest.approx(-0.02 * nats.mean())
        assert error == pytest.approx(0.02 * nats.std() / 10)
        found.append(clearly_better(folds, own, other))
    assert np.mean(found) == pytest.approx(0.16, abs=0.06)


def test_an_image_of_two_repetitions_says_no_more_than_once() -> None:
    labels, rng = np.repeat([0, 1], [60, 30]), np.random.default_rng(1)
    right = rng.random((2, 90)) < 0.7
    once, twice = (compared(labels, *right, seeds=seeds) for seeds in (1, 2))
    pair = lora(MODEL, 32, 48), lora(MODEL, 32, 24)
    assert twice.paired(*pair) == pytest.approx(once.paired(*pair))


def test_sizes_are_believed_as_far_as_the_images_that_compared_them_tell() -> None:
    """Of 10,000 images 300 compared them, whose classes tell as much as 108 alike would."""
    values = {32: 0.80, 48: 0.78, 64: 0.81}
    sizes = {Recipe(MODEL, size).place: value for size, value in values.items()}
    fit, _ = fit_of(StandIns(lambda *_: 0.5), images_of(10_000, effective_share=0.36))
    fit.file.decisions = Decisions(sizes=sizes, compared_images=300)
    found = try_sizes(fit, {MODEL: list(values)})
    told = posterior_by_size(values, 108, 300.0)
    assert {own.image_size: own.expected for own in found} == pytest.approx(told)


def test_worse_recipes_have_fewer_folds() -> None:
    def truth(experiment: Any, size: int) -> float:
        training = experiment["training"]
        return 0.8 if training.get("learning_rate") == 1e-3 else 0.6

    _, decision = decided(truth)
    folds = {candidate.recipe: candidate.folds for candidate in decision.candidates}
    assert folds[decision.taken.recipe] >= 5
    worse = [count for recipe, count in folds.items() if recipe.method == "lora" and recipe.rate != 1e-3]
    assert worse
    assert max(worse) < 5


def test_what_is_chosen_does_not_know_how_many_images_test() -> None:
    costs = {}
    for sealed in (10, 10**6):
        fit, _ = fit_of(StandIns(lambda *_: 0.5), images_of(100, num_test=sealed), rate=1e8, minutes=6.0)
        costs[sealed] = fit.costs
    recipe = lora("test_vit", 64, 48)
    for own in (recipe, recipe.rounded("nf4")):
        assert costs[10].ending_s(own) == costs[10**6].ending_s(own)
    assert costs[10].lengths(recipe, 300.0) == costs[10**6].lengths(recipe, 300.0)
    passes = 2 * costs[10].image_s(recipe)  # of the probe that it starts from, and of the model
    drawn = costs[10**6].tested_images(recipe)
    assert drawn * passes <= 60 < (drawn + 1) * passes  # a sixth of six minutes
    assert costs[10].tested_images(recipe) == 10
    assert costs[10**6].tested_images(recipe.rounded("nf4")) == drawn // 2
    assert costs[10].test_line(recipe, 10).startswith("  testing 10 images takes about ")
    assert f"testing {drawn:,} of 1,000,000 images, drawn at random, takes" in costs[10**6].test_line(recipe, drawn)


@pytest.mark.parametrize(("left_s", "ahead", "taken"), [(60.0, 0.0, 64), (1e5, 0.05, 48)])
def test_what_was_trained_long_is_not_replaced_by_a_short_training_that_is_as_good_on_folds(left_s, ahead, taken):
    """On folds the smaller images had more steps; no time is left to train them as long as the first model was."""
    runner = StandIns(lambda _, size: 0.8 + (ahead if size == 48 else 0.0), images=1000)
    fit, _ = fit_of(runner, minutes=1e4)
    first, other, probe = lora(MODEL, 64, 48), lora(MODEL, 48, 112), Recipe(MODEL, 64)
    fit.decisions.first, fit.decisions.trained = (first, 6.0), [(first, 6.0)]
    for recipe in (first, other, probe):
        fit.run([recipe], range(3), fit.limit)
    fit.limit = Limit(left_s / 60, runner.now, lambda: runner.now)
    assert decide_model(fit).taken.recipe.image_size == taken


def test_temperature_of_a_longer_training_leans_on_what_is_usual_at_its_accuracy() -> None:
    fit, _ = fit_of(StandIns(lambda *_: 0.8, images=1000), minutes=1e4)
    recipe = lora(MODEL, 64, 48)
    fit.decisions.sizes[recipe.place] = 0.9
    before = temperature_before(fit, recipe, recipe, 1.0)  # no fold is known
    assert before is not None
    assert before.median == usual_temperature(0.9 + expected_gain(fit.costs.last_steps(recipe)), 2).median
    assert meaning_on([], CLASSIFICATION, before) == Calibrated(
        images=0, temperature=before.median, coverages=(), thresholds=()
    )
    fit.run([recipe], range(3), fit.limit)
    alike, longer = (temperature_before(fit, recipe, recipe, times) for times in (1.0, 4.0))
    assert alike is not None
    assert longer is not None
    assert (alike.most_images, longer.most_images) == (math.inf, 50)
    assert temperature_before(fit, Recipe(MODEL, 64), recipe, 1.0) is None


@pytest.mark.parametrize(("accuracy", "num_classes", "best"), [(0.968, 10, 0.44), (0.713, 10, 0.96), (0.843, 2, 0.94)])
def test_usual_temperatures_are_those_that_were_best_on_test_images(accuracy, num_classes, best):
    assert usual_temperature(accuracy, num_classes).median == pytest.approx(best, rel=0.13)
    assert usual_temperature(1.0, num_classes).median == pytest.approx(0.4, rel=0.02)
