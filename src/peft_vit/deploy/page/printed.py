"""What commands print and write: blocks as text, rows for other programs; floats in the shortest form that reads back.

A table that is wider than the terminal becomes a list.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as TextTable
from rich.text import Text

from peft_vit.base.errors import UserError, os_fault, printable
from peft_vit.base.files import refuse_existing, write_atomically
from peft_vit.deploy.page.document import Paragraph, Table
from peft_vit.runs.records.run_rows import as_csv

_WIDEST = 10_000  # columns; more than any table needs


def print_blocks(blocks: Iterable[Paragraph | Table], console: Console | None = None) -> None:
    """Print blocks in order, an empty line around each table; no text of theirs is read as markup.

    Args:
        blocks: what to print.
        console: default: the standard output; where that is not a terminal, lines are as long as tables need.
    """
    if console is None:
        console = Console(highlight=False)
        console = console if console.is_terminal else Console(highlight=False, width=_WIDEST)
    for block in blocks:
        if isinstance(block, Paragraph):
            for line in block.text.split("\n"):
                console.print(Text(printable(line)), soft_wrap=True)
        else:
            _print_table(console, block)


def _print_table(console: Console, table: Table) -> None:
    console.print(Text(f"\n{printable(table.title)}"), soft_wrap=True)
    text = TextTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in table.columns:
        text.add_column(Text(printable(name)), no_wrap=True)
    for row in table.rows:
        text.add_row(*(Text(printable(cell)) for cell in row))
    if Measurement.get(console, console.options.update(max_width=_WIDEST), text).maximum <= console.width:
        console.print(text)
    else:
        # As lines "column: cell" below each first cell: columns would be cut.
        console.print()
        for first, *others in table.rows:
            console.print(Text(printable(first)), soft_wrap=True)
            for name, cell in zip(table.columns[1:], others, strict=True):
                colon = "" if name.endswith("?") else ":"
                console.print(Text(printable(f"  {name}{colon} {cell}")), soft_wrap=True)
        console.print()
    if table.note:
        console.print(Text(printable(table.note)), soft_wrap=True)
        console.print()


if TYPE_CHECKING:
    from pandas import DataFrame

ENDINGS = (".csv", ".json")


def print_with_rows(
    blocks: Iterable[Paragraph | Table], rows: Sequence[Mapping[str, Any]], output: Path | None
) -> None:
    """Print blocks; write rows to a .csv or .json file if one is named.

    Raises:
        UserError: if the file can't be written; see `check_rows_file` for what is refused before.
    """
    print_blocks(blocks)
    if output is not None:
        write_rows(rows, output, {})
        print_blocks([Paragraph(f"{len(rows)} rows: {output}")])


def check_rows_file(output: Path | None, endings: Sequence[str] = ENDINGS, *, overwrite: bool = False) -> None:
    """Refuse another ending than these, and to replace a file unless that was asked for."""
    if output is None:
        return
    if output.suffix.lower() not in endings:
        expected = f"expected a name that ends in {', '.join(endings[:-1])} or {endings[-1]}"
        raise UserError(expected, file=output, field="--output")
    refuse_existing(output, overwrite=overwrite)


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
