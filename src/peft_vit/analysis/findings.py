"""Findings: what records say about each sentence, by the test that stands beside it.

Nothing here knows a sentence. Its measure gives values, Holm's correction goes over all tests of one family in one
study, and the verdict follows. A sentence without values has the verdict "no data" and the reason; "not decided" means
that these runs can't tell, never that there is no difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from peft_vit.analysis.comparison import ALPHA
from peft_vit.analysis.measures.evidence import Evidence, Measured, NoDataError
from peft_vit.analysis.sentences import SENTENCES, Sentence
from peft_vit.statistics import (
    Interval,
    Significance,
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
    wilcoxon_against_each,
)

FindingVerdict = Literal["supported", "refuted", "not decided", "no data"]


@dataclass(frozen=True, kw_only=True)
class Finding(Measured):
    """One sentence about one experiment, or about one pair: its values, and what they decide."""

    sentence: Sentence
    study: str  # whose runs these are
    interval: Interval | None  # mean of the values, 95 % t interval; None without values
    test: str  # its name; "none" if nothing is tested
    p_value: float | None  # of the test that can show the sentence, after Holm's correction; None if there is none
    opposite_p: float | None  # of the test that can show its opposite, likewise; for superiority the same
    outcome: str  # what the test said, or why it says nothing
    verdict: FindingVerdict  # on the sentence

    @property
    def n(self) -> int:
        """Return the number of values."""
        return len(self.values)


@dataclass(frozen=True)
class Conclusion:
    """One sentence over several experiments."""

    sentence: Sentence
    # supported if every finding with data is, refuted if one is and none supported, else not decided
    verdict: FindingVerdict
    counts: str  # how many of them, in words; empty for a single one
    findings: tuple[Finding, ...]  # those with data; without any, all


def find(evidence: Evidence) -> tuple[Finding, ...]:
    """Return what a study says about every sentence, in their order."""
    measured = [(sentence, one) for sentence in SENTENCES for one in _measure(sentence, evidence)]
    return judge(measured, evidence.study.label, evidence.study.untested)


def _measure(sentence: Sentence, evidence: Evidence) -> tuple[Measured, ...]:
    try:
        return sentence.measure(evidence)
    except NoDataError as reason:
        return (Measured(subject="", values=(), labels=(), n_of="seeds", note=str(reason)),)


def conclude(findings: Iterable[Finding]) -> tuple[Conclusion, ...]:
    """Return one verdict a sentence over its findings, in the order of their first one."""
    by_id: dict[str, list[Finding]] = {}
    for finding in findings:
        by_id.setdefault(finding.sentence.id, []).append(finding)
    return tuple(_conclusion(found) for found in by_id.values())


def judge(measured: Sequence[tuple[Sentence, Measured]], study: str = "", untested: str = "") -> tuple[Finding, ...]:
    """Return a finding for each set of values, corrected over those given that share a family.

    `study` is what they are of. `untested` is why no test may decide, since the number of values followed from results;
    empty: tests do.
    """
    findings = [_untested(sentence, one, study) for sentence, one in measured]
    families: dict[str, list[int]] = {}
    for place, finding in enumerate(findings):
        sentence = finding.sentence
        if sentence.test not in ("counted", "described") and finding.values:
            families.setdefault(sentence.family or sentence.id, []).append(place)
    for places in families.values():
        if untested:
            for place in places:
                findings[place] = replace(findings[place], outcome=untested)
            continue
        for place, decided in zip(places, _decide([findings[place] for place in places]), strict=True):
            findings[place] = decided
    return tuple(findings)


def _untested(sentence: Sentence, one: Measured, study: str) -> Finding:
    """Return a finding whose verdict needs no test, or does not stand yet."""
    finding = Finding(
        **vars(one),
        sentence=sentence,
        study=study,
        interval=mean_interval(one.values) if one.values else None,
        test="none",
        p_value=None,
        opposite_p=None,
        outcome="",
        verdict="not decided",
    )
    if not one.values:
        return replace(finding, verdict="no data", outcome=one.note or "no finished run tells", note="")
    if sentence.test == "described":
        return replace(finding, outcome=f"described, not tested: {sentence.reason}")
    if sentence.test == "counted":
        margin = sentence.margin or 0.0
        above = sum(value > margin for value in one.values)
        outcome = (
            f"{above} of {len(one.values)} lie above {margin:g}; counted over these runs, not generalized to others"
        )
        return replace(finding, outcome=outcome, verdict="supported" if above == len(one.values) else "refuted")
    return finding


def _tests(finding: Finding) -> tuple[Significance, Significance]:
    """Return the test that can show the sentence, and the one that can show its opposite."""
    sentence = finding.sentence
    data, margin = np.asarray(finding.values, dtype=np.float64), sentence.margin or 0.0
    if sentence.test == "noninferiority":
        return noninferiority(data, margin), inferiority(data, margin)
    if sentence.test == "equivalence":
        off = shifted(data, sentence.expected or 0.0)
        return equivalence(off, margin), beyond_margin(off, margin)
    if finding.rivals:
        return wilcoxon_against_each([shifted(values, margin) for values in finding.rivals])
    both = wilcoxon(shifted(data, margin))
    return both, both


def _decide(family: Sequence[Finding]) -> list[Finding]:
    """Give the verdicts of one family; what shows sentences and what shows their opposites is corrected apart."""
    tests = [_tests(finding) for finding in family]
    shown = _corrected([pair[0] for pair in tests])
    opposite = _corrected([pair[1] for pair in tests])
    return [
        _decided(finding, tests[place], shown[place], opposite[place], len(family))
        for place, finding in enumerate(family)
    ]


def _corrected(tests: Sequence[Significance]) -> list[float | None]:
    """Return Holm's adjusted p-values; a test without one counts as 1: results must not make the family smaller."""
    adjusted = holm([1.0 if test.p_value is None else test.p_value for test in tests])
    return [None if test.p_value is None else p for test, p in zip(tests, adjusted, strict=True)]


