"""The finalists on folds, in the order in which time goes to them, and which one is taken.

First the best LoRA, whose folds also give its forms that are rounded after training, and half of its steps, by which it
is known whether a longer last training gains: then that is reserved. What is left goes to its other folds, to the
second-best LoRA, AdaLoRA, a rank of 2 and QA-LoRA, and to other folds for what was taken and what it is compared with.
QA-LoRA comes earlier where less than 4 bits are allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from peft_vit.base.errors import UserError
from peft_vit.base.statistics.odds import Odds, choose_model
from peft_vit.core.config import QuantizationType
from peft_vit.fit.costs import LONGEST, SHORTEST
from peft_vit.fit.folds import Folds
from peft_vit.fit.recipe import Recipe, rate_of
from peft_vit.runs.costs.time_limit import FEWEST_FOLDS, FOLDS, Limit

_FEWEST, _FIRST, _SECOND = range(FEWEST_FOLDS), range(FOLDS), range(2 * FOLDS)  # seeds: a repetition's, of both
_LEAST, _HALVED = 2, range(2)  # folds that decide of a training if time is short; seeds of half of the steps
_SMALL_RANK = 2
NO_MODEL = "ended before a single model; give more, and the same command continues"


@dataclass(frozen=True)
class Candidate:
    """A model that was compared."""

    recipe: Recipe  # of it
    bytes: int  # that its file is expected to have
    folds: int  # that it has done
    odds: Odds | None  # against the best float model; None: the search has dropped it
    why: str  # it was not taken; empty: it was


@dataclass(frozen=True)
class Decision:
    """What is taken, and beside what."""

    candidates: tuple[Candidate, ...]  # smallest first
    taken: Candidate  # one of them
    odds: Odds  # of it
    reference: Recipe  # the best float model found


def compare(folds: Folds, probe: Recipe, ranked: Sequence[Recipe]) -> list[Recipe]:
    """Bring the finalists to folds, and return those that there was no time for.

    Args:
        folds: of the tuning.
        probe: the best regression, on the fewest folds already.
        ranked: of LoRA, the best first; none: there is no time to train.
    """
    best, state = ranked[0] if ranked else probe, folds.context.state
    for fold in _FEWEST:  # each says more about how long the last training takes
        longer, over_s = (SHORTEST, state.over_s) if fold < _LEAST else (1.0, 0.0)
        limit = state.until(folds.ending_s(folds.costs.longest_form(best), longer) - over_s)
        _do(folds, best, [fold], limit)
    forms = folds.costs.allowed_bits(probe)
    fits = not ranked or FEWEST_FOLDS * folds.costs.rounding_s(probe, forms) <= limit.left_s
    alone = len(folds.seeds(best)) < _LEAST  # then nothing else may be small enough
    if alone or (fits and not folds.clearly_better(best, probe)):
        folds.round(probe, forms, limit)
    if ranked and folds.seconds(best.half, _HALVED) <= limit.left_s:
        folds.run([best.half], _HALVED, limit)
    if folds.gains_by_steps(best) and not folds.clearly_better(probe, best):
        limit = state.until(folds.ending_s(folds.costs.longest_form(best), LONGEST))
    left = [
        recipe
        for recipe in _in_turn(folds, probe, ranked)
        if not any(_done_in_time(folds, [recipe], seeds, limit) for seeds in (_FIRST, _FEWEST))
    ]
    decision = decide(folds)
    again = list(dict.fromkeys((decision.taken.recipe.trained, decision.reference)))
    if not left:
        _done_in_time(folds, again, _SECOND, limit)
    return left


def _done_in_time(folds: Folds, recipes: Sequence[Recipe], seeds: Sequence[int], limit: Limit) -> bool:
    """Do what is missing of some recipes' runs, if there is time for all, and return whether there was."""
    needed_s = 0.0
    for recipe in recipes:
        forms = _forms(folds, recipe)
        missing = {seed for form in (recipe, *map(recipe.rounded, forms)) for seed in folds.missing(form, seeds)}
        needed_s += folds.seconds(recipe, seeds) + len(missing) * folds.costs.rounding_s(recipe, forms)
    if needed_s > limit.left_s:
        return False
    for recipe in recipes:
        _do(folds, recipe, seeds, limit)
    return True


def _do(folds: Folds, recipe: Recipe, seeds: Sequence[int], limit: Limit) -> None:
    folds.run([recipe], seeds, limit)
    folds.round(recipe, _forms(folds, recipe), limit)


