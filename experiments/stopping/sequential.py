"""Comparisons with a control that stop when they know: verdicts, intervals and p-values that account for the looks.

Each comparison has paired differences, experiment minus control. At declared numbers of pairs their mean is tested, as
often as there are looks, and the level of the whole family holds over all looks and all comparisons:

- looks: bounds that spend the level (`spending`);
- unknown variance: a t statistic counts as the normal one with the same tail probability (Jennison & Turnbull, Group
  Sequential Methods (2000), 4.4);
- several comparisons: Holm's procedure on repeated p-values, so the level of comparisons that are decided passes on to
  the others (Maurer & Bretz, Statistics in Biopharmaceutical Research 5 (2013)). With both questions, an experiment
  passes it on when both are answered, superiority being asked at the level at which non-inferiority was shown;
- "supported" and its opposite, "refuted", are families of their own, as in `equivalence`.

Folds whose differences hardly scatter would prove anything to a t test. Where the rule says how many images they are
of, the images have to show it as well (`lost_images`): the weaker of both is what counts.

Assumption: differences are independent, or correlated as those of repeated folds, and roughly normal.
docs/explanation/statistics.md says how often verdicts are wrong for other distributions.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
import scipy

from experiments.stopping.lost_images import difference_limits, loss_bounds, loss_p_values
from experiments.stopping.spending import Spending, boundaries, repeated_p_values
from peft_vit.base.statistics.intervals import finite_array, has_spread, mean_and_error
from peft_vit.base.statistics.significance import Verdict

Asked = Literal["superiority", "non-inferiority", "both"]


class Stopped(StrEnum):
    """Why a comparison looks at no further pairs."""

    DECIDED = "decided"
    FUTILE = "futile"  # further pairs would hardly decide it
    MAXIMUM = "maximum"  # it was at the last look


FUTILITY = 0.05


@dataclass(frozen=True)
class StoppingRule:
    """What is asked of every comparison, when it is looked at, and when it stops."""

    asked: Asked
    margin: float  # of non-inferiority, as a share of accuracy (0.01 is a point), above 0
    looks: tuple[int, ...]  # numbers of pairs, rising; the last is the maximum
    level: float = 0.05  # one-sided, of the whole family
    form: Spending = "obrien-fleming"
    correlation: float = 0.0  # n_test / n_train of repeated folds: variance s^2 (1 / n + correlation)
    futility: float = FUTILITY  # predictive power below which a comparison stops; 0: never. It spends nothing
    images: int | None = None  # different ones of all folds; None: pairs without spread decide nothing

    @property
    def fractions(self) -> tuple[float, ...]:
        """Information of each look, as a share of that of the last: n pairs bring 1 / (1 / n + correlation)."""
        information = [1 / (1 / n + self.correlation) for n in self.looks]
        return tuple(value / information[-1] for value in information)

    @property
    def centers(self) -> tuple[float, ...]:
        """Mean differences that are asked about, the one that is shown first in front."""
        return {"superiority": (0.0,), "non-inferiority": (-self.margin,), "both": (-self.margin, 0.0)}[self.asked]


@dataclass(frozen=True)
class SequentialTest:
    """One question at one look. Bounds are infinite where nothing could be decided yet."""

    upper_bound: float  # mean difference from which on the answer is "supported" at this look
    lower_bound: float  # and up to which it is "refuted"
    p_value: float  # of "supported": repeated, and adjusted for the family as it stands; supported where <= level
    opposite_p_value: float  # likewise of "refuted"


@dataclass(frozen=True)
class Look:
    """A comparison at one number of pairs."""

    pairs: int
    difference: float  # mean
    low: float  # repeated interval, at the level of this look's bounds: with those of all looks it holds the truth
    high: (
        float  # with at least 1 - 2 level, and its ends exclude what the verdict does (Jennison & Turnbull, JRSS B 51)
    )
    superiority: SequentialTest | None  # None: not asked
    noninferiority: SequentialTest | None
    predictive_power: float | None  # of an answer to what is open, at the last look; None: nothing is open


@dataclass(frozen=True)
class SequentialResult:
    """What became of one comparison against the control."""

    name: str
    looks: tuple[Look, ...]
    superiority: Verdict | None  # None: not asked
    noninferiority: Verdict | None
    stopped: Stopped | None  # None: it is open
    next_look: int | None  # pairs that it needs; None: it has stopped


def t_statistics(means: np.ndarray, errors: np.ndarray, rule: StoppingRule, pairs: Sequence[int]) -> np.ndarray:
    """Return t statistics for "above" and "below" each center: (..., K) means and errors to (2, ..., q, K).

    Where images are counted, a statistic is at most the one with the p-value that the images have.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (means[..., None, :] - np.array(rule.centers)[:, None]) / errors[..., None, :]
    both = np.array([t, -t])
    if rule.images is None:
        return both
    freedom = np.maximum(np.asarray(pairs) - 1, 1)
    at_most = -scipy.special.stdtrit(freedom, loss_p_values(means, rule.images, rule.margin))  # (2, ..., K)
    return np.minimum(np.where(np.isnan(both), -np.inf, both), at_most[..., None, :])


