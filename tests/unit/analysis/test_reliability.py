"""Reliability bins against plain sorting."""

from itertools import pairwise

import numpy as np
import pytest

from peft_vit.base.statistics.reliability import equal_count_bins


def drawn(n: int, seed: int, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p = rng.uniform(0.3, 1.0, n)
    if ties:
        p = np.round(p, 1)
    return p, rng.random(n) < p**2


def test_equal_count_bins_by_sorting() -> None:
    p, hit = drawn(300, 3)
    pairs = sorted(zip(p.tolist(), hit.tolist(), strict=True))
    bins = equal_count_bins(p, hit, 15)
    for place, found in enumerate(bins):
        sure, right = zip(*pairs[20 * place : 20 * (place + 1)], strict=True)
        assert (found.count, found.low, found.high) == (20, sure[0], sure[-1])
        assert (found.confidence, found.accuracy) == pytest.approx((sum(sure) / 20, sum(right) / 20), abs=1e-12)
    assert len(bins) == 15


def test_equal_confidences_stay_in_one_bin_whatever_the_order() -> None:
    p, hit = drawn(200, 4, ties=True)
    bins = equal_count_bins(p, hit, 5)
    order = np.random.default_rng(0).permutation(200)
    assert equal_count_bins(p[order], hit[order], 5) == bins
    assert all(left.high < right.low for left, right in pairwise(bins))
