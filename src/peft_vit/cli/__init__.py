"""The command line. It parses arguments and calls the package; torch is imported only by commands that need it."""

from __future__ import annotations

import codecs
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import typer

from peft_vit.base.errors import UserError
from peft_vit.cli import deploy_commands, image_commands, label_command, model_commands, study_commands
from peft_vit.cli.app import INTERRUPTED, app
from peft_vit.runs.executors.torchrun import help_first, launch, leading

__all__ = ["app", "main", "user_errors"]

_UNREAD = 141  # what shells report for SIGPIPE
_HINTS = {
    "--from": "train takes it, with the output of train or tune",
    "--resume": "the same command continues where it was stopped",
}


_OTHER_TOOLS = {"fit": "train", "classify": "train", "val": "test", "evaluate": "test", "benchmark": "bench"}
_AS_VALUES = re.compile(r"([a-z_]+)=(.*)")  # how other tools take options


for _command in app.registered_commands:
    _command.help = re.sub(r"Exit\s+codes:", "\n\nExit codes:", inspect.getdoc(_command.callback) or "")


def _replaced(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    return "".join("-" if letter == "\N{MINUS SIGN}" else "?" for letter in letters), error.end


codecs.register_error("peft_vit", _replaced)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn bad input into one line and exit code 2, no result into one and 1, and Ctrl-C into exit code 130."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", *error.details.splitlines(), sep="\n", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except (KeyboardInterrupt, typer.Abort):
        print("stopped; the same command does what is left", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


@contextmanager
def _while_read() -> Iterator[None]:
    """End quietly if nobody reads the output any more, as in `peft-vit runs | head -1`.

    Rich and Typer make SystemExit(1) of it.

    Source:
        https://docs.python.org/3/library/signal.html#note-on-sigpipe
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # a service may have none
                sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:
        if not any(isinstance(cause, BrokenPipeError) for cause in (error, error.__context__)):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at the interpreter's end fails
        raise SystemExit(_UNREAD) from None


@contextmanager
def _by_torchrun() -> Iterator[None]:
    """Let the first of torchrun's processes be the command, and the others help with its runs."""
    launched = launch()
    if launched is None:
        yield
    elif launched.rank == 0:
        with leading(launched):
            yield
    else:
        help_first(launched)
        raise SystemExit(0)


def _in_our_words(error: Any) -> UserError:
    """Return what Typer has refused: the argument or option as it is typed, what is wrong, and what to do."""
    context, name = error.ctx, getattr(error, "option_name", None)
    command = "peft-vit" if context is None or context.parent is None else f"peft-vit {context.info_name}"
    see = f"see {command} --help"
    if context is None and name is not None:
        fault = "takes no value" if "not take" in error.message else "needs a value"
        return UserError(f"{fault}; {see}", field=name)
    if (param := getattr(error, "param", None)) is not None:
        field = param.opts[0] if param.param_type_name == "option" else param.metavar or param.name.upper()
        fault = error.message.rstrip(".") or "is missing"
        return UserError(f"{fault[0].lower()}{fault[1:]}; {see}", field=field)
    if name is not None:
        options = [option for param in context.command.params for option in param.opts]
        short = [option for option in options if "".join(word[:1] for word in option[2:].split("-")) == name[2:]]
        likely = " or ".join(short or [option for option in error.possibilities or () if option != "--help"])
        hint = _HINTS.get(name) or (f"did you mean {likely}?" if likely else see)
        return UserError(f"no such option of {command}; {hint}", field=name)
    message = error.format_message().rstrip(".")
    if (found := re.search(r"No such command '(\w+)'", message)) and found[1] in _OTHER_TOOLS:
        return UserError(f"no command {found[1]}; it is peft-vit {_OTHER_TOOLS[found[1]]}", file="command line")
    return UserError(message if message.endswith("?") else f"{message}; {see}", file="command line")


def main(arguments: list[str] | None = None, command: Callable[..., Any] = app) -> None:
    """Run the command line."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # in a pipe on Windows it may have the letters of few languages
        sys.stdout.reconfigure(errors="peft_vit")
    with _while_read(), user_errors(), _by_torchrun():
        try:
            for before, given in pairwise(sys.argv[1:] if arguments is None else arguments):
                if (option := _AS_VALUES.fullmatch(given)) and before[:2] != "--" and not os.path.exists(given):
                    name, value = option.groups()
                    raise UserError(f"options are written as --{name.replace('_', '-')} {value}", field=given)
            code = command(arguments, standalone_mode=False)
        except Exception as error:
            # Typer's own errors (an unknown option, a value out of range) share no public class, only this method.
            if not hasattr(error, "format_message"):
                raise
            if not error.format_message():  # no command was given, and the help says it all
                raise SystemExit(2) from None
            raise _in_our_words(error) from None
        if code == INTERRUPTED:  # Typer turns Ctrl-C into this code
            raise KeyboardInterrupt
    raise SystemExit(code if isinstance(code, int) else 0)
