"""The application that commands are added to."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import typer

from peft_vit.config import AskedPrecision, Device
from peft_vit.studies.executors import ExecutorName

# Options that several commands have.
ExecutorOption = Annotated[ExecutorName, typer.Option(help="processes on this machine, or a Ray cluster")]
PrecisionOption = Annotated[AskedPrecision, typer.Option(help="auto: bf16 where the device computes in it, else fp32")]
DeviceOption = Annotated[Device, typer.Option(help="auto: a GPU if there is one")]

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
