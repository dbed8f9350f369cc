"""The same inputs in another order give the same bytes; what can't be computed is said in words, never as NaN."""

from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peft_vit.base.statistics import (
    beyond_margin,
    equivalence,
    equivalence_verdict,
    inferiority,
    mean_interval,
    noninferiority,
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
def test_order_does_not_change_a_bit_and_nothing_is_nan(name, values, data) -> None:
    function = FUNCTIONS[name]
    other = values[::-1] if data is None else data.draw(st.permutations(values))
    first, second = function(np.array(values)), function(np.array(other))
    assert first == second
    numbers = [x for x in np.atleast_1d(astuple(first)) if isinstance(x, float)]
    assert all(np.isfinite(x) for x in numbers)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_by_its_position(name, bad) -> None:
    with pytest.raises(ValueError, match=rf"got {bad} at position 2 \(1 of 6 are not\)"):
        FUNCTIONS[name]([0.1, 0.2, bad, 0.4, 0.5, 0.6])


# One difference that floats write in several ways is one difference.
SAME = np.array([0.82 - 0.81, 0.81 - 0.80, 0.80 - 0.79, 0.79 - 0.78, 0.78 - 0.77, 0.77 - 0.76])


def test_rounding_is_no_scatter_and_breaks_no_tie() -> None:
    assert len(set(SAME.tolist())) > 1
    assert equivalence(SAME, 0.02).sentence() == "not decidable: the differences have no spread"
    scattered = np.array([0.82 - 0.81, 0.80 - 0.81, 0.80 - 0.79, 0.79 - 0.76, 0.77 - 0.78, 0.77 - 0.72])
    assert wilcoxon(scattered).p_value == wilcoxon(np.rint(100 * scattered)).p_value
    with pytest.raises(ValueError, match="positive margin"):
        equivalence([1.0, 2.0], float("nan"))


def test_a_verdict_needs_a_decidable_test_on_either_side() -> None:
    none = equivalence(SAME, 0.02)
    assert equivalence_verdict(none, beyond_margin(SAME, 0.02), None, None) == "not decided"
    alike = equivalence([0.01, -0.01, 0.0, 0.02], 1.0)
    far = beyond_margin([0.01, -0.01, 0.0, 0.02], 1.0)
    assert equivalence_verdict(alike, far, alike.p_value, far.p_value) == "supported"
    assert equivalence_verdict(alike, far, 0.06, far.p_value) == "not decided"
