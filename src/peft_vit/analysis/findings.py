"""Findings: what records say about each sentence of the registry, by the test that stands there beside it.

Nothing here knows a sentence. A measure gives values, the registry names the test, Holm's correction goes over all
tests of one family in one study, and the verdict follows. A sentence without values has the verdict "no data" and the
reason; "not decided" means that these runs can't tell, never that there is no difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from peft_vit.analysis.comparison import ALPHA
from peft_vit.analysis.hypotheses import Hypothesis, Registry
from peft_vit.analysis.measures import Evidence, Measured, NoDataError, Subjects
from peft_vit.analysis.measures.selection import Selection
from peft_vit.analysis.studies import Study
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
Mark = Literal["registered", "exploratory"]
ALL_STUDIES = "all studies together"


@dataclass(frozen=True)
class Finding:
    """One sentence about one experiment, or about one pair."""

    hypothesis: Hypothesis  # the sentence and how it is decided
    study: str  # whose runs these are
    subject: str  # which experiment or pair; empty where there is no data
    labels: tuple[str, ...]  # what each value belongs to, as a rule a seed
    values: tuple[float, ...]  # a positive one speaks for the sentence
    n_of: str  # what n counts, in the plural
    interval: Interval | None  # mean of the values, 95 % t interval; None without values
    test: str  # its name; "none" if nothing is tested
    p_value: float | None  # of the test that can show the sentence, after Holm's correction; None if there is none
    opposite_p: float | None  # of the test that can show its opposite, likewise; for superiority the same
    outcome: str  # what the test said, or why it says nothing
    verdict: FindingVerdict  # on the sentence
    # registered if the sentence stood written down, as it does now, before every run that was used; None without data
    mark: Mark | None
    note: str  # what restricts it
    rivals: tuple[tuple[float, ...], ...] = ()  # see `Measured`

    @property
    def n(self) -> int:
        """Return the number of values."""
        return len(self.values)


@dataclass(frozen=True)
class Conclusion:
    """One sentence over several experiments."""

    hypothesis: Hypothesis  # the sentence
    # supported if every finding with data is, refuted if one is and none supported, else not decided
    verdict: FindingVerdict
    counts: str  # how many of them, in words; empty for a single one
    mark: Mark | None  # registered if every finding with data is
    findings: tuple[Finding, ...]  # those with data; without any, all


def all_findings(studies: Sequence[Study], registry: Registry) -> dict[str, tuple[Finding, ...]]:
    """Return study -> what it says about every sentence about one study; then what all of them say about the others."""
    evidence = [Evidence(study) for study in studies]
    of_one, of_several = (
        replace(registry, hypotheses=tuple(h for h in registry.hypotheses if h.is_about_several == several))
        for several in (False, True)
    )
    found = {one.study.label: find([one], of_one, one.study.label) for one in evidence}
    several = find(evidence, of_several, ALL_STUDIES)
    return {**found, ALL_STUDIES: several} if several else found


def find(studies: Sequence[Evidence], registry: Registry, name: str) -> tuple[Finding, ...]:
    """Return what studies say about every sentence, in the registry's order; `name` is what they are called.

    Sentences about one study are asked of the first, and those over several of all, of which there may be one alone.
    """
    measured = [(hypothesis, one) for hypothesis in registry.hypotheses for one in _measure(hypothesis, studies)]
    return judge(measured, name, registry, next(filter(None, (one.study.untested for one in studies)), ""))


def conclude(findings: Iterable[Finding]) -> tuple[Conclusion, ...]:
    """Return one verdict a sentence over its findings, in the order of their first one."""
    by_id: dict[str, list[Finding]] = {}
    for finding in findings:
        by_id.setdefault(finding.hypothesis.id, []).append(finding)
    return tuple(_conclusion(found) for found in by_id.values())


def judge(
    measured: Sequence[tuple[Hypothesis, Measured]],
    study: str = "",
    registry: Registry | None = None,
    untested: str = "",
) -> tuple[Finding, ...]:
    """Return a finding for each set of values, corrected over those given that share a family.

    The registry tells which runs had the sentence registered; None: nobody asks, all are exploratory. `untested` is
    why no test may decide, since the number of values followed from results; empty: tests do.
    """
    findings = [_untested(hypothesis, one, study, registry) for hypothesis, one in measured]
    families: dict[str, list[int]] = {}
    for place, finding in enumerate(findings):
        if finding.hypothesis.family is not None and finding.values:
            families.setdefault(finding.hypothesis.family, []).append(place)
    for places in families.values():
        if untested:
            for place in places:
                findings[place] = replace(findings[place], outcome=untested)
            continue
        for place, decided in zip(places, _decide([findings[place] for place in places]), strict=True):
            findings[place] = decided
    return tuple(findings)


def _measure(hypothesis: Hypothesis, studies: Sequence[Evidence]) -> tuple[Measured, ...]:
    if hypothesis.test == "untestable":
        return (_nothing(f"no data can test it: {hypothesis.reason}"),)
    how, arguments = hypothesis.how, hypothesis.arguments()
    try:
        if how.of_study is not None:
            return how.of_study(studies[0], studies[0].subjects(arguments.of, hypothesis.needs), arguments)
        assert how.of_studies is not None
        found = [(one, _subjects_or_none(one, arguments.of, hypothesis.needs)) for one in studies]
        return how.of_studies(found, arguments)
    except NoDataError as reason:
        return (_nothing(str(reason)),)


def _subjects_or_none(evidence: Evidence, selection: Selection, needs: Sequence[str]) -> Subjects:
    try:
        return evidence.subjects(selection, needs)
    except NoDataError:
        return ()


def _nothing(reason: str) -> Measured:
    return Measured(subject="", values=(), labels=(), n_of="seeds", records=(), note=reason)


def _untested(hypothesis: Hypothesis, one: Measured, study: str, registry: Registry | None) -> Finding:
    """Return a finding whose verdict needs no test, or does not stand yet."""
    finding = Finding(
        hypothesis=hypothesis,
        study=study,
        subject=one.subject,
        labels=one.labels,
        values=one.values,
        n_of=one.n_of,
        interval=mean_interval(one.values) if one.values else None,
        test="none",
        p_value=None,
        opposite_p=None,
        outcome="",
        verdict="not decided",
        mark=_mark(hypothesis, one, registry),
        note=one.note,
        rivals=one.rivals,
    )
    if not one.values:
        return replace(finding, verdict="no data", outcome=one.note or "no finished run tells", note="")
    if hypothesis.test == "described":
        return replace(finding, outcome=f"described, not tested: {hypothesis.reason}")
    if hypothesis.test == "counted":
        margin = hypothesis.margin or 0.0
        above = sum(value > margin for value in one.values)
        outcome = (
            f"{above} of {len(one.values)} lie above {margin:g}; counted over these runs, not generalized to others"
        )
        return replace(finding, outcome=outcome, verdict="supported" if above == len(one.values) else "refuted")
    return finding


def _mark(hypothesis: Hypothesis, one: Measured, registry: Registry | None) -> Mark | None:
    if not one.values:
        return None
    if registry is None or not one.records:
        return "exploratory"
    before = all(registry.was_registered(hypothesis, record) for record in one.records)
    return "registered" if before else "exploratory"


def _tests(finding: Finding) -> tuple[Significance, Significance]:
    """Return the test that can show the sentence, and the one that can show its opposite."""
    hypothesis = finding.hypothesis
    data, margin = np.asarray(finding.values, dtype=np.float64), hypothesis.margin or 0.0
    if hypothesis.test == "noninferiority":
        return noninferiority(data, margin), inferiority(data, margin)
    if hypothesis.test == "equivalence":
        off = shifted(data, hypothesis.expected or 0.0)
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
    hypothesis, (shown, opposite) = finding.hypothesis, tests
    assert finding.interval is not None
    found: FindingVerdict
    over = f"Holm over {count}" if count > 1 else "the only test of its family"
    if hypothesis.test == "superiority":
        lead = finding.interval.estimate - (hypothesis.margin or 0.0)
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
        test=_named(hypothesis, shown),
        p_value=p_value,
        opposite_p=opposite_p,
        verdict=found,
        outcome=said if shown.decidable else shown.sentence(),
    )


def _named(hypothesis: Hypothesis, shown: Significance) -> str:
    margin = "" if not hypothesis.margin else f", margin {hypothesis.margin:g}"
    expected = "" if hypothesis.expected is None else f" about {hypothesis.expected:g}"
    return f"{shown.test}{margin}{expected}"


def _conclusion(findings: Sequence[Finding]) -> Conclusion:
    hypothesis = findings[0].hypothesis
    told = tuple(finding for finding in findings if finding.verdict != "no data")
    if not told:
        return Conclusion(hypothesis, "no data", "", None, tuple(findings))
    verdicts = [finding.verdict for finding in told]
    overall: FindingVerdict = "not decided"
    if all(one == "supported" for one in verdicts):
        overall = "supported"
    elif "refuted" in verdicts and "supported" not in verdicts:
        overall = "refuted"
    names: tuple[FindingVerdict, ...] = ("supported", "refuted", "not decided")
    counted = ", ".join(f"{one} in {verdicts.count(one)}" for one in names if one in verdicts)
    counts = f"{counted} of {len(told)}"
    if hypothesis.test == "described":
        counts = f"described in {len(told)}, not tested"
    mark: Mark = "registered" if all(finding.mark == "registered" for finding in told) else "exploratory"
    return Conclusion(hypothesis, overall, counts if len(told) > 1 else "", mark, told)


def unknown_registrations(studies: Iterable[Study], known: Iterable[str]) -> tuple[str, ...]:
    """Return the ids that runs registered and that are not among the known ones, such as those of a user's file."""
    registered: set[str] = set()
    for study in studies:
        for run in study.runs:
            if run.record.registration is not None:
                registered |= run.record.registration.hypotheses.keys()
    return tuple(sorted(registered.difference(known)))
