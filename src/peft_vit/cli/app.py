"""The application that commands are added to."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="peft-vit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune Vision Transformers with LoRA, AdaLoRA and QA-LoRA, and see which layers deserve rank and bits.",
)
