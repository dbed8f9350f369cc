"""Commands to begin with: what this installation is, and a study to start from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from peft_vit.cli.app import app

EXAMPLES = Path(__file__).parents[1] / "config" / "examples"


@app.command()
def doctor() -> None:
    """Show versions, device, instruction sets, threads, cache, network and extras, to be pasted into an issue.

    Exit codes: 0 studies can be run, 1 something is missing or broken without which they can't.
    """
    from peft_vit.doctor import examine

    is_well = True
    for line in examine():
        print(line, flush=True)
        is_well &= not line.is_fault
    if not is_well:
        raise typer.Exit(1)


@app.command()
def example(
    name: Annotated[
        Literal["quickstart", "demo"], typer.Argument(help="quickstart: every method once; demo: ten minutes")
    ] = "quickstart",
) -> None:
    """Print a study to start from, as in `peft-vit example > study.yaml`."""
    sys.stdout.write((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"))
