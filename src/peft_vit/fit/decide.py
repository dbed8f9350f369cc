"""What is better: sizes, steps, recipes and models, each by what images say and what is known beforehand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from peft_vit.base.statistics import Interval, TemperaturePrior
from peft_vit.base.statistics.more_labels import gain_of_doubling
from peft_vit.base.statistics.odds import ModelEstimate, choose_model
from peft_vit.core.records import Calibrated, Decision
from peft_vit.core.tasks import GAIN_SD, Task, expected_gain
from peft_vit.core.tasks.classification import usual_temperature
from peft_vit.fit.costs import MOST_STEPS
from peft_vit.fit.outcomes import FoldResults, meaning_on
from peft_vit.fit.recipe import Recipe
from peft_vit.runs.costs.time_limit import ENOUGH_STEPS, FEWEST_FOLDS, FOLDS, first_that_fits

if TYPE_CHECKING:
    from peft_vit.fit.fit import Fit

_RISE, _SPREAD, _SMOOTH = 0.0075, 0.015, 1.0  # of regressions over sizes, see `posterior_by_size`
_UPSCALED = 4  # times its own side, up to where a larger image helps
_USUAL_SD = 0.01  # of what more steps gain, around `expected_gain`
SHORTEST = 0.5  # times the steps on folds, of a last training
LENGTHS = (8.0, 6.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.75, SHORTEST)  # likewise
LONGEST = 2.0  # likewise; more where folds had few steps
_WORTH_AGAIN = 1.5  # times the steps that were trained, from where another training is worth it
_ALIKE = 1.5  # times the steps of folds that a last training has, whose temperature is as these say
_IMAGES_OF_SHORT = 50  # of folds that count for a longer one: its ln T differs by about a quarter from theirs
LEAST_FOLDS = 1  # that decide of a training if time is short

# --- sizes ------------------------------------------------------------------------------------------------------------


def posterior_by_size(observed: Mapping[int, float], images: float, side: float) -> dict[int, float]:
    """Return what regressions may have on other images: their values on few, with what is known of sizes beforehand.

    With x = 2 log2(size), steps of the square root of 2, the values v of the sizes are a Gaussian process with the
    mean a x up to four times the images' own side and flat from there, about mean(v); the covariance
    s^2 exp(-(x - x')^2 / 2 c^2); and the noise v (1 - v) / 2 n of each: sizes share their images, so about half of a
    share's variance is in their differences. a = 0.75 points, s = 1.5 points, c = 1 step fit what regressions of ELPV,
    digits, Fashion-MNIST and two sets of drawings had on 400 and more test images at 12 to 50 labels a class. The size
    that is best here has 0.9 points more there on average than the size of the best value. Twice or half of a, s and
    c do as well within 0.5. Of errors in standard deviations, which are values below 0, the variance is v^2 / 2 n
    instead: about that of a mean absolute error v of normal ones, 0.57 v^2 / n, or of a root of their mean square.

    Args:
        observed: by image size, as shares or minus errors, S of them.
        images: n, that they are from, see `DecidingMetric.images_alike`.
        side: the shorter one of the images themselves, in pixels.
    """
    sizes, values = np.array(list(observed)), np.array(list(observed.values()))  # (S,) each
    steps, rising = 2 * np.log2(sizes), 2 * np.log2(np.minimum(sizes, _UPSCALED * side))
    prior = values.mean() + _RISE * (rising - rising.mean())
    covariance = _SPREAD**2 * np.exp(-((steps[:, None] - steps) ** 2) / (2 * _SMOOTH**2))  # (S, S)
    best = float(values.max())
    share = min(max(best, 0.5 / images), 1 - 0.5 / images)
    variance = best**2 / 2 if best < 0 else share * (1 - share)  # an error is negative
    noise = variance / (2 * images) * np.eye(len(sizes))
    posterior = prior + covariance @ np.linalg.solve(covariance + noise, values - prior)
    return dict(zip(observed, posterior.tolist(), strict=True))


# --- recipes on folds -------------------------------------------------------------------------------------------------


def clearly_better(frame: FoldResults, recipe: Recipe, other: Recipe, errors: float = 1.0) -> bool:
    """Tell whether a recipe is better than another by more than so many standard errors, on the same folds."""
    difference, error = frame.paired(recipe, other) or (0.0, 0.0)
    return difference > errors * error


def best_of(frame: FoldResults, recipes: Sequence[Recipe]) -> Recipe:
    """Return the best of some recipes; the first one, unless another is better by more than luck would make it."""
    default, *others = [recipe for recipe in recipes if frame.seeds(recipe)] or recipes
    luckiest = math.sqrt(2 * math.log(max(2, len(others))))  # of so many standard normal variables, about
    better = [recipe for recipe in others if clearly_better(frame, recipe, default, luckiest)]
    return max(better, key=lambda recipe: standing(frame, recipe), default=default)


def standing(frame: FoldResults, recipe: Recipe) -> float:
    """Return how a recipe stands: by the most folds first, then by its value on them; below 0 without any."""
    seeds = frame.seeds(recipe)
    return len(seeds) + math.atan(frame.value(recipe, seeds) or 0.0) / math.pi + 0.5 if seeds else -1.0


def gains_by_steps(frame: FoldResults, recipe: Recipe) -> bool:
    """Tell whether more steps gain: as folds show with twice of them, else as half of them or none let expect."""
    own = recipe.plain
    twice, half = frame.paired(replace(own, steps=2 * own.steps), own), frame.paired(own, own.half)
    if twice is not None:
        return twice[0] > 0
    if half is None:  # there was no time for it: few steps as a rule are too few
        return 0 < own.steps < ENOUGH_STEPS
    difference, error = half
    usual = expected_gain(own.steps) - expected_gain(own.half.steps)
    return difference * _USUAL_SD**2 + usual * error**2 > 0  # the mean of a normal prior and what was seen


def times_longer(fit: Fit, recipe: Recipe) -> float:
    """Return how many times the steps that follow from the folds the last training has.

    As many as the first training has; more where steps gain on folds, as many fewer as time is short.
    """
    if recipe.is_probe:
        return 1.0
    done, first = fit.longest_done(recipe), fit.decisions.first
    usual = 1.0 if first is None or first[0].is_probe else first[1]
    longer = [times for times in LENGTHS if times * recipe.steps <= LONGEST * max(MOST_STEPS, recipe.steps)]
    options = [
        times for times in longer if gains_by_steps(fit.frame, recipe) and times > max(usual, _WORTH_AGAIN * done)
    ]
    options += [] if done else [usual, *(times for times in LENGTHS if times < usual)]
    fitting = first_that_fits(options, partial(fit.costs.ending_s, recipe), fit.limit.left_s)
    return fitting or done or (SHORTEST if fit.ends_in_time(recipe, SHORTEST) else min(usual, SHORTEST))


def gain_of_training(fit: Fit, recipe: Recipe, last_steps: int, probe: Recipe) -> float:
    """Return what the last training of a recipe is expected to have more than a regression, a share.

    The mean of a normal posterior. What training usually brings is the prior N(g, s^2), see `expected_gain`, less by
    what the regression of another size is ahead of the one at the recipe's size; s = 3 points. On folds the difference
    d is measured with the standard error e, of fewer steps, whose expected gain is less. As trainings of folds share
    images, and all of them with the last one, the variance is e^2 (1 + J n_test / n_train), see `means_of_images`.

    Args:
        fit: the fit.
        recipe: as it was trained on folds.
        last_steps: of its last training.
        probe: the regression.
    """
    sizes = fit.decisions.sizes
    ahead = sizes[probe.place] - sizes[recipe.place] if {probe.place, recipe.place} <= sizes.keys() else 0.0
    usual = expected_gain(last_steps)
    prior, measured = usual - max(0.0, ahead), fit.frame.paired(recipe, probe)
    if measured is None:
        return prior
    difference, error = measured
    difference += usual - expected_gain(recipe.steps)
    folds = len(set(fit.frame.seeds(recipe)) & set(fit.frame.seeds(probe)))
    variance = error**2 * (1 + folds / (FOLDS - 1))
    return (prior * variance + difference * GAIN_SD**2) / (variance + GAIN_SD**2)


def worth_training(fit: Fit, recipe: Recipe, last_steps: int, probe: Recipe) -> bool:
    """Tell whether a recipe is kept instead of a regression, and say by what."""
    gain, scores = gain_of_training(fit, recipe, last_steps, probe), fit.images.scores
    seeds = [seed for seed in fit.frame.seeds(recipe) if seed in fit.frame.rows.get(probe, {})]
    if seeds:
        own, of_probe = (scores.text(fit.frame.score(one, seeds)) for one in (recipe, probe))
        said = f"{recipe.title}: {own}; linear probe, {probe.image_size} px: {of_probe}"
        fit.emit(f"  on images of {len(seeds)} folds, which training has left out: {said}")
        expected = f"{100 * abs(gain):.1f} {scores.unit} {'better' if gain > 0 else 'worse'} than the linear probe"
        fit.emit(f"  so the model that is trained on all of them is expected to be {expected}")
    return gain > 0


def temperature_before(fit: Fit, recipe: Recipe, known: Recipe, longer: float) -> TemperaturePrior | None:
    """Return what is known of a last training's temperature before its folds' images; None: nothing of its own.

    Args:
        fit: the fit.
        recipe: of the last training.
        known: what folds have of it: maybe of fewer steps.
        longer: times the steps that follow from the recipe's.
    """
    task, sizes, last_steps = fit.images.task, fit.decisions.sizes, fit.costs.last_steps(recipe, longer)
    if recipe.is_probe or not task.smooths:
        return None
    if seeds := fit.frame.seeds(known):
        logits, labels, _ = fit.frame.pooled(known, seeds)
        accuracy, steps = float(np.mean(logits.argmax(1) == labels)), known.steps
    elif recipe.place in sizes and fit.frame.scores.metric.is_share:
        accuracy, steps = sizes[recipe.place], 0
    else:
        return None
    accuracy += expected_gain(last_steps) - expected_gain(steps)
    alike = last_steps <= _ALIKE * fit.costs.last_steps(known)
    return usual_temperature(accuracy, fit.images.num_outputs, math.inf if alike else _IMAGES_OF_SHORT)


def meaning_of_last(
    fit: Fit, recipe: Recipe, known: Recipe, longer: float, learned: Task
) -> Calibrated | Decision | None:
    """Return what outputs of a last training mean, by folds of `known` and what is known before, see above."""
    return meaning_on(fit.frame.of(known), learned, temperature_before(fit, recipe, known, longer))


def gain_of_steps(frame: FoldResults, recipe: Recipe) -> Interval | None:
    """Return what twice the steps would bring, a share; None: half of them were not tried on the same folds."""
    trained = recipe.trained
    seeds = [seed for seed in frame.seeds(trained.half) if seed in frame.rows[trained]]
    if trained.is_probe or not seeds:
        return None
    labels = frame.pooled(trained, seeds)[1]
    of_half, of_all = (frame.scores.best - frame.by_image(own, seeds) for own in (trained.half, trained))
    return gain_of_doubling(of_half, of_all, frame.scores.image_weights(labels), share=1.0)


# --- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A model that was compared.

    Attributes:
        recipe: of it.
        bytes: that its file is expected to have.
        folds: that it has done.
        odds: against the best float model; None: the search has dropped it.
        why: it was not taken; empty: it was.
    """

    recipe: Recipe
    bytes: int
    folds: int
    odds: ModelEstimate | None
    why: str


@dataclass(frozen=True)
class ModelDecision:
    """What is taken, and beside what: candidates, the smallest first, and the best float model found."""

    candidates: tuple[Candidate, ...]
    taken: Candidate
    odds: ModelEstimate
    reference: Recipe


def decide_model(fit: Fit) -> ModelDecision:
    """Return which model is taken, as `statistics.odds.choose_model` does, of all that have enough folds.

    Args:
        fit: the fit, in which some recipe has a fold.
    """
    frame, costs, most, unit = fit.frame, fit.costs, fit.request.max_bytes, fit.frame.scores.unit
    done = {recipe: len(outcomes) for recipe, outcomes in frame.rows.items()}
    least = min(FEWEST_FOLDS, max(done.values()))
    # Where steps took longer than planned, no training may have more than two folds: no reason for a regression.
    trained = min(least, max([LEAST_FOLDS, *(folds for recipe, folds in done.items() if not recipe.is_probe)]))
    enough = [recipe for recipe, folds in done.items() if folds >= (least if recipe.is_probe else trained)]
    recipes = [  # of several lengths the longest: the others say what more steps gain
        recipe
        for recipe in enough
        if not any(own.steps > recipe.steps and own == replace(recipe, steps=own.steps) for own in enough)
    ]
    sizes = [costs.bytes_of(recipe) for recipe in recipes]
    fitting = _deliverable(fit, recipes, sizes)
    floats = [number for number, recipe in enumerate(recipes) if recipe.bits is None]
    measured = frame.means(recipes)
    measured = replace(measured, means=measured.means + [_gain_of_last(fit, recipe.trained) for recipe in recipes])
    choice = choose_model(measured, sizes, fitting or range(len(recipes)), floats, fit.request.margin_share)
    taken = choice.estimates[choice.chosen]

    def why(number: int) -> str:
        size, gain = sizes[number] - sizes[choice.chosen], 100 * (taken.loss - choice.estimates[number].loss)
        if number == choice.chosen:
            return ""
        if number not in fitting:
            return "no time to finish it" if most is None or sizes[number] <= most else "larger than the limit"
        if size < 0:
            return f"expected to be {-gain:.1f} {unit} worse" if gain <= -0.05 else "smaller, but less sure"
        larger = "larger" if size > 0 else "as large"
        return f"{larger}, and {gain:.1f} {unit} better" if gain >= 0.05 else f"{larger}, and not better"

    candidates = [
        Candidate(recipe, sizes[number], done[recipe], choice.estimates[number], why(number))
        for number, recipe in enumerate(recipes)
    ]
    model, halves = candidates[choice.chosen], {recipe.half for recipe in done}
    for recipe, folds in done.items():
        if folds and recipe not in enough:
            reason = "half of the steps, to see what they gain" if recipe in halves else "not clearly better"
            if clearly_better(frame, recipe, model.recipe.trained):
                reason = "no time for more"
            dropped = f"{folds} of {FOLDS} folds: {reason}"
            candidates.append(Candidate(recipe, costs.bytes_of(recipe), folds, None, dropped))
    ordered = tuple(sorted(candidates, key=lambda candidate: candidate.bytes))
    return ModelDecision(ordered, model, taken, recipes[choice.reference])


def _gain_of_last(fit: Fit, recipe: Recipe) -> float:
    """Return what a recipe's last training usually has more than those on folds, which have fewer steps, a share."""
    if recipe.is_probe:
        return 0.0
    return expected_gain(fit.costs.last_steps(recipe, times_longer(fit, recipe))) - expected_gain(recipe.steps)


def _deliverable(fit: Fit, recipes: Sequence[Recipe], sizes: Sequence[int]) -> list[int]:
    """Return the places of the recipes, of files of so many bytes, that may be taken: none if nothing fits."""
    most, frame = fit.request.max_bytes, fit.frame
    within_bytes = [number for number, size in enumerate(sizes) if most is None or size <= most]
    can_finish, can_finish_half = (
        [number for number in within_bytes if fit.ends_in_time(recipes[number], longer)] for longer in (1.0, SHORTEST)
    )
    if all(recipes[number].is_probe for number in can_finish):
        return can_finish_half or within_bytes
    plain = [own for own in frame.rows if not own.is_probe and own.bits is None and frame.seeds(own)]
    if not plain:
        return can_finish
    best = max(plain, key=lambda own: standing(frame, own))
    last = fit.costs.last_steps(best, max(1.0, fit.longest_done(best)))
    return [  # a regression is taken only if it is expected to be better
        number
        for number in can_finish
        if not recipes[number].is_probe or gain_of_training(fit, best, last, recipes[number].trained) <= 0
    ]
