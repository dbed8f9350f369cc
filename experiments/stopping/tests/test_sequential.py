"""Comparisons that stop: verdicts follow bounds, the family shares its level, stopping is a function of the data."""

import math
from itertools import product
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from experiments.stopping.sequential import StoppingRule, adjusted, follow
from experiments.stopping.spending import Spending, boundaries

LOOKS = (5, 10, 15, 20, 25, 30)
RULE = StoppingRule("both", 0.01, LOOKS)


def drawn(mean: float, n: int = 30, seed: int = 0, sd: float = 0.01) -> list[float]:
    """Differences with exactly this mean and standard deviation."""
    values = np.random.default_rng(seed).normal(size=n)
    return list(mean + sd * (values - values.mean()) / values.std(ddof=1))


@pytest.mark.parametrize(("mean", "verdict"), [(0.02, "supported"), (-0.03, "refuted")])
def test_a_clear_gain_or_loss_is_decided_before_the_maximum(mean, verdict) -> None:
    (course,) = follow({"clear": drawn(mean)}, RULE)
    assert (course.superiority, course.noninferiority, course.stopped) == (verdict, verdict, "decided")
    look = course.looks[-1]
    assert course.next_look is None
    assert look.pairs < 30
    assert look.low > 0 if mean > 0 else look.high < -0.01


def test_bounds_are_those_of_a_t_test_at_the_level_that_is_spent() -> None:
    values = drawn(0.004)
    (course,) = follow({"one": values}, StoppingRule("superiority", 0.01, LOOKS, futility=0))
    bounds = boundaries([n / 30 for n in LOOKS], 0.05)
    for look, bound in zip(course.looks, bounds, strict=False):
        data = np.array(values[: look.pairs])
        critical = stats.t.isf(stats.norm.sf(bound), look.pairs - 1) * stats.sem(data)
        test = look.superiority
        assert test is not None
        assert look.difference == pytest.approx(data.mean())
        assert (test.upper_bound, test.lower_bound) == pytest.approx((critical, -critical))
        assert (look.low, look.high) == pytest.approx((data.mean() - critical, data.mean() + critical))
        assert (test.p_value <= 0.05) == (data.mean() >= critical)


def test_alpha_of_a_decided_comparison_passes_to_the_others() -> None:
    """One that misses half the level by itself is supported beside another that is clear."""
    rule = StoppingRule("superiority", 0.01, (12,))
    t = stats.t.isf(0.04, 11)
    middling = [value + t * 0.01 / math.sqrt(12) for value in drawn(0.0, n=12)]  # p = 0.04
    for other, mean, expected in (("nothing", 0.0, "not decided"), ("clear", 0.03, "supported")):
        courses = follow({"middling": middling, other: drawn(mean, n=12, seed=1)}, rule)
        assert [course.superiority for course in courses] == [expected] * 2


def test_a_comparison_that_had_stopped_still_gains_from_what_passes_on() -> None:
    """It met the bound of the whole level, not of half of it, and lost that again; then the other one is decided."""
    rule = StoppingRule("superiority", 0.01, (12, 24), form="pocock", futility=0)
    bounds = [stats.t.isf(stats.norm.sf(boundaries([0.5, 1.0], level, "pocock")[0]), 11) for level in (0.05, 0.025)]
    first = np.array(drawn(0.0, n=12)) + np.mean(bounds) * 0.01 / math.sqrt(12)
    early = [*first, *drawn(-first.mean(), n=12, seed=3)]
    late = [*drawn(0.002, n=12, seed=5), *drawn(0.03, n=12, seed=2)]
    before, after = (follow({"early": early, "late": late[:n]}, rule) for n in (12, 24))
    assert (before[0].superiority, before[0].stopped) == ("not decided", "maximum")
    assert before[1].stopped is None
    assert after[1].superiority == "supported"
    assert (after[0].superiority, after[0].stopped) == ("supported", "decided")


def naive_graph(p_values: np.ndarray, level: float) -> np.ndarray:
    """Maurer & Bretz's algorithm on the graph itself: weights and edges, one rejection after another."""
    m, q = p_values.shape
    nodes = list(product(range(m), range(q)))
    weight = {node: (1 / m if node[1] == 0 else 0.0) for node in nodes}
    edge = {(a, b): 0.0 for a in nodes for b in nodes}
    for i, j in nodes:
        for other in range(m):
            if j + 1 < q:
                edge[(i, j), (i, j + 1)] = 1.0
            elif other != i:
                edge[(i, j), (other, 0)] = 1 / (m - 1)
    rejected = np.zeros((m, q), dtype=bool)
    remaining = set(nodes)
    while hits := [
        node for node in sorted(remaining) if weight[node] > 0 and p_values[node] <= weight[node] * level * (1 + 1e-12)
    ]:
        gone = hits[0]
        rejected[gone] = True
        remaining.remove(gone)
        for a in remaining:
            weight[a] += weight[gone] * edge[gone, a]
        changed = {}
        for a, b in product(remaining, remaining):
            if a != b:
                through = edge[a, gone] * edge[gone, a]
                changed[a, b] = (edge[a, b] + edge[a, gone] * edge[gone, b]) / (1 - through) if through < 1 else 0.0
        edge.update(changed)
    return rejected


