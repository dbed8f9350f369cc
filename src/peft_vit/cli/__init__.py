"""The command line. It parses arguments and calls the package; torch is imported only by commands that need it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from peft_vit.cli import study_commands, deploy_commands, model_commands  # isort: skip  # in the order of --help
from peft_vit.cli.app import app
from peft_vit.errors import UserError

__all__ = ["app", "main", "user_errors"]

_INTERRUPTED = 130  # what shells report for SIGINT


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn bad input into one line and exit code 2, and Ctrl-C into exit code 130."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", *error.details.splitlines(), sep="\n", file=sys.stderr)
        raise SystemExit(2) from None
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; the same command goes on with the runs that are not done", file=sys.stderr)
        raise SystemExit(_INTERRUPTED) from None


def main(arguments: list[str] | None = None, command: Callable[..., Any] = app) -> None:
    """Run the command line."""
    with user_errors():
        try:
            code = command(arguments, standalone_mode=False)
        except Exception as error:
            # Typer's own errors (an unknown option, a value out of range) share no public class, only this method.
            if not hasattr(error, "format_message"):
                raise
            raise UserError(f"{error.format_message()} Try --help.", file="command line") from None
        if code == _INTERRUPTED:  # Typer turns Ctrl-C into this code
            raise KeyboardInterrupt
    raise SystemExit(code if isinstance(code, int) else 0)
