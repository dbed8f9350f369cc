"""The race: who goes on, what is chosen, and what is guessed."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from peft_vit.tasks.classification import ACCURACY, BALANCED_ACCURACY
from peft_vit.tuning.race import LOOKS, RaceResult, best_guess, images_that_count, race, rule_of
from peft_vit.tuning.result import Candidate

NAMES = ("probe_int2", "probe_nf4", "lora_nf4", "lora_r8")


def raced(
    losses: Mapping[str, float],
    folds: int = LOOKS[-1],
    limit: int = 10**9,
    spread: float = 1e-3,
    failing: str = "",
    images: int = 2000,
) -> tuple[RaceResult, dict[str, int]]:
    """Race with planted losses, as far as there are folds; also how many folds each has done.

    One that fails has its first three folds alone.
    """
    rng = np.random.default_rng(0)
    scores = {name: (0.9 - losses.get(name, 0.0) + spread * rng.standard_normal(LOOKS[-1])).tolist() for name in NAMES}
    done = dict.fromkeys(NAMES, 0)

    def run(names: Sequence[str], pairs: int) -> dict[str, list[float]]:
        for name in names:
            done[name] = max(done[name], min(pairs, 3 if name == failing else folds))
        return {name: scores[name][: done[name]] for name in NAMES}

    candidates = [Candidate(name, {}, 100 * (1 + place)) for place, name in enumerate(NAMES)]
    rule = rule_of(0.01, 0.3, images)
    found = race(candidates, "lora_r8", rule, run, lambda one: one.bytes <= limit, lambda _: None)
    return found, done


def test_the_smallest_that_is_shown_wins_and_larger_ones_are_left() -> None:
    found, done = raced({"probe_int2": 0.05})
    assert (found.chosen, found.shown, found.open) == ("probe_nf4", True, ())
    assert done["probe_int2"] == LOOKS[0]  # it was shown to lose at once
    assert done["lora_nf4"] <= done["probe_nf4"]


def test_the_reference_is_chosen_once_all_smaller_ones_are_shown_to_lose() -> None:
    found, _ = raced(dict.fromkeys(NAMES[:3], 0.05))
    assert (found.chosen, found.shown) == ("lora_r8", True)
    found, _ = raced(dict(zip(NAMES[:3], (0.05, 0.04, 0.03), strict=True)), limit=300)
    assert (found.chosen, found.shown) == ("lora_nf4", False)  # the reference does not fit, and this one comes closest


def test_what_scatters_is_not_decided() -> None:
    found, _ = raced({}, spread=0.05)
    assert not found.shown
    found, done = raced({"probe_int2": 0.05, "probe_nf4": -0.01}, folds=3)
    assert (found.chosen, found.shown) == ("probe_nf4", False)
    assert found.open == NAMES[:3]
    assert set(done.values()) == {3}


def test_on_easy_images_where_all_are_equal_the_smallest_is_shown() -> None:
    found, done = raced({}, spread=0.0)
    assert (found.chosen, found.shown, done["probe_int2"]) == ("probe_int2", True, LOOKS[0])
    found, _ = raced({}, spread=0.0, images=150)
    assert (found.chosen, found.shown) == ("probe_int2", False)


def test_images_count_once_and_classes_as_much_as_the_rarest() -> None:
    assert images_that_count((300, 100), None, ACCURACY) == 400
    assert images_that_count((300, 100), 200, ACCURACY) == 200  # each has a copy
    assert images_that_count((300, 100), None, BALANCED_ACCURACY) == 200
    assert images_that_count((300, 100), 320, BALANCED_ACCURACY) == 160


def test_one_that_fails_does_not_end_the_race_of_others_and_a_reference_alone_is_chosen() -> None:
    found, done = raced({}, failing="probe_int2")
    assert (found.chosen, found.shown, found.open) == ("probe_nf4", True, ("probe_int2",))
    assert done["probe_int2"] == 3
    alone = [Candidate("lora_r8", {}, 100), Candidate("probe", {}, 200, left_out="larger")]
    found = race(alone, "lora_r8", rule_of(0.01, 0.3, 2000), lambda *_: {}, lambda _: True, lambda _: None)
    assert (found.chosen, found.shown) == ("lora_r8", True)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ((-0.02, 0.001, 0.004), "b"),  # the smallest of those that are not behind
        ((-0.02, -0.002, -0.001), "reference"),
        ((0.03, None, None), "a"),
        ((None, None, None), "reference"),
    ],
)
def test_a_guess_is_the_smallest_that_is_not_behind(differences: tuple[float | None, ...], expected: str) -> None:
    candidates = [
        Candidate(name, {}, 100 + place, difference=difference)
        for place, (name, difference) in enumerate(zip("abc", differences, strict=True))
    ]
    reference = Candidate("reference", {}, 1000)
    assert best_guess([*candidates, reference], reference).name == expected
    behind = [Candidate("a", {}, 100, difference=-0.02), Candidate("b", {}, 200, difference=-0.03)]
    assert best_guess(behind, reference).name == "a"  # the closest, where the reference can't be had
