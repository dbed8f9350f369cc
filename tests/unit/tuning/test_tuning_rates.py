"""Which learning rate of a kind is taken."""

from pathlib import Path

from peft_vit.tuning.rates import RATES, SuccessiveHalving
from peft_vit.tuning.running import Outcome


def came_to(validation: float, test: float, nll: float = 0.5) -> Outcome:
    return Outcome(validation, nll, test, 0.01, 0.01, 1.0, Path("run"))


def test_a_rate_needs_more_than_the_luckiest_validation() -> None:
    halving = SuccessiveHalving("lora", 0, 12)
    low, middle, high = RATES
    halving.hear(low, came_to(0.92, 0.80))  # one lucky step
    halving.hear(middle, came_to(0.90, 0.88))
    halving.hear(high, came_to(0.70, 0.70))
    assert set(halving.goes_on()) == {low, middle}
    best = halving.best({low: came_to(0.91, 0.82), middle: came_to(0.90, 0.88)})
    assert best is not None
    assert (best.learning_rate, best.score) == (middle, 0.90)  # the score stays that of validation images


def test_of_equal_accuracies_the_lower_nll_wins() -> None:
    halving = SuccessiveHalving("lora", 0, 12)
    for rate, nll in zip(RATES, (0.6, 0.4, 0.5), strict=True):
        halving.hear(rate, came_to(0.9, 0.9, nll))
    best = halving.best({})
    assert best is not None
    assert best.learning_rate == RATES[1]