def _forms(folds: Folds, recipe: Recipe) -> list[QuantizationType]:
    """Return the formats to which a recipe is rounded on its folds; a probe, if it is compared so at all."""
    allowed = [] if recipe.bits else folds.costs.allowed_bits(recipe)
    return [bits for bits in allowed if not recipe.is_probe or folds.seeds(recipe.rounded(bits))]


def _in_turn(folds: Folds, probe: Recipe, ranked: Sequence[Recipe]) -> list[Recipe]:
    """Return what goes to all folds, in the order in which time goes to it."""
    if not ranked:
        return [probe]
    best, first = ranked[0], low_bits(folds, ranked[0])
    ranks = [replace(best, method="adalora", rate=rate_of("adalora", best.rate)), replace(best, rank=_SMALL_RANK)]
    second = [recipe for recipe in ranked[1:] if recipe != best.half][:1]
    others = [best, probe, *second, *(ranks if folds.context.request.max_adapter_bytes is None else ())]
    return [*first, *others] if first else [*others, *_packed(folds, best)]


def low_bits(folds: Folds, best: Recipe) -> list[Recipe]:
    """Return QA-LoRA with the best recipe of LoRA, where less than 4 bits are allowed."""
    return _packed(folds, best) if "int2" in folds.costs.allowed_bits(best) else []


def _packed(folds: Folds, best: Recipe) -> list[Recipe]:
    most, rate = folds.context.request.max_bytes, rate_of("qa_lora", best.rate)
    both = [replace(best, method="qa_lora", rate=rate, bits=bits, when="training") for bits in ("nf4", "int2")]
    return [recipe for recipe in both if most is None or folds.costs.bytes_of(recipe) <= most][:1]


def decide(folds: Folds) -> Decision:
    """Return which model is taken, as `statistics.odds.choose_model` does, of all that have enough folds.

    Raises:
        UserError: if nothing has a fold.
    """
    context, least = folds.context, min(FEWEST_FOLDS, max(map(len, folds.outcomes.values()), default=0))
    if not least:
        raise UserError(NO_MODEL, field="--minutes")
    most, margin, unit = context.request.max_bytes, context.request.margin_share, context.scores.unit
    # Where steps took longer than planned, no training may have more than two folds: no reason for a regression.
    trained = min(least, max([_LEAST, *(len(done) for recipe, done in folds.outcomes.items() if not recipe.is_probe)]))
    enough = {recipe: least if recipe.is_probe else trained for recipe in folds.outcomes}
    recipes = [recipe for recipe, done in folds.outcomes.items() if len(done) >= enough[recipe]]
    sizes = [folds.costs.bytes_of(recipe) for recipe in recipes]
    small = [number for number, size in enumerate(sizes) if most is None or size <= most]
    whole, half = ([n for n in small if folds.ends_in_time(recipes[n], longer)] for longer in (1.0, SHORTEST))
    fitting = whole if any(not recipes[number].is_probe for number in whole) else half or small
    floats = [number for number, recipe in enumerate(recipes) if recipe.bits is None]
    choice = choose_model(folds.measured(recipes), sizes, fitting or range(len(recipes)), floats, margin)
    taken = choice.odds[choice.chosen]

    def why(number: int) -> str:
        size, gain = sizes[number] - sizes[choice.chosen], 100 * (taken.loss - choice.odds[number].loss)
        if number == choice.chosen:
            return ""
        if number not in fitting:
            return "no time to finish it" if number in small else "larger than the limit"
        if size < 0:
            return f"expected to be {-gain:.1f} {unit} worse" if gain <= -0.05 else "smaller, but less sure"
        larger = "larger" if size > 0 else "as large"
        return f"{larger}, and {gain:.1f} {unit} better" if gain >= 0.05 else f"{larger}, and not better"

    candidates = [
        Candidate(recipe, sizes[number], len(folds.seeds(recipe)), choice.odds[number], why(number))
        for number, recipe in enumerate(recipes)
    ]
    halves = {recipe.half for recipe in folds.outcomes}
    for recipe, done in folds.outcomes.items():
        if 0 < len(done) < enough[recipe]:
            better = folds.clearly_better(recipe, recipes[choice.chosen].trained)
            reason = "half of the steps, to see what they gain" if recipe in halves else "not clearly better"
            dropped = f"{len(done)} of {FOLDS} folds: {'no time for more' if better else reason}"
            candidates.append(Candidate(recipe, folds.costs.bytes_of(recipe), len(done), None, dropped))
    ordered = tuple(sorted(candidates, key=lambda candidate: candidate.bytes))
    return Decision(ordered, candidates[choice.chosen], taken, recipes[choice.reference])
