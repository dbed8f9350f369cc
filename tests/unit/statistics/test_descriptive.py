import numpy as np
import pytest

from peft_vit.statistics import gini, normalized_entropy, spearman


def test_equal_amounts_and_one_taker_and_the_mean_absolute_difference() -> None:
    assert (gini([3, 3, 3, 3]), normalized_entropy([3, 3, 3, 3])) == pytest.approx((0, 1))
    assert (gini([0, 0, 0, 5]), normalized_entropy([0, 0, 0, 5])) == pytest.approx((3 / 4, 0.0))
    ranks = np.random.default_rng(0).integers(0, 9, 40)
    pairs = np.abs(ranks[:, None] - ranks[None, :]).sum()
    assert gini(ranks) == pytest.approx(pairs / (2 * 40**2 * ranks.mean()), abs=1e-12)
    assert spearman([1, 1, 1], [1, 2, 3]) is spearman([], []) is None, "constant lists have no order"


@pytest.mark.parametrize(
    ("measure", "amounts", "words"),
    [
        *((gini, amounts, "positive sum") for amounts in ([], [0, 0], [-1, 2], [np.nan, 1])),
        (normalized_entropy, [4], "two sites"),
        (lambda x: spearman(x, [1]), [1, 2], "equal lengths"),
    ],
)
def test_meaningless_amounts_are_refused(measure, amounts, words) -> None:
    with pytest.raises(ValueError, match=words):
        measure(amounts)
