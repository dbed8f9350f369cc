"""Findings: what records say about each sentence, by the test that is beside it.

Nothing here knows a sentence. Its measure gives estimates, those of one family in one study are decided together, and a
sentence without values has the verdict "no data" and the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from peft_vit.base.statistics import Verdict
from peft_vit.base.statistics.descriptive import grouped
from peft_vit.base.statistics.estimates import Estimate, decide
from peft_vit.lab.analysis.evidence import Evidence, NoDataError
from peft_vit.lab.analysis.sentences import SENTENCES, Sentence


@dataclass(frozen=True, kw_only=True)
class Finding(Estimate):
    """What one experiment, or one pair, says of a sentence."""

    sentence: Sentence
    study: str  # whose runs these are
    outcome: str = ""  # what the test said, or why it says nothing

    @property
    def test(self) -> str:
        """Return the name of the test; "none" if nothing was tested."""
        if self.significance is None:
            return "none"
        margin = "" if not self.sentence.margin else f", margin {self.sentence.margin:g}"
        expected = "" if self.sentence.expected is None else f" about {self.sentence.expected:g}"
        return f"{self.significance.test}{margin}{expected}"


@dataclass(frozen=True)
class Conclusion:
    """One sentence over several experiments."""

    sentence: Sentence
    # supported if every finding with data is, refuted if one is and none supported, else not decided
    verdict: Verdict
    counts: str  # how many of them, in words; empty for a single one
    findings: tuple[Finding, ...]  # those with data; without any, all


def find(evidence: Evidence) -> tuple[Finding, ...]:
    """Return what a study says about every sentence, in their order."""
    estimates: list[tuple[Sentence, Estimate]] = []
    for sentence in SENTENCES:
        try:
            estimates += [(sentence, estimate) for estimate in sentence.measure(evidence, sentence.of)]
        except NoDataError as reason:
            estimates.append((sentence, Estimate(name="", note=str(reason))))
    return judge(estimates, evidence.study.label, evidence.study.untested)


def judge(estimates: Sequence[tuple[Sentence, Estimate]], study: str = "", untested: str = "") -> tuple[Finding, ...]:
    """Return a finding for each estimate, corrected over those given that share a family.

    `study` is what they are of. `untested` is why no test may decide, since the number of values followed from results;
    empty: tests do.
    """
    findings = [
        _untested(Finding(**vars(estimate) | {"question": sentence.question}, sentence=sentence, study=study), untested)
        for sentence, estimate in estimates
    ]
    families = grouped((f.sentence.family or f.sentence.id, i) for i, f in enumerate(findings) if not f.outcome)
    for places in families.values():
        for place, decided in zip(places, decide([findings[place] for place in places]), strict=True):
            findings[place] = replace(decided, outcome=_said(decided))
    return tuple(findings)


def _untested(finding: Finding, untested: str) -> Finding:
    """Return a finding whose verdict needs no test, with its outcome; one that is to be tested as it is."""
    question, values = finding.question, finding.by_seed.values()
    if not values:
        return replace(finding, verdict=Verdict.NO_DATA, outcome=finding.note or "no finished run shows it", note="")
    if question.kind == "described":
        return replace(finding, outcome=f"described, not tested: {finding.sentence.reason}")
    if question.kind == "counted":
        above = sum(value > question.margin for value in values)
        outcome = f"{above} of {len(values)} lie above {question.margin:g}; "
        outcome += "counted over these runs, not generalized to others"
        verdict = Verdict.SUPPORTED if above == len(values) else Verdict.REFUTED
        return replace(finding, outcome=outcome, verdict=verdict)
    return replace(finding, outcome=untested)


def _said(finding: Finding) -> str:
    """Return what the test of a finding says."""
    assert finding.significance is not None
    if not finding.significance.decidable:
        return finding.significance.sentence()
    over = f"Holm over {finding.family}" if finding.family > 1 else "the only test of its family"
    if finding.question.kind == "superiority":
        return f"p = {finding.adjusted_p:.3g} ({over})"
    return f"p = {finding.adjusted_p or 0:.3g} for it, {finding.opposite_p or 0:.3g} against it ({over})"


def conclude(findings: Iterable[Finding]) -> tuple[Conclusion, ...]:
    """Return one verdict a sentence over its findings, in the order of their first one."""
    return tuple(_conclusion(own) for own in grouped((finding.sentence.id, finding) for finding in findings).values())


def _conclusion(findings: Sequence[Finding]) -> Conclusion:
    sentence = findings[0].sentence
    with_data = tuple(finding for finding in findings if finding.verdict != Verdict.NO_DATA)
    if not with_data:
        return Conclusion(sentence, Verdict.NO_DATA, "", tuple(findings))
    verdicts = [finding.verdict for finding in with_data]
    overall = Verdict.NOT_DECIDED
    if all(verdict == Verdict.SUPPORTED for verdict in verdicts):
        overall = Verdict.SUPPORTED
    elif Verdict.REFUTED in verdicts and Verdict.SUPPORTED not in verdicts:
        overall = Verdict.REFUTED
    counted = ", ".join(f"{verdict} in {verdicts.count(verdict)}" for verdict in Verdict if verdict in verdicts)
    counts = f"{counted} of {len(with_data)}"
    if sentence.test == "described":
        counts = f"described in {len(with_data)}, not tested"
    return Conclusion(sentence, overall, counts if len(with_data) > 1 else "", with_data)
