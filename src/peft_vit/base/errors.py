"""The one kind of error that a user is meant to read: a single line that names file, field and remedy."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

# What moves a terminal's cursor, breaks a line or turns the direction of writing: no part of a name.
CONTROL_CHARACTER = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST_PART, _LONGEST_MESSAGE = 500, 2000


def printable(text: str) -> str:
    """Return text on one line that does nothing to a terminal; what would is written as an escape, ``\\x1b``."""
    return CONTROL_CHARACTER.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class UserError(Exception):
    """Bad input, reported in one line.

    The command line prints ``str(error)`` and exits with `exit_code`, without a traceback.

    Args:
        message: what was expected and what to do about it.
        file: the file that holds the fault, if a file does.
        field: the dotted name of the setting, e.g. ``experiments[2].lora.rank``.
        details: lines to be shown below that one, such as a difference.
    """

    exit_code = 2

    def __init__(
        self, message: str, *, file: str | Path | None = None, field: str | None = None, details: str = ""
    ) -> None:
        self.details = details
        self.message = " ".join(message.split())
        self.file = None if file is None else str(file)
        self.field = field
        names = (_shortened(part, _LONGEST_PART) for part in (self.file, self.field) if part)
        line = ": ".join((*names, _shortened(self.message, _LONGEST_MESSAGE)))
        super().__init__(printable(line))  # a file's name may be any bytes, a record is UTF-8

    def about(self, field: str | None) -> UserError:
        """Return the same of a setting by another name; None: of none."""
        return UserError(self.message, file=self.file, field=field, details=self.details)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"


@contextmanager
def named(file: str | Path | None) -> Iterator[None]:
    """Name a file in errors that come of what it says and name none themselves."""
    try:
        yield
    except UserError as error:
        if error.file is not None:
            raise
        raise UserError(error.message, file=file, field=error.field, details=error.details) from None


@contextmanager
def agreeing_with(file: Path) -> Iterator[None]:
    """Name a second file in errors about one that has to agree with it: who knows which of the two is wrong."""
    try:
        yield
    except UserError as error:
        message = error.message if error.file is None else f"{error.message}; or {file.name} is wrong"
        raise UserError(message, file=error.file or file, field=error.field) from None


@contextmanager
def os_fault(problem: str, file: Path, *, remedy: str = "", field: str | None = None) -> Iterator[None]:
    """Tell an OSError as a UserError: what could not be done with a file, the system's reason, and what to do."""
    try:
        yield
    except OSError as error:
        message = f"{problem} ({error.strerror})"
        raise UserError(f"{message}; {remedy}" if remedy else message, file=file, field=field) from None


def problem_of(fault: ErrorDetails, *, remedy: bool = True) -> str:
    """Return a fault that pydantic has found as users read it: what was expected, what was given, and what to do.

    Args:
        fault: one of `ValidationError.errors()`.
        remedy: whether to say what to do about a key that is missing or unknown.
    """
    kind, text = fault["type"], fault["msg"].removeprefix("Value error, ")
    known = {
        "extra_forbidden": ("unknown key here", "remove it or correct its spelling"),
        "missing": ("is missing", "add it"),
        "string_too_short": ("is empty", "fill it in"),
    }
    if kind in known:
        return "; ".join(known[kind][: 1 + remedy])
    if kind in ("value_error", "refused"):  # our own
        return text
    text = f"{text[0].lower()}{text[1:]}".replace("an object", "a mapping").replace("valid array", "list")
    return text if kind == "json_invalid" else f"{text}, got {reprlib.repr(fault['input'])}"


@contextmanager
def foreign_fault(
    problem: str, file: str | Path | None = None, *, remedy: str = "", field: str | None = None
) -> Iterator[None]:
    """Tell as a UserError, in one line, whatever goes wrong with a file of others: it can be wrong in any way."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = f"{problem} ({first_line(error)})"
        raise UserError(f"{message}; {remedy}" if remedy else message, file=file, field=field) from None


def first_fault(error: ValidationError) -> tuple[str | None, str]:
    """Return the field and the message of the first fault that pydantic has found."""
    first = error.errors(include_url=False)[0]
    return ".".join(str(part) or "''" for part in first["loc"]) or None, problem_of(first, remedy=False)


def first_line(error: Exception) -> str:
    """Return an error's type and the beginning of what it says, for a line about what a library could not do."""
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def one_line(error: Exception) -> str:
    """Return the beginning of what an error says, its lines as one."""
    return " ".join(str(error).split())[:300]


@contextmanager
def checked(file: Path, remedy: str) -> Iterator[None]:
    """Tell in one line the first fault that pydantic finds in what a file says, or why it can't be read.

    Raises:
        FileNotFoundError: if there is none.
        UserError: with file, field and remedy.
    """
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        field, fault = first_fault(error)
        raise UserError(f"{fault}; {remedy}", file=file, field=field) from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"can't be read ({error.strerror}); {remedy}", file=file) from None


class NothingDoneError(UserError):
    """A command was asked for something possible, and has ended without a result; the line says what to do."""

    exit_code = 1


class DivergedError(UserError):
    """The loss, its gradient or what is made of them is no longer finite; the same run would diverge again."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out, of whatever device: torch has a type of its own for some of its errors only."""
    from_torch = isinstance(error, RuntimeError)
    return isinstance(error, MemoryError) or (
        from_torch and any(text in str(error) for text in ("out of memory", "DefaultCPUAllocator"))
    )


class DataWarning(UserWarning):
    """The images leave doubt about a number; the text begins with `PREFIX`, by which a report knows it."""

    PREFIX = "Images: "


class SilentNoEffectWarning(UserWarning):
    """A setting is legal but changes nothing in this run; said loudly instead of being ignored."""


class UnderflowWarning(UserWarning):
    """Weights are too small for the numbers that are to stand for them, so that they are rounded to others or to 0."""
