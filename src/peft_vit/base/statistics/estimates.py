"""Is A better than B: the question asked of paired values, what their test says, and Holm's correction over a family.

The primary test, named before any data: the exact two-sided Wilcoxon signed-rank test at 5 %. The t interval beside it
describes, it does not decide. "Not decided" means that these values can't tell, never that there is no difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np

from peft_vit.base.statistics import (
    Interval,
    Significance,
    Verdict,
    beyond_margin,
    equivalence,
    equivalence_verdict,
    holm,
    inferiority,
    mean_interval,
    minimum_n_wilcoxon,
    noninferiority,
    shifted,
    verdict,
    wilcoxon,
)

ALPHA = 0.05

DECIMALS = 12  # shares of whole images: rounding turns float noise back into the ties that it hides

Kind = Literal["superiority", "noninferiority", "equivalence", "counted", "described"]


@dataclass(frozen=True)
class Question:
    """What is asked of values.

    superiority: do they lie above the margin? noninferiority: does their mean lie above -margin? equivalence: does it
    lie within ±margin of `expected`? counted: does every one of these values lie above the margin? described: nothing.
    """

    kind: Kind = "superiority"
    margin: float = 0.0
    expected: float = 0.0

    def tests(self, estimate: Estimate) -> tuple[Significance, Significance]:
        """Return the test that can show the claim, and the one that can show its opposite."""
        values = list(estimate.by_seed.values())
        if self.kind == "noninferiority":
            return noninferiority(values, self.margin), inferiority(values, self.margin)
        if self.kind == "equivalence":
            off = shifted(values, self.expected)
            return equivalence(off, self.margin), beyond_margin(off, self.margin)
        both = wilcoxon(shifted(values, self.margin))
        return both, both


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The mean of values over runs, or over pairs of them, and what is known of a claim about it."""

    name: str  # the experiment whose values these are
    reference: str = ""  # what it is compared with; empty: with nothing
    question: Question = Question()
    by_seed: Mapping[Any, float] = field(default_factory=dict)  # or by what else `n_of` names
    n_of: str = "seeds"  # what is counted, in the plural
    interval: Interval | None = None  # of the mean; None without values
    significance: Significance | None = None  # of the test that speaks; None: nothing was tested
    opposite: Significance | None = None  # that can show the opposite of the claim; None: the same
    adjusted_p: float | None = None  # its p-value after correction for the family; None if there is none
    opposite_p: float | None = None  # likewise of the test that can show the opposite of the claim
    family: int = 1  # tests that were corrected together
    verdict: Verdict = Verdict.NOT_DECIDED
    note: str = ""  # what restricts the values, or why there are none

    @property
    def subject(self) -> str:
        """Return what is compared with what, in words."""
        return f"{self.name} against {self.reference}" if self.reference else self.name


Estimates = TypeVar("Estimates", bound=Estimate)


def join_notes(*notes: str) -> str:
    """Return notes as one."""
    return "; ".join(note for note in notes if note)


def compare_values(
    by_seed: Mapping[int, tuple[float, float]], *, name: str, reference: str, note: str = ""
) -> Estimate:
    """Return the differences of pairs, seed -> (value, value of the reference); nothing is tested yet."""
    if not by_seed:
        return Estimate(name=name, reference=reference, note=note or "no pair of runs with the same seed")
    differences = np.subtract(*zip(*by_seed.values(), strict=True))
    return Estimate(
        name=name,
        reference=reference,
        by_seed=dict(zip(by_seed, np.round(differences, DECIMALS).tolist(), strict=True)),
        n_of="pairs",
        interval=mean_interval(differences),
        note=note,
    )


def decide(family: Sequence[Estimates], untested: str = "", size: int = 0) -> tuple[Estimates, ...]:
    """Test what is asked of a family of estimates, with Holm's correction over all of them, and give the verdicts.

    What shows claims and what shows their opposites is corrected apart: the probability of any false "supported" is at
    most ALPHA, and so is that of any false "refuted". A test without a p-value counts as 1, since results must not make
    the family smaller; estimates without values are not tests.

    Args:
        family: one that has tests already keeps them.
        untested: why no test may decide, since the number of values followed from results; empty: tests do.
        size: number of tests in the family, if it is larger than those that have values; the others count as 1.
    """
    decided = list(family)
    untestable = ("counted", "described")
    places = [i for i, estimate in enumerate(family) if estimate.by_seed and estimate.question.kind not in untestable]
    if untested:
        for place in places:
            note = join_notes(family[place].note, untested)
            decided[place] = replace(family[place], significance=None, note=note)
        return tuple(decided)
    tests = [
        (test, family[place].opposite or test)
        if (test := family[place].significance)
        else family[place].question.tests(family[place])
        for place in places
    ]
    corrected = []
    for side in zip(*tests, strict=True):  # what shows claims, and what shows their opposites
        adjusted = holm([1.0 if test.p_value is None else test.p_value for test in side] + [1.0] * (size - len(side)))
        corrected.append([None if test.p_value is None else p for test, p in zip(side, adjusted, strict=False)])
    for place, pair, *p_values in zip(places, tests, *corrected, strict=True):
        decided[place] = _decided(family[place], pair, p_values, max(size, len(places)))
    return tuple(decided)


def _decided(
    estimate: Estimates, tests: tuple[Significance, Significance], p_values: Sequence[float | None], family: int
) -> Estimates:
    assert estimate.interval is not None
    (test, opposite), (p_value, opposite_p) = tests, p_values
    if estimate.question.kind == "superiority":
        lead = estimate.interval.estimate - estimate.question.margin
        if lead <= 0:
            test, p_value = opposite, opposite_p
        if estimate.significance is None or estimate.opposite is not None:  # of ranks; a t test needs two in any family
            test = replace(test, minimum_n=minimum_n_wilcoxon(ALPHA, family * test.comparisons))
        said = verdict(lead, test, p_value, ALPHA)
    else:
        said = equivalence_verdict(test, opposite, p_value, opposite_p, ALPHA)
    return replace(estimate, significance=test, adjusted_p=p_value, opposite_p=opposite_p, verdict=said, family=family)


def describe_test(estimate: Estimate) -> str:
    """Return what the test says after correction, or why it says nothing."""
    significance = estimate.significance
    if significance is None:
        return "not tested" if estimate.by_seed else "no pairs"
    if not significance.decidable or estimate.adjusted_p is None:
        return significance.sentence()
    return f"p = {estimate.adjusted_p:.3g} (Holm)"


def recorded_mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that were recorded; None if none was."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def recorded_interval(values: Iterable[float | None]) -> Interval | None:
    """Return the mean of the values that were recorded, with its interval; None if none was."""
    known = [value for value in values if value is not None]
    return mean_interval(known) if known else None