@given(data=st.data(), m=st.integers(1, 4), q=st.integers(1, 2))
@settings(max_examples=200)
def test_the_level_passes_on_as_on_the_graph(data, m, q) -> None:
    values = st.sampled_from([0.001, 0.008, 0.012, 0.013, 0.016, 0.02, 0.024, 0.026, 0.04, 0.06, 0.5])
    p_values = np.array([[data.draw(values) for _ in range(q)] for _ in range(m)])
    nested = np.sort(p_values, axis=1)
    assert ((adjusted(nested) <= 0.05) == naive_graph(nested, 0.05)).all()


@given(
    mean=st.sampled_from([-0.02, -0.01, 0.0, 0.004, 0.01]),
    seed=st.integers(0, 50),
    cut=st.integers(0, 30),
    asked=st.sampled_from(["superiority", "non-inferiority", "both"]),
    form=st.sampled_from(get_args(Spending)),
)
@settings(max_examples=40)
def test_more_data_only_adds_looks(mean, seed, cut, asked, form) -> None:
    """A killed study goes on where it was: what was seen stays, and what has stopped stays stopped."""
    rule = StoppingRule(asked, 0.01, LOOKS, form=form)  # type: ignore[arg-type]
    rng = np.random.default_rng(seed)
    full = {name: list(rng.normal(mean + shift, 0.01, 30)) for name, shift in (("a", 0.0), ("b", 0.01))}
    before = follow({name: values[:cut] for name, values in full.items()}, rule)
    after = follow(full, rule)
    for early, late in zip(before, after, strict=True):
        assert late.looks[: len(early.looks)] == early.looks
        assert early.next_look is None or early.next_look == LOOKS[len(early.looks)]
        if early.stopped == "decided":
            assert late == early


@given(mean=st.floats(-0.02, 0.02), seed=st.integers(0, 50), form=st.sampled_from(get_args(Spending)))
@settings(max_examples=60)
def test_a_verdict_is_a_bound_that_was_met(mean, seed, form) -> None:
    """Of a comparison alone, whose bounds never move; among several, those of looks before can still fall."""
    values = list(np.random.default_rng(seed).normal(mean, 0.01, 30))
    (course,) = follow({"a": values}, StoppingRule("both", 0.01, LOOKS, form=form))  # type: ignore[arg-type]
    for question in ("superiority", "noninferiority"):
        tests = [(look.difference, getattr(look, question)) for look in course.looks]
        above = [difference >= test.upper_bound for difference, test in tests]
        below = [difference <= test.lower_bound for difference, test in tests]
        assert [any(above[: k + 1]) for k in range(len(tests))] == [test.p_value <= 0.05 for _, test in tests]
        assert [any(below[: k + 1]) for k in range(len(tests))] == [test.opposite_p_value <= 0.05 for _, test in tests]
        expected = "supported" if any(above) else "refuted" if any(below) else "not decided"
        assert getattr(course, question) == expected


def test_no_difference_stops_for_futility_unless_that_is_off() -> None:
    values = [0.01, -0.01] * 15
    (stopped,) = follow({"a": values}, StoppingRule("superiority", 0.01, LOOKS))
    (goes_on,) = follow({"a": values}, StoppingRule("superiority", 0.01, LOOKS, futility=0))
    assert (stopped.stopped, stopped.superiority, goes_on.stopped) == ("futile", "not decided", "maximum")
    assert stopped.looks[-1].pairs < 30
    assert goes_on.looks[-1].predictive_power is None


def test_correlation_of_folds_widens_bounds_as_nadeau_and_bengio_do() -> None:
    values = drawn(0.004, n=10)
    plain, folds = (
        follow({"a": values}, StoppingRule("superiority", 0.01, (10,), correlation=correlation))[0].looks[0].superiority
        for correlation in (0.0, 0.25)
    )
    assert plain is not None
    assert folds is not None
    assert folds.upper_bound / plain.upper_bound == pytest.approx(math.sqrt((1 / 10 + 0.25) * 10))
    rule = StoppingRule("superiority", 0.01, (5, 10), correlation=0.25)
    assert rule.fractions == pytest.approx((0.35 / 0.45, 1.0))


@pytest.mark.parametrize("values", [[], [0.02], [0.02] * 10, [0.82 - 0.81, 0.81 - 0.80] * 5])
def test_too_few_pairs_or_no_spread_decide_nothing(values) -> None:
    (course,) = follow({"a": values}, StoppingRule("both", 0.01, (1, 5, 30)))
    assert (course.superiority, course.noninferiority, course.stopped) == ("not decided", "not decided", None)
    assert all(math.isinf(look.low) and math.isinf(look.high) for look in course.looks)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"lora": [0.01] * 31}, "lora: expected at most the 30 pairs that were declared, got 31"),
        ({"lora": [0.01, math.nan]}, "lora: .* got nan at position 1"),
    ],
)
def test_data_that_do_not_fit_the_rule_are_refused_by_name(data, words) -> None:
    with pytest.raises(ValueError, match=words):
        follow(data, RULE)
