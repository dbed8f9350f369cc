"""One verdict on a hypothesis over several experiments, and what stands of it in tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from peft_vit.base.statistics import Verdict
from peft_vit.base.statistics.descriptive import grouped
from peft_vit.deploy.page.document import Raw, csv_rows, only_in_file
from peft_vit.deploy.page.formatting import number_interval, plain, scaled
from peft_vit.lab.analysis.findings import Finding, Sentence
from peft_vit.lab.report import study_tables

Unit = Literal["share", "log2 ratio", "ranks", "rho", "index", "factor", "nats", "s", "bytes"]
Mark = Literal["registered", "exploratory"]


@dataclass(frozen=True, kw_only=True)
class Registered(Sentence):
    """A sentence of the registry."""

    source: str  # who states it
    refuted_by: str | None = None  # in words; None: nothing is tested
    reason: str = ""  # why it is only described


@dataclass(frozen=True, kw_only=True)
class MarkedFinding(Finding):
    """A finding, and whether its sentence stood there before the study's runs; None without data."""

    sentence: Registered
    study: str  # whose runs these are
    mark: Mark | None = None


@dataclass(frozen=True)
class Conclusion:
    """One sentence over several experiments."""

    sentence: Sentence
    # supported if every finding with data is, refuted if one is and none supported, else not decided
    verdict: Verdict
    counts: str  # how many of them, in words; empty for a single one
    findings: tuple[Finding, ...]  # those with data; without any, all


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


def reasons(conclusion: Conclusion) -> str:
    """Return why a sentence has no data."""
    return plain("; ".join(dict.fromkeys(finding.outcome for finding in conclusion.findings)))


def numbers(finding: Finding) -> dict[str, str]:
    """Return what is beside a finding in a table: estimate, n and test, in words."""
    return study_tables.numbers(finding) | {"estimate": estimate_of(finding)}


def estimate_of(finding: Finding) -> str:
    """Return the estimate with its interval and unit; shares as points, bytes as MB, small nats with more digits."""
    interval, unit = finding.interval, finding.sentence.unit
    if interval is not None and unit == "bytes":
        return f"{number_interval(scaled(interval, 1e-6), 1)} MB"
    if interval is not None and unit == "nats" and abs(interval.estimate) < 0.1:
        return f"{number_interval(interval, 4)} nats"
    return study_tables.estimate_of(finding)


def finding_rows(findings: Sequence[MarkedFinding]) -> list[dict[str, Raw]]:
    """Return findings as rows in full precision."""
    said = only_in_file(refuted_by="sentence.refuted_by", source="sentence.source")
    return csv_rows(findings, [*only_in_file(study="study"), *study_tables.FINDING, *said])
