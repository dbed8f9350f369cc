"""How often verdicts are wrong, over 1,000 simulated studies with a known truth.

Each rate is compared with what the test's distribution says it must be, from formulas that the package does not use,
within three Monte-Carlo standard errors. Where a test only promises a bound, with that bound.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy import integrate, special, stats

from peft_vit.base.statistics import (
    Significance,
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
Test = Callable[[np.ndarray], Significance]


def three_errors(rate: float) -> float:
    return 3 * np.sqrt(max(rate * (1 - rate), 1 / STUDIES) / STUDIES)


def is_rate(share: float, rate: float) -> bool:
    return abs(share - rate) <= three_errors(rate)


def is_at_most(share: float, rate: float) -> bool:
    return share <= rate + three_errors(rate)


def superiority(differences: np.ndarray, test: Test) -> Counter[str]:
    """Count verdicts over studies of one comparison: (studies, n)."""
    tests = [(row.mean(), test(row)) for row in differences]
    return Counter(verdict(mean, significance, significance.p_value, ALPHA) for mean, significance in tests)


def within_margin(
    differences: np.ndarray, margin: float, shown: Callable[..., Significance], opposite: Callable[..., Significance]
) -> Counter[str]:
    """Count verdicts over studies of one claim: (studies, n)."""
    tests = [(shown(row, margin), opposite(row, margin)) for row in differences]
    return Counter(equivalence_verdict(a, b, a.p_value, b.p_value, ALPHA) for a, b in tests)


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
    counted = superiority(planted(kind, 8), wilcoxon)
    assert is_at_most((counted["supported"] + counted["refuted"]) / STUDIES, ALPHA)
    assert is_at_most(counted["supported"] / STUDIES, ALPHA / 2)
    assert is_at_most(counted["refuted"] / STUDIES, ALPHA / 2)


def test_exact_wilcoxon_errs_as_often_as_its_distribution_says() -> None:
    """Positive rank sums of ten untied pairs by enumeration: the largest attainable level below 5 %."""
    ranks = ((np.arange(2**10)[:, None] >> np.arange(10)) & 1) @ np.arange(1, 11)
    tails = [2 * np.mean(ranks <= limit) for limit in range(20)]
    level = max(tail for tail in tails if tail <= ALPHA)
    counted = superiority(planted("normal", 10), wilcoxon)
    assert is_rate(counted["supported"] / STUDIES, level / 2)
    assert is_rate(counted["refuted"] / STUDIES, level / 2)


@pytest.mark.parametrize(("shift", "right", "wrong"), [(2.0, "supported", "refuted"), (-2.0, "refuted", "supported")])
def test_a_large_effect_is_found_and_never_in_the_wrong_direction(shift, right, wrong) -> None:
    counted = superiority(planted("normal", 10) + shift, wilcoxon)
    assert counted[right] / STUDIES > 0.98  # the t test's power at d = 2 is 0.9997, Wilcoxon's efficiency 95 %
    assert counted[wrong] == 0


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


# Claims within a margin. Differences have standard deviation 1; the probability of each verdict is known exactly.


def above(mean: float, margin: float, n: int, alpha: float = ALPHA) -> float:
    """Return how often a one-sided t test at alpha shows that the mean lies above the margin."""
    critical = stats.t.ppf(1 - alpha, n - 1)
    return float(stats.nct.sf(critical, n - 1, (mean - margin) * np.sqrt(n)))


def inside(mean: float, margin: float, n: int) -> float:
    """Return how often two one-sided t tests show that the mean lies within the margins: given s, then over s."""
    critical = stats.t.ppf(1 - ALPHA, n - 1)

    def given(s: float) -> float:
        room = margin - critical * s / np.sqrt(n)
        if room <= 0:
            return 0.0
        share = special.ndtr(np.sqrt(n) * (room - mean)) - special.ndtr(np.sqrt(n) * (-room - mean))
        return float(share * stats.chi2.pdf(s**2 * (n - 1), n - 1) * 2 * s * (n - 1))

    return integrate.quad(given, 0, margin * np.sqrt(n) / critical)[0]


@pytest.mark.parametrize("n", [3, 8])
@pytest.mark.parametrize("mean", [0.0, 1.0, 2.0, 4.0, -2.0])
def test_equivalence_within_two_standard_deviations(n, mean) -> None:
    counted = within_margin(planted("normal", n) + mean, 2.0, equivalence, beyond_margin)
    assert is_rate(counted["supported"] / STUDIES, inside(mean, 2.0, n))
    refuted = above(mean, 2.0, n, ALPHA / 2) + above(-mean, 2.0, n, ALPHA / 2)
    assert is_rate(counted["refuted"] / STUDIES, refuted)
    if abs(mean) >= 2:
        assert is_at_most(counted["supported"] / STUDIES, ALPHA)
    if abs(mean) <= 2:
        assert is_at_most(counted["refuted"] / STUDIES, ALPHA)


@pytest.mark.parametrize("n", [3, 8])
@pytest.mark.parametrize("mean", [0.5, 0.0, -1.0, -2.5])
def test_noninferiority_by_one_standard_deviation(n, mean) -> None:
    counted = within_margin(planted("normal", n) + mean, 1.0, noninferiority, inferiority)
    assert is_rate(counted["supported"] / STUDIES, above(mean, -1.0, n))
    assert is_rate(counted["refuted"] / STUDIES, above(-mean, 1.0, n))


def test_ties_at_the_margin_are_no_proof() -> None:
    """Whole images of 600, half of them at the margin of 1 image and around it: the level holds nearly."""
    differences = planted("ties", 8) + 8 / 600
    counted = within_margin(differences, 8 / 600, equivalence, beyond_margin)
    assert is_at_most(counted["supported"] / STUDIES, ALPHA)
    assert is_at_most(counted["refuted"] / STUDIES, ALPHA / 2)


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