def normal_score(t: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return the normal statistics with the tail probabilities of t statistics (..., K) of so many pairs (K,)."""
    tails = scipy.special.stdtr(np.maximum(pairs - 1, 1), -np.abs(t))
    return np.asarray(np.where(pairs < 2, np.nan, -np.sign(t) * scipy.special.ndtri(tails)))


def adjusted(p_values: np.ndarray) -> np.ndarray:
    """Return p-values (..., m, q) of m comparisons with q questions, adjusted for the family: (..., m, q).

    Questions are nested and come in order: one is answered after those before it. The level is shared by the
    comparisons that have a question left, in equal parts. For one question that is Holm's procedure; for more the graph
    of Maurer & Bretz (2013) that hands a comparison's part to its next question, and after the last to the others.
    """
    ordered = np.maximum.accumulate(np.asarray(p_values, dtype=np.float64), axis=-1)
    sharing = np.arange(ordered.shape[-2], 0, -1)
    last = np.sort(ordered[..., -1], axis=-1) * sharing
    complete = np.minimum(np.maximum.accumulate(last, axis=-1), 1.0)  # (..., m) levels at which so many are complete
    before = np.concatenate([np.zeros_like(complete[..., :1]), complete[..., :-1]], axis=-1)
    # (..., m, q, m): the level that a question needs while that many comparisons are complete
    needed = np.maximum(before[..., None, None, :], ordered[..., None] * sharing)
    adjusted_p = np.minimum(needed.min(axis=-1), 1.0)
    return np.asarray(np.minimum(adjusted_p, adjusted_p[..., -1:]))


@dataclass(eq=False)
class _Comparison:
    """A comparison while it is followed."""

    name: str
    means: np.ndarray  # (K',) at the K' looks that have their pairs
    errors: np.ndarray  # (K',) standard errors; where differences have no spread 0 if images count, else not a number
    t: np.ndarray  # (2, q, K') of "above" and "below" for each question
    p_values: np.ndarray  # (2, q, K') repeated, likewise
    looks: list[Look]
    verdicts: list[Verdict]  # (q,)
    stopped: Stopped | None = None


def follow(differences: Mapping[str, Sequence[float]], rule: StoppingRule) -> tuple[SequentialResult, ...]:
    """Return what a rule makes of comparisons with one control: a function of the data, whenever it is called.

    Args:
        differences: for every comparison of the family, those without pairs included, its paired differences (n,),
            experiment minus control, as shares of accuracy, in the order of the declared seeds. Those after the last
            look that is complete wait for the next; those after a comparison has stopped are not used.
        rule: what is asked, and when.

    Returns:
        One course for each comparison, in the order given. Looks are taken in order, and at each look all comparisons
        that have its pairs together. Fewer than two pairs decide nothing; nor do pairs without spread, unless the rule
        counts images.

    Raises:
        ValueError: for values that are not finite, or more pairs than the rule declares.
    """
    comparisons = [_comparison(name, values, rule) for name, values in differences.items()]
    for k in range(len(rule.looks)):
        _look(comparisons, rule, k)
    courses = []
    for comparison in comparisons:
        verdicts = dict(zip(rule.centers, comparison.verdicts, strict=True))
        courses.append(
            SequentialResult(
                comparison.name,
                tuple(comparison.looks),
                verdicts.get(0.0),
                verdicts.get(-rule.margin),
                comparison.stopped,
                None if comparison.stopped else rule.looks[len(comparison.looks)],
            )
        )
    return tuple(courses)


def next_look(courses: Sequence[SequentialResult], going: Collection[str]) -> tuple[list[str], int]:
    """Return which of those that continue take part in the next look, and how many pairs it needs, or [] and 0."""
    waiting = {
        course.name: course.next_look for course in courses if course.next_look is not None and course.name in going
    }
    pairs = min(waiting.values(), default=0)
    return [name for name, look in waiting.items() if look == pairs], pairs


def _comparison(name: str, values: Sequence[float], rule: StoppingRule) -> _Comparison:
    data = finite_array(values, name) if len(values) else np.empty(0)
    if data.size > rule.looks[-1]:
        raise ValueError(f"{name}: expected at most the {rule.looks[-1]} pairs that were declared, got {data.size}")
    pairs = [n for n in rule.looks if n <= data.size]
    means, errors = np.full(len(pairs), np.nan), np.full(len(pairs), np.nan)
    for k, n in enumerate(pairs):
        means[k], error = mean_and_error(data[:n]) if n > 1 else (data[0], math.nan)
        if has_spread(data[:n]):
            errors[k] = error * math.sqrt(1 + n * rule.correlation)
        elif rule.images is not None and n > 1:
            errors[k] = 0.0
    t = t_statistics(means, errors, rule, pairs)
    p_values = repeated_p_values(normal_score(t, np.asarray(pairs)), rule.fractions, rule.form)
    return _Comparison(name, means, errors, t, p_values, [], [Verdict.NOT_DECIDED] * len(rule.centers))


def _look(comparisons: list[_Comparison], rule: StoppingRule, k: int) -> None:
    """Take look k, counted from 0: test all comparisons that have its pairs, and stop those that are done."""
    looking = [c for c in comparisons if c.stopped is None and len(c.looks) == k and k < len(c.means)]
    if not looking:
        return
    seen = [len(c.looks) + (c in looking) for c in comparisons]
    none = np.ones((2, len(rule.centers)))
    evidence = np.array([c.p_values[..., n - 1] if n else none for c, n in zip(comparisons, seen, strict=True)])
    above = adjusted(evidence[:, 0])  # (m, 2, q) to (m, q)
    below = adjusted(evidence[:, 1, ::-1])[:, ::-1]  # to be worse is shown before to be worse by the margin
    shares = (max(1, int((above[:, -1] > rule.level).sum())), max(1, int((below[:, 0] > rule.level).sum())))
    for comparison, up, down in zip(comparisons, above, below, strict=True):
        for question, verdict in enumerate(comparison.verdicts):
            if verdict is Verdict.NOT_DECIDED and min(up[question], down[question]) <= rule.level:
                comparison.verdicts[question] = Verdict.SUPPORTED if up[question] <= rule.level else Verdict.REFUTED
        if comparison in looking:
            comparison.looks.append(_seen(comparison, rule, k, np.array([up, down]), shares))
        if Verdict.NOT_DECIDED not in comparison.verdicts:
            comparison.stopped = Stopped.DECIDED
        elif comparison in looking:
            power = comparison.looks[-1].predictive_power
            if rule.looks[k] == rule.looks[-1]:
                comparison.stopped = Stopped.MAXIMUM
            elif power is not None and power < rule.futility:
                comparison.stopped = Stopped.FUTILE


def _seen(comparison: _Comparison, rule: StoppingRule, k: int, p_values: np.ndarray, shares: tuple[int, int]) -> Look:
    """Return look k of a comparison, with the family's p-values (2, q) and the comparisons that share each level."""
    pairs, mean, error = rule.looks[k], float(comparison.means[k]), float(comparison.errors[k])
    critical = [_critical_t(rule, k, rule.level / share) for share in shares]
    up, down = (t * error if math.isfinite(t * error) else math.inf for t in critical)
    low, high = mean - up, mean + down
    bounds = {center: (center + up, center - down) for center in rule.centers}
    if rule.images is not None and pairs > 1:
        above, below = (float(scipy.special.stdtr(pairs - 1, -t)) for t in critical)
        least, most = loss_bounds(rule.images, rule.margin, (above, below))
        bounds = {center: (max(upper, least), min(lower, most)) for center, (upper, lower) in bounds.items()}
        least, most = difference_limits(mean, rule.images, (above, below))
        low, high = min(low, least), max(high, most)
    tests = [
        SequentialTest(upper, lower, float(supported), float(refuted))
        for (upper, lower), supported, refuted in zip(bounds.values(), *p_values, strict=True)
    ]
    questions = dict(zip(rule.centers, tests, strict=True))
    power = _predictive_power(comparison, rule, k)
    return Look(pairs, mean, low, high, questions.get(0.0), questions.get(-rule.margin), power)


def _critical_t(rule: StoppingRule, k: int, level: float) -> float:
    pairs = rule.looks[k]
    if pairs < 2:
        return math.inf
    bound = boundaries(rule.fractions, level, rule.form)[k]
    return -float(scipy.special.stdtrit(pairs - 1, scipy.special.ndtr(-bound)))


def _predictive_power(comparison: _Comparison, rule: StoppingRule, k: int) -> float | None:
    """Return how likely an open question is answered, either way, at the last look.

    With a statistic Z at the fraction t of the information and the last bound b it is
    ``Phi((Z / sqrt(t) - b) / sqrt((1 - t) / t))``: the trend continues, and is known as well as t shows it; the largest
    over questions and directions. The bound is that of the whole level, which other comparisons may yet pass on.
    Source: Spiegelhalter, Freedman & Blackburn, Controlled Clinical Trials 7 (1986).
    """
    open_ones = [answer is Verdict.NOT_DECIDED for answer in comparison.verdicts]
    if k + 1 == len(rule.looks) or not any(open_ones) or math.isnan(comparison.errors[k]):
        return None
    t, bound = rule.fractions[k], boundaries(rule.fractions, rule.level, rule.form)[-1]
    furthest = float(normal_score(comparison.t[:, open_ones, k], np.array(rule.looks[k])).max())
    return float(scipy.special.ndtr((furthest / math.sqrt(t) - bound) / math.sqrt((1 - t) / t)))
