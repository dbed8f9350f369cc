"""Findings as tables of the report, on the terminal, and as rows for other programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from peft_vit.analysis import Study
from peft_vit.analysis.findings import Conclusion, Finding, conclude, unknown_registrations
from peft_vit.report.document import UNSEEN, Cell, Paragraph, Raw, Row, Table
from peft_vit.report.formatting import number_interval, plain, points_interval, scaled
from peft_vit.report.rows import print_with_rows
from peft_vit.report.tables import OVER_SEEDS, cell

_HOW = (
    "Each hypothesis is worded so that a positive estimate supports it. Registered: it was written down, as it is now, "
    "before every run that it uses began. Exploratory: it was not, or it changed since. 'Not decided' means that these "
    "runs cannot tell, not that there is no difference. Tests are at 5 %, with Holm's correction over all tests of one "
    f"family. {OVER_SEEDS} Pairs share seed, weights, images and split."
)


def findings_blocks(study: Study, findings: Sequence[Finding]) -> tuple[Paragraph | Table, ...]:
    """Return one verdict a sentence, the findings behind them, and the sentences without data; no empty table.

    Sentences that runs registered and that nobody asked about here are named: they would be left out in silence.
    """
    unknown = unknown_registrations([study], {finding.hypothesis.id for finding in findings})
    named = f"Registered by these runs, but not in the registry of this report: {', '.join(unknown)}."
    named += " Name their file with --hypotheses."
    concluded = conclude(findings)
    told = [one for one in concluded if one.verdict != "no data"]
    silent = [one for one in concluded if one.verdict == "no data"]
    tables = (_verdicts(told), _details(told), _without_data(silent))
    return (*([Paragraph(named)] if unknown else []), *(table for table in tables if table.rows))


def _sentence(conclusion: Conclusion) -> dict[str, Cell]:
    hypothesis = conclusion.hypothesis
    return {UNSEEN: Cell("", {"id": hypothesis.id}), "sentence": cell("sentence", hypothesis.sentence, plain)}


def _verdicts(concluded: Sequence[Conclusion]) -> Table:
    return Table.of(
        "verdicts",
        "Verdicts",
        (
            {
                **_sentence(c),
                "verdict": cell("verdict", c.verdict),
                "experiments or pairs": Cell(c.counts or "1", {"counts": c.counts}),
                "marked": Cell(c.mark or "–", {"marked": c.mark, "n": len(c.findings)}),
            }
            for c in concluded
        ),
        "Supported: in every experiment with data. Refuted: in at least one, and supported in none. "
        "The table below has the estimates.",
    )


def _details(concluded: Sequence[Conclusion]) -> Table:
    findings = [finding for conclusion in concluded for finding in conclusion.findings]
    return Table.of(
        "findings",
        "Findings by experiment",
        (
            {
                "sentence": plain(f.hypothesis.sentence),
                "experiment or pair": f.subject,
                "verdict": f.verdict,
                "marked": f.mark or "–",
                **_numbers(f),
            }
            for f in findings
        ),
        _HOW,
        data=finding_rows(findings),
        folded=True,
    )


def _without_data(concluded: Sequence[Conclusion]) -> Table:
    return Table.of(
        "without_data",
        "Hypotheses without data in these records",
        ({**_sentence(c), "why": cell("reason", _reasons(c))} for c in concluded),
        "Most are about experiments that this study does not have.",
        folded=True,
    )


def _reasons(conclusion: Conclusion) -> str:
    return plain("; ".join(dict.fromkeys(finding.outcome for finding in conclusion.findings)))


def _numbers(finding: Finding) -> dict[str, str]:
    n_of = finding.n_of if finding.n != 1 else finding.n_of.replace("seeds", "seed").replace("pairs", "pair")
    said = finding.outcome if finding.test == "none" else f"{finding.test}: {finding.outcome}"
    note = f" ({finding.note})" if finding.note else ""
    return {"estimate": estimate_of(finding), "n": f"{finding.n} {n_of}", "test": plain(said + note)}


def estimate_of(finding: Finding) -> str:
    """Return the estimate with its interval and unit; shares as points."""
    interval, unit = finding.interval, finding.hypothesis.unit
    if interval is None:
        return "–"
    if unit == "share":
        return f"{points_interval(interval)} points"
    if unit == "bytes":
        return f"{number_interval(scaled(interval, 1e-6), 1)} MB"
    if unit == "nats" and abs(interval.estimate) < 0.1:
        return f"{number_interval(interval, 4)} nats"
    return f"{number_interval(interval)} {unit}"


def finding_rows(findings: Sequence[Finding]) -> list[dict[str, Raw]]:
    """Return findings as rows in full precision."""
    return [
        {
            "study": f.study,
            "id": f.hypothesis.id,
            "sentence": f.hypothesis.sentence,
            "subject": f.subject,
            "verdict": f.verdict,
            "marked": f.mark,
            "estimate": None if f.interval is None else f.interval.estimate,
            "low": None if f.interval is None else f.interval.low,
            "high": None if f.interval is None else f.interval.high,
            "unit": f.hypothesis.unit,
            "n": f.n,
            "n_of": f.n_of,
            "test": f.test,
            "margin": f.hypothesis.margin,
            "p_holm": f.p_value,
            "p_holm_opposite": f.opposite_p,
            "outcome": f.outcome,
            "note": f.note,
            "refuted_by": f.hypothesis.refuted_by,
            "source": f.hypothesis.source,
        }
        for f in findings
    ]


def print_findings(by_study: Mapping[str, Sequence[Finding]], unknown: Sequence[str], output: Path | None) -> None:
    """Print one table a study; write all findings to a .csv or .json file if one is named.

    Args:
        by_study: in order.
        unknown: ids that runs registered and that the registry does not have.
        output: the file; None: nothing is written.

    Raises:
        UserError: for another ending, or if the file can't be written.
    """
    rows = finding_rows([finding for findings in by_study.values() for finding in findings])
    print_with_rows(_blocks(by_study, unknown), rows, output)


def _blocks(by_study: Mapping[str, Sequence[Finding]], unknown: Sequence[str]) -> Iterator[Paragraph | Table]:
    if unknown:
        yield Paragraph(
            f"Registered by runs, but not in this registry: {', '.join(unknown)}. Name their file with --hypotheses."
        )
    for study, findings in by_study.items():
        concluded = conclude(findings)
        told = [one for one in concluded if one.verdict != "no data"]
        if told:
            rows = (row for conclusion in told for row in _terminal_rows(conclusion))
            yield Table.of("findings", f"Findings of {study}", rows, note="")
        else:
            yield Paragraph(f"\nFindings of {study}: none")
        yield from (
            Paragraph(f"{c.hypothesis.id}: no data: {_reasons(c)} ({c.hypothesis.sentence})")
            for c in concluded
            if c.verdict == "no data"
        )
    yield Paragraph(f"\n{_HOW}")


def _terminal_rows(conclusion: Conclusion) -> Iterator[Row]:
    hypothesis = conclusion.hypothesis

    def row(id: str, sentence: str, of: Conclusion | Finding, numbers: dict[str, str]) -> Row:
        return {"hypothesis": id, "sentence": sentence, "verdict": of.verdict, "marked": of.mark or "–"} | numbers

    if len(conclusion.findings) == 1:
        (only,) = conclusion.findings
        yield row(hypothesis.id, f"{hypothesis.sentence} ({only.subject})", only, _numbers(only))
        return
    counts = {"estimate": "", "n": "", "test": conclusion.counts}
    yield row(hypothesis.id, hypothesis.sentence, conclusion, counts)
    for finding in conclusion.findings:
        yield row("", f"  {finding.subject}", finding, _numbers(finding))
