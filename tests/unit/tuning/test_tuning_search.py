"""Which recipes are tried first, which go on, and what displaces the default."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import simulated_tunings
from simulated_tunings import MODEL, StandIns

from peft_vit.studies.within_time import Outcome
from peft_vit.tasks import Scores
from peft_vit.tasks.classification import ACCURACY
from peft_vit.tuning.folds import Folds
from peft_vit.tuning.recipe import lora
from peft_vit.tuning.search import RATES, best_of, wished
from peft_vit.tuning.sizes import SizeResult

LARGE, SMALL = (SizeResult(MODEL, size, 0.8, steps) for size, steps in ((64, 96), (48, 160)))


def test_the_default_is_tried_first_then_what_differs_from_it_in_one_thing() -> None:
    first, second, third, fourth, *rest = wished([LARGE, SMALL])
    assert first == lora(MODEL, 64, 96)
    assert [second, third] == [lora(MODEL, 64, 48), lora(MODEL, 48, 160)]
    assert fourth == lora(MODEL, 64, 96, RATES[1])
    assert len({first, second, third, fourth, *rest}) == 2 * len(RATES) * 2
    assert [recipe.steps for recipe in wished([replace(LARGE, steps=40)])] == [40] * 3  # half of it is too little


def decided(truth: Any, minutes: float = 60.0, **changes: Any) -> tuple[StandIns, Any]:
    runner = StandIns(truth, {"nf4": 0.0}, **{"images": 600, **changes})
    return runner, simulated_tunings.one_tuning(runner, minutes)


def test_a_rate_that_is_clearly_better_is_taken() -> None:
    def truth(experiment: Any, size: int) -> float:
        if experiment["method"] != "lora":
            return 0.7
        return 0.75 + 0.06 * (experiment["training"]["learning_rate"] == 3e-3)

    _, decision = decided(truth)
    assert decision.taken.recipe.rate == 3e-3


@pytest.mark.parametrize(("contenders", "displaced"), [(1, True), (10, False)])
def test_one_of_many_has_to_be_better_by_more_than_the_luckiest(contenders: int, displaced: bool) -> None:
    def outcome(right: Any) -> Outcome:  # logits of images of class 0
        return Outcome(np.arange(400), np.zeros(400, int), np.eye(2)[1 - right.astype(int)], 1.0, Path())

    usual, lucky = np.arange(400) < 300, (np.arange(400) >= 20) & (np.arange(400) < 332)  # 3 points, 1.7 errors
    context = SimpleNamespace(metric=ACCURACY, scores=Scores())
    default, best, *others = [lora(MODEL, 32, 24 + steps) for steps in range(1 + contenders)]
    outcomes = {recipe: {0: outcome(usual)} for recipe in (default, *others)} | {best: {0: outcome(lucky)}}
    folds = Folds(SimpleNamespace(context=context), lambda *_: {}, outcomes)
    assert best_of(folds, [default, best, *others]) == (best if displaced else default)


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
