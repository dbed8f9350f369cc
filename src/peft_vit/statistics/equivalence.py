"""Tests against a margin that was stated before the data: equivalence, non-inferiority, and their opposites.

Each claim has a test that can show it and a test that can show its opposite. If neither does, nothing is decided: a
large p-value never says "no difference".

All of them rest on Student's t. Assumption: differences are independent and normal. What they say holds for another
draw of seeds, not for other test images or data sets. Sources: Schuirmann, Journal of Pharmacokinetics and
Biopharmaceutics 15 (1987); Wellek, Testing Statistical Hypotheses of Equivalence and Noninferiority (2010).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from peft_vit.statistics.checked import between_zero_and_one, finite, positive_margin
from peft_vit.statistics.significance import Significance, Verdict
from peft_vit.statistics.student import MINIMUM_PAIRS, t_probability


def equivalence(differences: ArrayLike, margin: float) -> Significance:
    """Test whether the mean paired difference lies within ``±margin``: two one-sided t tests.

    The p-value is the larger of the two; it is at most alpha exactly when the (1 - 2 alpha) t interval lies within
    the margins. Its level holds at the margins and is far below alpha if the differences scatter widely.
    Source: Schuirmann (1987).

    Args:
        differences: (n,) candidate minus reference, one a pair.
        margin: largest difference that does not matter, in the unit of the differences, positive.

    Raises:
        ValueError: for a margin that is not positive, no values, or values that are not finite.
    """
    data = _checked(differences, margin)
    above = t_probability(data, -margin, "greater")
    below = t_probability(data, margin, "less")
    p_value = None if above is None or below is None else max(above, below)
    return Significance("two one-sided paired t (equivalence)", int(data.size), p_value, MINIMUM_PAIRS)


def beyond_margin(differences: ArrayLike, margin: float) -> Significance:
    """Test whether the mean paired difference lies outside ``±margin``, on either side: what refutes equivalence.

    Twice the smaller of the two one-sided p-values, so it is at most alpha exactly when the (1 - alpha) t interval
    lies beyond a margin. The test that is to hold for all |mean| <= margin: Wellek (2010), 11.

    Args:
        differences: (n,) candidate minus reference, one a pair.
        margin: largest difference that does not matter, in the unit of the differences, positive.

    Raises:
        ValueError: as in `equivalence`.
    """
    data = _checked(differences, margin)
    above = t_probability(data, margin, "greater")
    below = t_probability(data, -margin, "less")
    p_value = None if above is None or below is None else min(1.0, 2 * min(above, below))
    return Significance("paired t beyond the margin, two-sided", int(data.size), p_value, MINIMUM_PAIRS)


def noninferiority(differences: ArrayLike, margin: float) -> Significance:
    """Test whether the mean paired difference lies above ``-margin``: one-sided t test of mean <= -margin.

    "At least as good" is claimed when its p-value is small: then the lower end of the (1 - 2 alpha) t interval lies
    above -margin. A large p-value does not say "worse". Source: one of the two tests of Schuirmann (1987).

    Args:
        differences: (n,) candidate minus reference, one a pair.
        margin: largest loss that does not matter, in the unit of the differences, positive.

    Raises:
        ValueError: as in `equivalence`.
    """
    return _one_sided("paired non-inferiority t, one-sided", differences, margin, "greater")


def inferiority(differences: ArrayLike, margin: float) -> Significance:
    """Test whether the mean paired difference lies below ``-margin``: what refutes non-inferiority, one-sided t.

    Args:
        differences: (n,) candidate minus reference, one a pair.
        margin: largest loss that does not matter, in the unit of the differences, positive.

    Raises:
        ValueError: as in `equivalence`.
    """
    return _one_sided("paired inferiority t, one-sided", differences, margin, "less")


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
    of any false "refuted".

    Args:
        shown: the test that can show the claim.
        opposite: the test that can show that it is wrong.
        adjusted_shown: p-value of `shown` after the correction for the family; None if there is none.
        adjusted_opposite: p-value of `opposite` likewise.
        alpha: level of the family.
    """
    between_zero_and_one(alpha, "alpha")
    if shown.decidable and adjusted_shown is not None and adjusted_shown <= alpha:
        return "supported"
    if opposite.decidable and adjusted_opposite is not None and adjusted_opposite <= alpha:
        return "refuted"
    return "not decided"


def _one_sided(test: str, differences: ArrayLike, margin: float, side: Literal["greater", "less"]) -> Significance:
    """Test on which side of ``-margin`` the mean lies."""
    data = _checked(differences, margin)
    return Significance(test, int(data.size), t_probability(data, -margin, side), MINIMUM_PAIRS)


def _checked(differences: ArrayLike, margin: float) -> np.ndarray:
    positive_margin(margin)
    return finite(differences, "differences")
