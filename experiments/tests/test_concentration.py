import numpy as np
import pytest
from scipy import stats

from experiments.scripts.concentration import gini, normalized_entropy


def test_equal_amounts_and_one_taker_the_mean_absolute_difference_and_the_entropy_of_scipy() -> None:
    assert (gini([3, 3, 3, 3]), normalized_entropy([3, 3, 3, 3])) == pytest.approx((0, 1))
    assert (gini([0, 0, 0, 5]), normalized_entropy([0, 0, 0, 5])) == pytest.approx((3 / 4, 0.0))
    ranks = np.random.default_rng(0).integers(0, 9, 40)
    pairs = np.abs(ranks[:, None] - ranks[None, :]).sum()
    assert gini(ranks) == pytest.approx(pairs / (2 * 40**2 * ranks.mean()), abs=1e-12)
    assert normalized_entropy(ranks) == pytest.approx(stats.entropy(ranks) / np.log(40), abs=1e-12)
