"""Rows for other programs: unrounded values as .csv or .json; floats in the shortest form that reads back exactly."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peft_vit.errors import UserError
from peft_vit.records import as_csv, write_atomically
from peft_vit.report.document import Paragraph, Raw, Table
from peft_vit.report.terminal import print_blocks


def print_with_rows(
    blocks: Iterable[Paragraph | Table],
    rows: Sequence[dict[str, Raw]],
    output: Path | None,
    columns: Sequence[str] = (),
) -> None:
    """Print blocks; write rows to a .csv or .json file if one is named, with some columns even if there is no row.

    Raises:
        UserError: for another ending, or if the file can't be written.
    """
    check_rows_file(output)
    print_blocks(blocks)
    if output is not None:
        as_table = output.suffix.lower() == ".csv"
        text = as_csv(rows, columns) if as_table else json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
        with writing(output):
            write_atomically(output, text.encode())
        print_blocks([Paragraph(f"{len(rows)} rows: {output}")])


def check_rows_file(output: Path | None) -> None:
    """Refuse another ending than .csv and .json."""
    if output is not None and output.suffix.lower() not in (".csv", ".json"):
        raise UserError("expected a name that ends in .csv or .json", file=output, field="--output")


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Say in one line what keeps a file from being written that --output asks for."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"can't be written ({reason}); choose another file", file=file, field="--output") from None
