"""How often verdicts are wrong, over 1,000 simulated studies with a known truth.

Each rate is compared with what it must be within three Monte-Carlo standard errors; where a test only promises a
bound, with that bound. That single tests are those of scipy and statsmodels is in tests/oracle.
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from peft_vit.base.statistics import (
    beyond_margin,
    equivalence,
    equivalence_verdict,
    holm,
    inferiority,
    noninferiority,
    verdict,
    wilcoxon,
)

STUDIES, ALPHA = 1000, 0.05


def three_errors(rate: float) -> float:
    return 3 * np.sqrt(max(rate * (1 - rate), 1 / STUDIES) / STUDIES)


def is_rate(share: float, rate: float) -> bool:
    return abs(share - rate) <= three_errors(rate)


def is_at_most(share: float, rate: float) -> bool:
    return share <= rate + three_errors(rate)


def planted(kind: str, n: int, seed: int = 0) -> np.ndarray:
    """Return differences between two methods that are equally good: (studies, n)."""
    rng = np.random.default_rng(seed)
    size = (STUDIES, n)
    if kind == "normal":
        return rng.normal(0, 1, size)
    if kind == "unequal variance of the two methods":
        return rng.normal(0, 5, size) - rng.normal(0, 1, size)
    if kind == "unequal variance of the seeds":
        return rng.normal(0, 1, size) * np.geomspace(0.2, 5, n)
    assert kind == "ties"
    return (rng.integers(480, 486, size) - rng.integers(480, 486, size)) / 600  # whole images, zeros among them


@pytest.mark.parametrize(
    "kind", ["normal", "unequal variance of the two methods", "unequal variance of the seeds", "ties"]
)
def test_equal_methods_are_told_apart_no_more_often_than_alpha(kind) -> None:
    """Signs are random given the sizes, so the test holds its level whatever the variances are."""
    tests = [(row.mean(), wilcoxon(row)) for row in planted(kind, 8)]
    counted = Counter(verdict(mean, test, test.p_value, ALPHA) for mean, test in tests)
    assert is_at_most((counted["supported"] + counted["refuted"]) / STUDIES, ALPHA)
    assert is_at_most(counted["supported"] / STUDIES, ALPHA / 2)
    assert is_at_most(counted["refuted"] / STUDIES, ALPHA / 2)


@pytest.mark.parametrize("equal", [0, 2])
def test_a_family_of_comparisons_errs_at_most_as_often_as_one(equal) -> None:
    """Three comparisons at n = 8 under Holm, of which the first have an effect: false verdicts on the others."""
    rng = np.random.default_rng(1)
    wrong = 0
    for study in rng.normal(0, 1, (STUDIES, 3, 8)) + np.where(np.arange(3) < equal, 3.0, 0.0)[:, None]:
        tests = [replace(wilcoxon(row), minimum_n=7) for row in study]
        adjusted = holm([test.p_value for test in tests])
        verdicts = [verdict(row.mean(), *pair) for row, *pair in zip(study, tests, adjusted, strict=True)]
        wrong += any(counted != "not decided" for counted in verdicts[equal:])
    assert is_at_most(wrong / STUDIES, ALPHA)


@pytest.mark.parametrize(
    ("shown", "opposite", "means"),
    [(equivalence, beyond_margin, [3.0, -3.0, 3.0]), (noninferiority, inferiority, [-3.0, -3.0, -3.0])],
)
def test_a_family_of_claims_holds_its_level(shown, opposite, means) -> None:
    """All three means stand at the margin, where both errors are at their largest."""
    rng = np.random.default_rng(2)
    false: Counter[str] = Counter()
    for study in rng.normal(0, 1, (STUDIES, 3, 8)) + np.array(means)[:, None]:
        a, b = [shown(row, 3.0) for row in study], [opposite(row, 3.0) for row in study]
        adjusted = zip(a, b, holm([t.p_value for t in a]), holm([t.p_value for t in b]), strict=True)
        false.update({equivalence_verdict(*each, ALPHA) for each in adjusted})
    independent = 1 - (1 - ALPHA / 3) ** 3
    assert is_rate(false["supported"] / STUDIES, independent)
    level = independent if shown is noninferiority else 1 - (1 - ALPHA / 6) ** 3  # one of two sides can be wrong
    assert is_rate(false["refuted"] / STUDIES, level)
