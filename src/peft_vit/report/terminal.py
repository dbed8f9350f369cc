"""Paragraphs and tables as text; a table that is wider than the terminal becomes a list."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as TextTable
from rich.text import Text

from peft_vit.errors import printable
from peft_vit.report.document import Paragraph, Table

_WIDEST = 10_000  # columns; more than any table needs


def print_blocks(blocks: Iterable[Paragraph | Table], console: Console | None = None) -> None:
    """Print blocks in order, an empty line around each table; no text of theirs is taken for markup.

    Args:
        blocks: what to print.
        console: default: the standard output; where that is no terminal, lines are as long as tables need.
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
