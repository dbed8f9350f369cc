"""Paragraphs and tables as text: on a terminal as wide as it is, elsewhere as wide as they need to be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO

from rich import box
from rich.console import Console
from rich.table import Table as TextTable
from rich.text import Text

from peft_vit.errors import printable
from peft_vit.report.document import Paragraph, Table

_PLAIN_WIDTH = 200  # columns where the output is no terminal


def print_blocks(blocks: Iterable[Paragraph | Table], file: IO[str] | None = None) -> None:
    """Print blocks in order, an empty line around each table; no text of theirs is taken for markup."""
    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        console = Console(file=file, highlight=False, width=_PLAIN_WIDTH)
    for block in blocks:
        if isinstance(block, Paragraph):
            for line in block.text.split("\n"):
                console.print(Text(printable(line)), soft_wrap=True)
        else:
            _print_table(console, block)


def _print_table(console: Console, table: Table) -> None:
    console.print(Text(f"\n{printable(table.title)}"), soft_wrap=True)
    text = TextTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(table.columns):
        text.add_column(Text(printable(name)), no_wrap=place == 0, overflow="fold")  # names are for copying
    for row in table.rows:
        text.add_row(*(Text(printable(cell)) for cell in row))
    console.print(text)
    if table.note:
        console.print(Text(printable(table.note)), soft_wrap=True)
        console.print()
