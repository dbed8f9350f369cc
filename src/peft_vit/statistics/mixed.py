"""A linear mixed model with a random intercept: one effect over runs that come in groups, unbalanced ones too."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy
from numpy.typing import ArrayLike

from peft_vit.statistics.checked import ROUNDING, check_level, finite, has_spread

_NEXT_TO_NOTHING = 0.01  # variance between groups over that within: the optimizer stops somewhat short of the edge


@dataclass(frozen=True)
class MixedEffect:
    """The fixed effect of one condition, with what the fit says of itself."""

    n: int  # number of runs
    groups: int  # number of groups
    confidence: float  # nominal coverage, e.g. 0.95
    note: str | None  # what to know of the fit, or why there is none; None if nothing
    # change of the response for one unit of the condition; None, as all below, if there is no fit to trust
    estimate: float | None = None
    # low, high: ends of the interval
    low: float | None = None
    high: float | None = None
    between: float | None = None  # standard deviation of the groups' intercepts
    within: float | None = None  # standard deviation of the runs within a group
    degrees: int | None = None  # degrees of freedom of the interval


def mixed_effect(
    response: ArrayLike, condition: ArrayLike, groups: Sequence[object] | np.ndarray, confidence: float = 0.95
) -> MixedEffect:
    """Return the effect of a condition under ``response = a + b condition + u_group + e``, by restricted likelihood.

    With seeds as groups, runs of one seed share what the seed decides; with data sets as groups, the level of each.
    The interval describes what another draw of groups and runs would change, if the effect is the same in all groups.
    For complete pairs prefer the mean difference; this is for runs of which some are missing.

    Estimate and standard error are statsmodels'; its interval by the normal distribution would hold the truth in
    about four of five studies with three seeds. Here it is Student's t with the degrees of freedom of the stratum in
    which the condition varies ("between-within", Schluchter & Elashoff, Journal of Statistical Computation and
    Simulation 37, 1990): runs less groups less one, or groups less two if each group has one condition.

    Assumption: intercepts and errors are normal with one variance each, the effect does not vary by group. Source:
    Laird & Ware, Biometrics 38 (1982); computed by `statsmodels.regression.mixed_linear_model.MixedLM`.

    Args:
        response: (n,) one value a run.
        condition: (n,) 0 or 1, or a number such as the bits.
        groups: (n,) label of the group of each run.
        confidence: nominal coverage, between 0 and 1.

    Returns:
        The effect; None and a note if the fit did not converge or the runs can't tell the effect.

    Raises:
        ValueError: for values that are not finite or unequal lengths.
    """
    check_level(confidence, "confidence")
    y, x = finite(response, "response"), finite(condition, "condition")
    labels = np.asarray([str(label) for label in groups])
    if not len(y) == len(x) == len(labels):
        raise ValueError(f"expected equal lengths, got {len(y)} responses, {len(x)} conditions, {len(labels)} groups")
    order = np.lexsort((y, x, labels))
    y, x, labels = y[order], x[order], labels[order]
    unique, index = np.unique(labels, return_inverse=True)
    degrees = _degrees(x, index, len(unique))
    refusal = _refusal(y, x, index, len(unique), degrees)
    found = MixedEffect(len(y), len(unique), confidence, refusal)
    return found if refusal else _fitted(found, y, x, index, degrees)


def _degrees(x: np.ndarray, index: np.ndarray, groups: int) -> int:
    """Return the degrees of freedom of the condition's effect; below one if it can't be tested."""
    rank = int(np.linalg.matrix_rank(np.column_stack([np.eye(groups)[index], x])))
    return len(x) - rank if rank > groups else groups - 2


def _refusal(y: np.ndarray, x: np.ndarray, index: np.ndarray, groups: int, degrees: int) -> str | None:
    """Return why no fit should be tried."""
    if groups < 2:
        return "one group: nothing to tell the variance between groups from"
    if not has_spread(x):
        return "the condition is the same in all runs"
    if len(y) == groups:
        return "one run a group: the variance within a group cannot be told from that between groups"
    if degrees < 1:
        return "too few runs: nothing is left to tell the error of the effect from"
    columns = np.column_stack([np.eye(groups)[index], x])  # (n, groups + 1)
    residual = y - columns @ np.linalg.lstsq(columns, y, rcond=None)[0]
    if np.abs(residual).max() <= ROUNDING * np.abs(y).max():
        return "groups and condition explain every value: no variance within groups is left"
    return None


def _fitted(unfitted: MixedEffect, y: np.ndarray, x: np.ndarray, index: np.ndarray, degrees: int) -> MixedEffect:
    from statsmodels.regression.mixed_linear_model import MixedLM  # slow to import

    # In units of the scatter, so that the optimizer's tolerances mean the same for shares and for seconds.
    center, largest = float(np.mean(y)), float(np.abs(y).max())
    unit = largest * float(np.std(y / largest))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are told below, in words: convergence and the edge
        try:
            model = MixedLM((y - center) / unit, np.column_stack([np.ones_like(x), x]), groups=index)
            fit = model.fit(reml=True, method=["bfgs", "powell"])  # Powell's needs no gradient, which fails at the edge
            estimate, error = float(fit.fe_params[1]), float(fit.bse_fe[1])
            between, within = float(fit.cov_re[0, 0]), float(fit.scale)
        except (np.linalg.LinAlgError, ValueError) as problem:
            return replace(unfitted, note=f"the fit failed: {str(problem).lower()}")
    if not fit.converged:
        return replace(unfitted, note="the fit did not converge")
    if not np.isfinite([estimate, error, between, within]).all() or error <= 0:
        return replace(unfitted, note="the fit is singular: no standard error")
    note = None
    if between <= _NEXT_TO_NOTHING * within:
        note = "the variance between groups is below a hundredth of that within: a fit at or near its edge"
    half = float(scipy.special.stdtrit(degrees, 0.5 + unfitted.confidence / 2)) * error
    return replace(
        unfitted,
        note=note,
        estimate=unit * estimate,
        low=unit * (estimate - half),
        high=unit * (estimate + half),
        between=unit * max(0.0, between) ** 0.5,
        within=unit * within**0.5,
        degrees=degrees,
    )
