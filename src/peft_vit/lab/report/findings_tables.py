"""Findings as tables of the report."""

from __future__ import annotations

from collections.abc import Sequence

from peft_vit.deploy.page.document import Raw, Table
from peft_vit.deploy.page.formatting import number_interval, plain, points_interval, scaled
from peft_vit.deploy.page.tables import Column, csv_rows, only_in_file, table
from peft_vit.lab.analysis.findings import Conclusion, Finding, conclude
from peft_vit.lab.report.columns import OVER_SEEDS

HOW = (
    "Each sentence is worded so that a positive estimate supports it. 'Not decided' means that these runs cannot tell, "
    "not that there is no difference. Tests are at 5 %, with Holm's correction over all tests of one family. "
    f"{OVER_SEEDS} Pairs share seed, weights, images and split."
)


_SENTENCE = [*only_in_file(id="sentence.id"), Column("sentence", "sentence.text", plain, "sentence")]


def findings_tables(findings: Sequence[Finding]) -> tuple[Table, ...]:
    """Return one verdict a sentence, the findings behind them, and the sentences without data; no empty table."""
    concluded = conclude(findings)
    with_data = [conclusion for conclusion in concluded if conclusion.verdict != "no data"]
    detailed = [finding for conclusion in with_data for finding in conclusion.findings]
    verdicts = table(
        "verdicts",
        "Verdicts",
        with_data,
        [
            *_SENTENCE,
            "verdict",
            Column("experiments or pairs", "counts", lambda counts: counts or "1"),
            *only_in_file(n=lambda conclusion: len(conclusion.findings)),
        ],
        "Supported: in every experiment with data. Refuted: in at least one, and supported in none. "
        "The table below has the estimates.",
    )
    details = table("findings", "Findings by experiment", detailed, _FINDING, HOW, folded=True)
    without_data = table(
        "without_data",
        "Sentences without data in these records",
        [conclusion for conclusion in concluded if conclusion.verdict == "no data"],
        [*_SENTENCE, Column("why", reasons, data="reason")],
        "Most are about experiments that this study does not have.",
        folded=True,
    )
    return tuple(made for made in (verdicts, details, without_data) if made.rows)


def reasons(conclusion: Conclusion) -> str:
    """Return why a sentence has no data."""
    return plain("; ".join(dict.fromkeys(finding.outcome for finding in conclusion.findings)))


def numbers(finding: Finding) -> dict[str, str]:
    """Return what is beside a finding in a table: estimate, n and test, in words."""
    n_of = finding.n_of if len(finding.by_seed) != 1 else finding.n_of.replace("seeds", "seed").replace("pairs", "pair")
    test = finding.outcome if finding.test == "none" else f"{finding.test}: {finding.outcome}"
    note = f" ({finding.note})" if finding.note else ""
    return {"estimate": estimate_of(finding), "n": f"{len(finding.by_seed)} {n_of}", "test": plain(test + note)}


def estimate_of(finding: Finding) -> str:
    """Return the estimate with its interval and unit; shares as points."""
    interval, unit = finding.interval, finding.sentence.unit
    if interval is None:
        return "–"
    if unit == "share":
        return f"{points_interval(interval)} points"
    if unit == "bytes":
        return f"{number_interval(scaled(interval, 1e-6), 1)} MB"
    if unit == "nats" and abs(interval.estimate) < 0.1:
        return f"{number_interval(interval, 4)} nats"
    return f"{number_interval(interval)} {unit}"


_FINDING = [
    *only_in_file(study="study", id="sentence.id"),
    Column("sentence", "sentence.text", plain, "sentence"),
    Column("experiment or pair", "subject"),
    Column("verdict", "verdict"),
    *only_in_file(
        estimate="interval.estimate",
        low="interval.low",
        high="interval.high",
        unit="sentence.unit",
        n=lambda finding: len(finding.by_seed),
        n_of="n_of",
        test="test",
        margin="sentence.margin",
        p_holm="adjusted_p",
        p_holm_opposite="opposite_p",
        outcome="outcome",
        note="note",
    ),
    Column("estimate", estimate_of),
    Column("n", lambda finding: numbers(finding)["n"]),
    Column("test", lambda finding: numbers(finding)["test"]),
    *only_in_file(refuted_by="sentence.refuted_by", source="sentence.source"),
]


def finding_rows(findings: Sequence[Finding]) -> list[dict[str, Raw]]:
    """Return findings as rows in full precision."""
    return csv_rows(findings, _FINDING)
