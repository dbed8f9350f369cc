"""LoRA at the two most promising sizes, over learning rates and steps, by successive halving (arXiv 1502.07943).

The resource is the number of folds: every recipe is trained on the first one; which continue to the next, Optuna's
pruner says. It hears of the default first, the usual rate with the most steps at the most promising size, so that one
always continues. A recipe that may have been lucky does not displace it. Where the best has the highest or the lowest
rate of all, or the most steps, what lies beyond is tried.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from peft_vit.fit.costs import LEAST_STEPS
from peft_vit.fit.folds import Folds
from peft_vit.fit.recipe import DEFAULT_RATE, Recipe, lora
from peft_vit.fit.sizes import SizeResult
from peft_vit.runs.costs.time_limit import FOLDS, Limit

RATES = (DEFAULT_RATE, 3 * DEFAULT_RATE, 3e-4)  # in the order in which time goes to them
_GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def wished(sizes: Sequence[SizeResult]) -> list[Recipe]:
    """Return what is worth a try, the likeliest first: the default, then what differs from it in one thing, in two, ...

    Args:
        sizes: the most promising first.
    """
    weights = []
    for (size, result), (rate, value), half in itertools.product(enumerate(sizes), enumerate(RATES), (False, True)):
        steps = result.steps // 2 if half else result.steps
        if steps >= LEAST_STEPS:
            weights.append((size + 1.5 * rate + half, lora(result.model, result.image_size, steps, value)))
    return [recipe for _, recipe in sorted(weights, key=lambda pair: pair[0])]  # stable


def search(folds: Folds, sizes: Sequence[SizeResult], limit: Limit) -> tuple[list[Recipe], list[Recipe]]:
    """Return what was tried, the best first, and what there was no time for.

    Args:
        folds: of the tuning.
        sizes: at which LoRA is trained, the most promising first, at least one.
        limit: when the search ends, but for the default on its first fold.
    """
    recipes = wished(sizes)
    count = 1
    while count < len(recipes) and _bracket_s(folds, recipes[: count + 1]) <= limit.left_s:
        count += 1
    tried, left = recipes[:count], recipes[count:]
    state = folds.context.state
    if len(tried) > 1:
        state.tell(f"  {len(tried)} recipes of LoRA by successive halving over folds")
        _halve(folds, tried, limit)
    best = best_of(folds, tried)
    while (further := _beyond(folds, best, tried)) is not None:
        seeds = folds.seeds(best)
        if not seeds or folds.seconds(further, seeds) > limit.left_s:
            left.insert(0, further)
            break
        state.tell(f"  the best so far has {best.settings}, at the end of what was tried; next are {further.settings}")
        folds.run([further], seeds, limit)
        tried.append(further)
        best = best_of(folds, [best, further])
    ranked = sorted(tried, key=lambda recipe: (recipe != best, -_standing(folds, recipe)))
    return ranked, left


def best_of(folds: Folds, recipes: Sequence[Recipe]) -> Recipe:
    """Return the best of some recipes; the first one, unless another is better by more than luck would make it."""
    default, *others = [recipe for recipe in recipes if folds.seeds(recipe)] or recipes
    luckiest = math.sqrt(2 * math.log(max(2, len(others))))  # of so many standard normal variables, about
    better = [recipe for recipe in others if folds.clearly_better(recipe, default, luckiest)]
    return max(better, key=lambda recipe: _standing(folds, recipe), default=default)


def _standing(folds: Folds, recipe: Recipe) -> float:
    """Return how a recipe stands: by the most folds first, then by its value on them; below 0 without any."""
    seeds = folds.seeds(recipe)
    return len(seeds) + math.atan(folds.value(recipe, seeds) or 0.0) / math.pi + 0.5 if seeds else -1.0


def _bracket_s(folds: Folds, recipes: Sequence[Recipe]) -> float:
    """Return what successive halving takes: all on the first fold, half of them on the next, in the end one."""
    going, seconds = list(recipes), 0.0
    for seed in range(FOLDS):
        seconds += sum(folds.seconds(recipe, [seed]) for recipe in going)
        going = going[: (len(going) + 1) // 2]
    return seconds


def _halve(folds: Folds, recipes: Sequence[Recipe], limit: Limit) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    trials = [study.ask() for _ in recipes]
    going = dict(zip(recipes, trials, strict=True))
    for seed in range(FOLDS):
        wanted = sum(folds.seconds(recipe, [seed]) for recipe in going)
        if len(going) == 1 or (seed and wanted > limit.left_s):
            return
        folds.run(list(going), [seed], limit)
        for recipe in list(going):
            value = folds.value(recipe, range(seed + 1))
            if value is None:  # it failed, or there was no time for it
                del going[recipe]
                continue
            going[recipe].report(value, seed + 1)
            if going[recipe].should_prune():
                del going[recipe]


def _beyond(folds: Folds, best: Recipe, tried: Sequence[Recipe]) -> Recipe | None:
    """Return what lies beyond the best at an end of what was tried, and is not tried yet; None: nothing."""
    rates = sorted(recipe.rate for recipe in tried if replace(recipe, rate=best.rate) == best)
    options = []
    if best.rate != DEFAULT_RATE and best.rate in (rates[0], rates[-1]):
        place = _GRID.index(best.rate) + (1 if best.rate == rates[-1] else -1)
        options += [replace(best, rate=rate) for rate in _GRID[max(0, place) : place + 1]]
    longer = replace(best, steps=2 * best.steps)
    needed_s = folds.seconds(longer, range(FOLDS)) + folds.ending_s(longer)
    if folds.gains_by_steps(best) and needed_s <= folds.context.state.limit.left_s:
        options.append(longer)
    return next((option for option in options if option not in tried), None)
