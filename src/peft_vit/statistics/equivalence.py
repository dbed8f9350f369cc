"""Tests against a margin that was stated before the data: equivalence, non-inferiority, and their opposites.

Each claim has a test that can show it and a test that can show its opposite. If neither does, nothing is decided: a
large p-value never says "no difference". All take paired differences, candidate minus reference, of shape (n,), and a
positive margin in their unit; they raise ValueError for another margin, no values, or values that are not finite.

All of them rest on Student's t. Assumption: differences are independent and normal. What they say holds for another
draw of seeds, not for other test images or data sets. Sources: Schuirmann, Journal of Pharmacokinetics and
Biopharmaceutics 15 (1987); Wellek, Testing Statistical Hypotheses of Equivalence and Noninferiority (2010).
"""

from __future__ import annotations

import math
from typing import Literal

import scipy
from numpy.typing import ArrayLike

from peft_vit.statistics.checked import check_level, finite, has_spread
from peft_vit.statistics.intervals import mean_and_error
from peft_vit.statistics.significance import Significance, Verdict

MINIMUM_PAIRS = 2  # a t of two pairs can be as large as one likes, so no correction for many tests raises this number


def equivalence(differences: ArrayLike, margin: float) -> Significance:
    """Test whether the mean lies within ``±margin``: two one-sided t tests.

    The p-value is the larger of the two; it is at most alpha exactly when the (1 - 2 alpha) t interval lies within
    the margins. Its level holds at the margins and is far below alpha if the differences scatter widely.
    Source: Schuirmann (1987).
    """
    above, below = _t_test(differences, margin, -margin, "greater"), _t_test(differences, margin, margin, "less")
    p_value = None if above is None or below is None else max(above, below)
    return _significance("two one-sided paired t (equivalence)", differences, p_value)


def beyond_margin(differences: ArrayLike, margin: float) -> Significance:
    """Test whether the mean lies outside ``±margin``, on either side: what refutes equivalence.

    Twice the smaller of the two one-sided p-values, so it is at most alpha exactly when the (1 - alpha) t interval
    lies beyond a margin. The test that is to hold for all |mean| <= margin: Wellek (2010), 11.
    """
    above, below = _t_test(differences, margin, margin, "greater"), _t_test(differences, margin, -margin, "less")
    p_value = None if above is None or below is None else min(1.0, 2 * min(above, below))
    return _significance("paired t beyond the margin, two-sided", differences, p_value)


def noninferiority(differences: ArrayLike, margin: float) -> Significance:
    """Test whether the mean lies above ``-margin``: one-sided t test of mean <= -margin.

    "At least as good" is claimed when its p-value is small: then the lower end of the (1 - 2 alpha) t interval lies
    above -margin. A large p-value does not say "worse". Source: one of the two tests of Schuirmann (1987).
    """
    p_value = _t_test(differences, margin, -margin, "greater")
    return _significance("paired non-inferiority t, one-sided", differences, p_value)


def inferiority(differences: ArrayLike, margin: float) -> Significance:
    """Test whether the mean lies below ``-margin``: what refutes non-inferiority, one-sided t."""
    p_value = _t_test(differences, margin, -margin, "less")
    return _significance("paired inferiority t, one-sided", differences, p_value)


def equivalence_verdict(
    shown: Significance,
    opposite: Significance,
    adjusted_shown: float | None,
    adjusted_opposite: float | None,
    alpha: float = 0.05,
) -> Verdict:
    """Return whether a claim within a margin is supported, refuted or not decided.

    `shown` and `opposite` are `equivalence` and `beyond_margin`, or `noninferiority` and `inferiority`, of the same
    differences and margin. In a family of claims, adjust the p-values of all `shown` by `holm`, and those of all
    `opposite` by another call of it: then the probability of any false "supported" is at most alpha, and so is that
    of any false "refuted". A p-value that does not exist is None.
    """
    check_level(alpha, "alpha")
    if shown.decidable and adjusted_shown is not None and adjusted_shown <= alpha:
        return "supported"
    if opposite.decidable and adjusted_opposite is not None and adjusted_opposite <= alpha:
        return "refuted"
    return "not decided"


def _t_test(differences: ArrayLike, margin: float, center: float, tail: Literal["greater", "less"]) -> float | None:
    """Return the p-value of "the mean is `center`" against a tail; None if the values have no spread."""
    if not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"expected a positive margin, got {margin}")
    data = finite(differences, "differences")
    if not has_spread(data):
        return None
    mean, error = mean_and_error(data)
    t = (mean - center) / error
    return float(scipy.special.stdtr(data.size - 1, -t if tail == "greater" else t))


def _significance(test: str, differences: ArrayLike, p_value: float | None) -> Significance:
    return Significance(test, len(finite(differences)), p_value, MINIMUM_PAIRS)
