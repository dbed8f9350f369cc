"""The same inputs in another order give the same bytes; what can't be computed is said in words, never as NaN."""

from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peft_vit.statistics import (
    beyond_margin,
    effect_size,
    equivalence,
    equivalence_verdict,
    inferiority,
    interquartile_mean_interval,
    mean_interval,
    mixed_effect,
    noninferiority,
    paired_improvement,
    wilcoxon,
)

# Accuracies of 600 images and arbitrary floats: ties, and sums that depend on their order.
VALUES = st.lists(
    st.one_of(st.integers(-600, 600).map(lambda k: k / 600), st.floats(-1e3, 1e3, allow_subnormal=False)),
    min_size=1,
    max_size=14,
)
FUNCTIONS = {
    "t interval": mean_interval,
    "paired improvement": paired_improvement,
    "effect size": effect_size,
    "Wilcoxon": wilcoxon,
    "equivalence": lambda x: equivalence(x, 0.1),
    "beyond margin": lambda x: beyond_margin(x, 0.1),
    "non-inferiority": lambda x: noninferiority(x, 0.1),
    "inferiority": lambda x: inferiority(x, 0.1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=25)
@example(values=[0.0, 1e-210, 3e-210], data=None)  # squares of these are zero
@given(values=VALUES, data=st.data())
def test_order_does_not_change_a_bit_and_nothing_is_nan(
    name: str, values: list[float], data: st.DataObject | None
) -> None:
    function = FUNCTIONS[name]
    other = values[::-1] if data is None else data.draw(st.permutations(values))
    first, second = function(np.array(values)), function(np.array(other))
    assert first == second
    numbers = [x for x in np.atleast_1d(astuple(first)) if isinstance(x, float)]
    assert all(np.isfinite(x) for x in numbers)


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), runs=st.integers(1, 6), tasks=st.integers(1, 4))
def test_order_of_runs_and_tasks_does_not_change_a_bit(seed: int, runs: int, tasks: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 600, (runs, tasks)) / 600
    shuffled = rng.permuted(values, axis=0)[:, rng.permutation(tasks)]
    one, other = (interquartile_mean_interval(x, np.random.default_rng(1), resamples=40) for x in (values, shuffled))
    assert one == other


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6))
def test_order_of_runs_does_not_change_a_bit_of_a_mixed_model(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups, condition = np.repeat([f"seed {i}" for i in range(5)], 2), np.tile([0, 1], 5)
    response = rng.normal(0.8, 0.02, 10)
    order = rng.permutation(10)
    assert mixed_effect(response, condition, groups) == mixed_effect(response[order], condition[order], groups[order])


# One difference that floats write in several ways is one difference.
SAME = np.array([0.82 - 0.81, 0.81 - 0.80, 0.80 - 0.79, 0.79 - 0.78, 0.78 - 0.77, 0.77 - 0.76])


def test_rounding_is_no_scatter_and_breaks_no_tie() -> None:
    assert len(set(SAME.tolist())) > 1
    assert equivalence(SAME, 0.02).sentence() == "not decidable: the differences have no spread"
    assert effect_size(SAME).reason == "the differences have no spread"
    scattered = np.array([0.82 - 0.81, 0.80 - 0.81, 0.80 - 0.79, 0.79 - 0.76, 0.77 - 0.78, 0.77 - 0.72])
    whole = np.rint(100 * scattered)
    assert wilcoxon(scattered).p_value == wilcoxon(whole).p_value


def test_a_verdict_needs_a_decidable_test_on_either_side() -> None:
    none = equivalence(SAME, 0.02)
    assert equivalence_verdict(none, beyond_margin(SAME, 0.02), None, None) == "not decided"
    alike = equivalence([0.01, -0.01, 0.0, 0.02], 1.0)
    far = beyond_margin([0.01, -0.01, 0.0, 0.02], 1.0)
    assert equivalence_verdict(alike, far, alike.p_value, far.p_value) == "supported"
    assert equivalence_verdict(alike, far, 0.06, far.p_value) == "not decided"


def test_runs_without_spread_have_no_interval() -> None:
    rng = np.random.default_rng(0)
    assert interquartile_mean_interval([[0.8]] * 3, rng).reason == "all resamples give the same value"
    assert interquartile_mean_interval([[0.8, 0.9]], rng).reason == "one run has no spread to resample"


def test_effect_sizes_that_do_not_exist_are_said_in_words() -> None:
    assert effect_size([0.3]).reason == "one pair has no spread"
    two = effect_size([0.1, 0.3])
    assert two.d is not None
    assert (two.g, two.reason) == (None, "Hedges' correction needs three pairs")


@pytest.mark.parametrize(
    ("response", "condition", "groups", "words"),
    [
        ([1, 2, 3, 4], [0, 1, 0, 1], "aaaa", "one group"),
        ([1, 2, 3, 4], [0, 0, 0, 0], "aabb", "the same in all runs"),
        ([1, 2, 3, 4], [0, 1, 0, 1], "abcd", "one run a group"),
        ([1, 2, 3], [0, 1, 0], "aab", "too few runs"),
        ([1, 2, 3, 5], [0, 0, 1, 1], "aabb", "too few runs"),
        ([1, 2, 3, 4], [0, 1, 0, 1], "aabb", "no variance within groups"),
    ],
)
def test_mixed_models_that_the_runs_cannot_tell_are_refused(response, condition, groups: str, words: str) -> None:
    own = mixed_effect(response, condition, list(groups))
    assert own.estimate is None
    assert words in str(own.note)


def test_mixed_models_at_the_edge_or_without_an_end_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    response, condition, groups = rng.normal(size=20), np.tile([0, 1], 10), np.repeat(np.arange(10), 2)
    response[::2], response[1::2] = response[1::2] - response[::2], response[::2] - response[1::2]  # r = -1 in a group
    edge = mixed_effect(response + rng.normal(0, 0.1, 20), condition, groups)
    assert "below a hundredth" in str(edge.note)
    from statsmodels.regression.mixed_linear_model import MixedLM

    fit = MixedLM.fit
    monkeypatch.setattr(MixedLM, "fit", lambda self, **options: fit(self, reml=True, method="powell", maxiter=1))
    assert mixed_effect(response + 5 * groups, condition, groups).note == "the fit did not converge"

    def singular(self, *args, **options):
        raise np.linalg.LinAlgError("Singular matrix")

    monkeypatch.setattr(MixedLM, "fit", singular)
    assert mixed_effect(response, condition, groups).note == "the fit failed: singular matrix"


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scores: .* got nan at position 1"):
        interquartile_mean_interval([[1, 2], [np.nan, 3]], np.random.default_rng(0))
    with pytest.raises(ValueError, match="positive margin"):
        equivalence([1.0, 2.0], float("nan"))
    with pytest.raises(ValueError, match="0 < confidence < 1"):
        effect_size([1.0, 2.0], 95)
    with pytest.raises(ValueError, match="equal lengths, got 2 responses, 2 conditions, 3 groups"):
        mixed_effect([1, 2], [0, 1], list("abc"))
