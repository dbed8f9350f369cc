"""Rows for other programs: unrounded values as .csv or .json; floats in the shortest form that reads back exactly."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peft_vit.errors import UserError
from peft_vit.report.document import Raw


def as_csv(rows: Sequence[dict[str, Raw]], columns: Sequence[str] | None = None) -> str:
    """Return rows as CSV; `columns`: by default those that occur, in the order in which they do."""
    text = io.StringIO()
    names = columns or list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def encoded(rows: Sequence[dict[str, Raw]], columns: Sequence[str], file: Path) -> bytes:
    """Return the content of a file with rows, in the format that its name asks for.

    Raises:
        UserError: for another ending than .csv and .json.
    """
    ending = file.suffix.lower()
    if ending == ".csv":
        return as_csv(rows, columns).encode()
    if ending == ".json":
        return (json.dumps(rows, indent=1, ensure_ascii=False) + "\n").encode()
    raise UserError("expected a name that ends in .csv or .json", file=file, field="--output")


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Say in one line what keeps a file from being written that --output asks for."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"can't be written ({reason}); choose another file", file=file, field="--output") from None
