"""The one kind of error that a user is meant to read: a single line that names file, field and remedy."""

from __future__ import annotations

from pathlib import Path


class UserError(Exception):
    """Bad input, told in one line.

    The command line prints ``str(error)`` and exits with code 2, without a traceback.

    Args:
        message: what was expected and what to do about it.
        file: the file that holds the fault, if a file does.
        field: the dotted name of the setting, e.g. ``experiments[2].lora.rank``.
        details: lines to be shown below that one, such as a difference.
    """

    def __init__(
        self, message: str, *, file: str | Path | None = None, field: str | None = None, details: str = ""
    ) -> None:
        self.details = details
        self.message = " ".join(message.split())
        self.file = None if file is None else str(file)
        self.field = field
        line = ": ".join(part for part in (self.file, self.field, self.message) if part)
        line = line.encode(errors="backslashreplace").decode()  # a file's name may be any bytes, a record is UTF-8
        super().__init__(line.replace("\n", "\\n").replace("\r", "\\r"))


class SilentNoEffectWarning(UserWarning):
    """A setting is legal but changes nothing in this run; said loudly instead of being ignored."""
