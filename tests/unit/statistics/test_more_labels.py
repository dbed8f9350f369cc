"""What twice as many labels bring, by a power law through two errors."""

import numpy as np
import pytest

from peft_vit.base.statistics.more_labels import gain_of_doubling


def wrong(error: float, images: int) -> np.ndarray:
    return np.arange(images) < round(error * images)


def test_it_is_the_power_law_through_both_points() -> None:
    gain = gain_of_doubling(wrong(0.4, 2000), wrong(0.3, 2000), share=0.8)
    exponent = np.log2(0.4 / 0.3)
    now = 0.3 * 0.8**exponent  # of all images, where the second point has four fifths of them
    assert gain.estimate == pytest.approx(now - now * 2**-exponent)
    assert gain.low < gain.estimate < gain.high
    of_steps = gain_of_doubling(wrong(0.4, 2000), wrong(0.3, 2000), share=1.0)
    assert of_steps.estimate == pytest.approx(0.3 - 0.3**2 / 0.4)
    alike = gain_of_doubling(wrong(0.4, 2000), wrong(0.3, 2000), share=0.8, error=0.1)  # a third of the errors
    assert alike.estimate == pytest.approx(0.1 - 0.1 * 2**-exponent)
    few = gain_of_doubling(wrong(0.4, 100), wrong(0.3, 100), share=0.8)
    assert few.high - few.low > 2 * (gain.high - gain.low)


def test_nothing_is_lost_by_more_labels_and_weights_count() -> None:
    assert gain_of_doubling(wrong(0.2, 100), wrong(0.25, 100), share=0.8).estimate == 0
    assert gain_of_doubling(wrong(0.0, 100), wrong(0.0, 100), share=0.8).high == 0
    half, whole = wrong(0.4, 100), wrong(0.3, 100)
    weights = np.where(np.arange(100) < 50, 1.0, 0.0)
    weighted, plain = (gain_of_doubling(half, whole, given, share=0.8).estimate for given in (weights, None))
    assert weighted > 1.5 * plain


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    exponent = np.log2(0.35 / 0.28)
    now = 0.28 * 0.8**exponent
    truth, held = now - now * 2**-exponent, 0
    for _ in range(60):
        hard = rng.uniform(size=300)
        other = np.where(rng.uniform(size=300) < 0.5, hard, rng.uniform(size=300))  # partly the same images
        gain = gain_of_doubling(hard < 0.35, other < 0.28, share=0.8)
        held += gain.low <= truth <= gain.high
    assert held >= 51
