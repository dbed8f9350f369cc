"""Rows for other programs: unrounded values in a file; floats in the shortest form that reads back exactly."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_vit.errors import UserError, os_fault
from peft_vit.records import as_csv, write_atomically
from peft_vit.report.document import Paragraph, Table
from peft_vit.report.terminal import print_blocks

if TYPE_CHECKING:
    from pandas import DataFrame

ENDINGS = (".csv", ".json")


def print_with_rows(
    blocks: Iterable[Paragraph | Table],
    rows: Sequence[Mapping[str, Any]],
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
        write_rows(rows, output, dict.fromkeys(columns))
        print_blocks([Paragraph(f"{len(rows)} rows: {output}")])


def check_rows_file(output: Path | None, endings: Sequence[str] = ENDINGS) -> None:
    """Refuse another ending than these."""
    if output is not None and output.suffix.lower() not in endings:
        problem = f"expected a name that ends in {', '.join(endings[:-1])} or {endings[-1]}"
        raise UserError(problem, file=output, field="--output")


def write_rows(rows: Sequence[Mapping[str, Any]], output: Path, columns: Mapping[str, str | None]) -> None:
    """Write rows as CSV, which leaves None empty, as a JSON list of objects, or as Parquet with nulls.

    Args:
        rows: plain values by column.
        output: the file, whose ending says which.
        columns: that a table has even without a row; see `frame`.
    """
    ending = output.suffix.lower()
    if ending == ".csv":
        content = as_csv(rows, list(columns)).encode()
    elif ending == ".json":
        content = (json.dumps(rows, indent=1, ensure_ascii=False) + "\n").encode()
    else:
        content = frame(rows, columns).to_parquet(engine="pyarrow", index=False)
    with os_fault("can't be written", output, remedy="choose another file", field="--output"):
        write_atomically(output, content)


def frame(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str | None]) -> DataFrame:
    """Return these columns as a table of pandas; those that may be empty are given a type of their own."""
    from pandas import DataFrame

    return DataFrame(rows, columns=list(columns)).astype({name: kind for name, kind in columns.items() if kind})
