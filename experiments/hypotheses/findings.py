"""What records say of each hypothesis of the registry: supported, refuted, not decided, or no data.

    .venv/bin/python -m experiments.hypotheses.findings RESULTS_DIR [--hypotheses FILE] [--output FILE]

Exit codes: 0 done, 1 done, but a file that may be a result was left out and is named, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from experiments.hypotheses.conclusions import Conclusion, MarkedFinding, conclude, finding_rows, numbers, reasons
from experiments.hypotheses.registry import Findings, all_findings, load_registry, mark_of, unknown_registrations
from experiments.stopping.comparisons import declared, follow_study, stopping_of, stopping_table
from peft_vit import cli
from peft_vit.deploy.page.document import Paragraph, Raw, Table, table
from peft_vit.deploy.page.printed import check_rows_file, print_blocks, print_with_rows
from peft_vit.lab.analysis import read_results
from peft_vit.lab.report.study_tables import HOW

_MARKED = (
    "Registered: the sentence was written down, as it is now, before every run of the study began. "
    "Exploratory: it was not, or it changed since."
)


def print_findings(results_dir: Path, own: Path | None = None, output: Path | None = None) -> None:
    """Print one table a study; write all findings to a .csv or .json file if one is named.

    Raises:
        UserError: for a file of another form or ending, or if one can't be read or written.
        SystemExit: with 1, when all is printed, if a file that may be a result was left out.
    """
    check_rows_file(output, overwrite=True)
    registry = load_registry(own)
    results = read_results(results_dir)
    found = all_findings(results.studies, registry)
    unknown = unknown_registrations(results.studies, registry.digests)
    rows = [marked_row(one, row) for of in found.values() for one, row in zip(of, finding_rows(of), strict=True)]
    print_with_rows(_blocks(found, unknown), rows, output)
    for study in results.studies:
        configuration = declared(study)
        if configuration is not None and (stopping := stopping_of(configuration)) is not None:
            print_blocks([stopping_table(follow_study(configuration, study), stopping, study.scores)])
    for line in results.lines():
        print(line, file=sys.stderr)
    if not results.is_complete:
        raise SystemExit(1)


def marked_row(finding: MarkedFinding, row: Mapping[str, Raw]) -> dict[str, Raw]:
    """Return a finding's row, with the mark behind the verdict."""
    keys = list(row)
    place = keys.index("verdict") + 1
    values = {**row, "marked": finding.mark}
    return {key: values[key] for key in (*keys[:place], "marked", *keys[place:])}


def _blocks(by_study: Mapping[str, Findings], unknown: Sequence[str]) -> Iterator[Paragraph | Table]:
    if unknown:
        yield Paragraph(
            f"Registered by runs, but not in this registry: {', '.join(unknown)}. Name their file with --hypotheses."
        )
    for study, findings in by_study.items():
        concluded = conclude(findings)
        told = [one for one in concluded if one.verdict != "no data"]
        if told:
            rows = (row for conclusion in told for row in _rows(conclusion))
            yield table("findings", f"Findings of {study}", rows, None, "")
        else:
            yield Paragraph(f"\nFindings of {study}: none")
        yield from (
            Paragraph(f"{c.sentence.id}: no data: {reasons(c)} ({c.sentence.text})")
            for c in concluded
            if c.verdict == "no data"
        )
    yield Paragraph(f"\n{HOW} {_MARKED}")


def _rows(conclusion: Conclusion) -> Iterator[dict[str, str]]:
    sentence = conclusion.sentence
    mark = mark_of(conclusion) or "–"
    first = {"hypothesis": sentence.id, "sentence": sentence.text, "verdict": conclusion.verdict, "marked": mark}
    if len(conclusion.findings) == 1:
        (only,) = conclusion.findings
        yield {**first, "sentence": f"{sentence.text} ({only.subject})", **numbers(only)}
        return
    yield {**first, "estimate": "", "n": "", "test": conclusion.counts}
    for found in conclusion.findings:
        said = {"hypothesis": "", "sentence": f"  {found.subject}", "verdict": found.verdict, "marked": mark}
        yield {**said, **numbers(found)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results_dir", type=Path, help="a directory that holds records")
    parser.add_argument("--hypotheses", type=Path, help="a file of own ones, beside hypotheses.yaml")
    parser.add_argument("--output", type=Path, help="write unrounded values to this .csv or .json file")
    asked = parser.parse_args()
    with cli.user_errors():
        print_findings(asked.results_dir, asked.hypotheses, asked.output)
