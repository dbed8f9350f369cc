"""Commands that read records; none of them imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peft_vit.cli.app import ResultsDir, app


@app.command()
def analyze(
    results_dir: ResultsDir,
    output_dir: Annotated[Path | None, typer.Option(help="default: RESULTS_DIR/analysis")] = None,
) -> None:
    """Write analysis_summary.md with tables and figures from records."""
    from peft_vit.report import write_analysis

    print(f"Analysis: {write_analysis(results_dir, output_dir or results_dir / 'analysis')}")


@app.command()
def report(
    results_dir: ResultsDir,
    output_dir: Annotated[Path | None, typer.Option(help="default: RESULTS_DIR/report")] = None,
) -> None:
    """Write the report: one HTML file that needs no network, Markdown, and every figure as PNG and SVG."""
    from peft_vit.report import build_report

    files = build_report(results_dir, output_dir or results_dir / "report")
    print(f"Report: {files.html}\nMarkdown: {files.markdown}")
