"""The application that commands are added to."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import typer

app = typer.Typer(
    name="peft-vit",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune Vision Transformers with LoRA, AdaLoRA and QA-LoRA, and see how sure each comparison is.",
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"peft-vit {metadata.version('peft-vit')}")
        raise typer.Exit


@app.callback()
def _of_no_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...
