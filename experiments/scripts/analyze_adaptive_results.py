"""Write analysis_summary.md on the adaptive study's records. A thin script over `peft-vit report`.

Exit code 2, with one line, if there is nothing to analyze.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peft_vit import cli

OUTPUTS = Path(__file__).resolve().parents[2] / "experiments" / "outputs"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description="Write analysis_summary.md, figures and tables from records.")
    parser.add_argument(
        "--results-dir",
        type=Path,
        metavar="DIR",
        default=OUTPUTS / "adaptive",
        help="where the records are; default: experiments/outputs/adaptive",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        default=OUTPUTS / "adaptive_analysis",
        help="where the summary goes; default: experiments/outputs/adaptive_analysis",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Parse, and hand the directories to `peft-vit report`."""
    asked = parse(arguments)
    cli.main(["report", str(asked.results_dir), "--format", "md", "--output", str(asked.output_dir)])


if __name__ == "__main__":
    main()
