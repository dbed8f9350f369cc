"""Findings as a table of the report."""

from __future__ import annotations

from collections.abc import Sequence

from peft_vit.deploy.page.document import Column, Table, only_in_file, table
from peft_vit.deploy.page.formatting import number_interval, plain, points_interval
from peft_vit.lab.analysis.findings import Finding
from peft_vit.lab.report.columns import OVER_SEEDS

HOW = (
    "Each sentence is worded so that a positive estimate supports it. 'Not decided' means that these runs cannot tell, "
    "not that there is no difference. Tests are at 5 %, with Holm's correction over all tests of one family. "
    f"{OVER_SEEDS} Pairs share seed, weights, images and split."
)


def findings_table(findings: Sequence[Finding]) -> Table:
    """Return every sentence with its numbers, by experiment or pair."""
    return table("findings", "Findings by experiment", findings, FINDING, HOW)


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
    return f"{number_interval(interval)} {unit}"


FINDING = [
    *only_in_file(id="sentence.id"),
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
]