def _decided(
    finding: Finding,
    tests: tuple[Significance, Significance],
    p_value: float | None,
    opposite_p: float | None,
    count: int,
) -> Finding:
    sentence, (shown, opposite) = finding.sentence, tests
    assert finding.interval is not None
    found: FindingVerdict
    over = f"Holm over {count}" if count > 1 else "the only test of its family"
    if sentence.test == "superiority":
        lead = finding.interval.estimate - (sentence.margin or 0.0)
        tests_in_it = count if lead > 0 else count * max(len(finding.rivals), 1)
        shown = replace(shown if lead > 0 else opposite, minimum_n=minimum_n_wilcoxon(ALPHA, tests_in_it))
        p_value = p_value if lead > 0 else opposite_p
        found = verdict(lead, shown, p_value, ALPHA)
        said = "" if p_value is None else f"p = {p_value:.3g} ({over})"
    else:
        found = equivalence_verdict(shown, opposite, p_value, opposite_p, ALPHA)
        said = f"p = {p_value or 0:.3g} for it, {opposite_p or 0:.3g} against it ({over})"
    return replace(
        finding,
        test=_named(sentence, shown),
        p_value=p_value,
        opposite_p=opposite_p,
        verdict=found,
        outcome=said if shown.decidable else shown.sentence(),
    )


def _named(sentence: Sentence, shown: Significance) -> str:
    margin = "" if not sentence.margin else f", margin {sentence.margin:g}"
    expected = "" if sentence.expected is None else f" about {sentence.expected:g}"
    return f"{shown.test}{margin}{expected}"


def _conclusion(findings: Sequence[Finding]) -> Conclusion:
    sentence = findings[0].sentence
    told = tuple(finding for finding in findings if finding.verdict != "no data")
    if not told:
        return Conclusion(sentence, "no data", "", tuple(findings))
    verdicts = [finding.verdict for finding in told]
    overall: FindingVerdict = "not decided"
    if all(one == "supported" for one in verdicts):
        overall = "supported"
    elif "refuted" in verdicts and "supported" not in verdicts:
        overall = "refuted"
    names: tuple[FindingVerdict, ...] = ("supported", "refuted", "not decided")
    counted = ", ".join(f"{one} in {verdicts.count(one)}" for one in names if one in verdicts)
    counts = f"{counted} of {len(told)}"
    if sentence.test == "described":
        counts = f"described in {len(told)}, not tested"
    return Conclusion(sentence, overall, counts if len(told) > 1 else "", told)
