"""What tables are made of: columns over rows. A column is defined once, for the reader and for the CSV file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from peft_vit.base.statistics import Interval
from peft_vit.deploy.page.document import Raw, Table


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: its heading; empty where a reader does not see it.
        of: its value in a row: the name of a key or field, or a path of them ("experiment.name"), which is None beyond
            a None; or what to make of the row.
        show: the text of a value.
        data: what the CSV file has of it: the name of the value there, or what to make of the value. By default a key
            or field is under its own name, and anything else is left out, as with "".
        none: the text where the value is None.
    """

    title: str
    of: str | Callable[[Any], Any]
    show: Callable[[Any], str] = str
    data: str | Callable[[Any], Mapping[str, Raw]] | None = None
    none: str = "–"

    def value(self, row: Any) -> Any:
        """Return the value in a row."""
        if callable(self.of):
            return self.of(row)
        for name in self.of.split("."):
            if row is not None:
                row = row[name] if isinstance(row, Mapping) else getattr(row, name)
        return row

    def text(self, row: Any) -> str:
        """Return what a reader sees."""
        value = self.value(row)
        return self.none if value is None else self.show(value)

    def values(self, row: Any) -> Mapping[str, Raw]:
        """Return what the CSV file has."""
        data = self.data
        if data is None:
            data = self.of if isinstance(self.of, str) and "." not in self.of else ""
        if callable(data):
            return data(self.value(row))
        return {data: self.value(row)} if data else {}


def table(
    slug: str,
    title: str,
    rows: Iterable[Any],
    columns: Iterable[Column | str] | None,
    note: str,
    *,
    data: Iterable[Mapping[str, Raw]] | None = None,
    folded: bool = False,
) -> Table:
    """Return a table of rows; without any there are no headings, and the note is all.

    Args:
        slug: name for files and anchors.
        title: what it shows.
        rows: mappings or objects.
        columns: a name alone stands for the key or field of that name, under itself; None: every key of the first row.
        note: how to read it.
        data: the rows of the CSV file, where they are others than those that are shown.
        folded: see `Table`.
    """
    rows = list(rows)
    if columns is None:
        columns = [Column(name, itemgetter(name)) for name in (rows[0] if rows else ())]
    every = [c if isinstance(c, Column) else Column(c, c) for c in columns]
    shown = [c for c in every if c.title]
    return Table(
        slug=slug,
        title=title,
        columns=tuple(c.title for c in shown) if rows else (),
        rows=tuple(tuple(c.text(row) for c in shown) for row in rows),
        note=note,
        data=tuple(csv_rows(rows, every) if data is None else map(dict, data)),
        folded=folded,
    )


def csv_rows(rows: Iterable[Any], columns: Sequence[Column]) -> list[dict[str, Raw]]:
    """Return what the CSV file has of rows."""
    return [{name: value for c in columns for name, value in c.values(row).items()} for row in rows]


def only_in_file(**values: str | Callable[[Any], Any]) -> list[Column]:
    """Return columns that a reader does not see: what each value of the CSV file is of a row, as in `Column.of`."""
    return [Column("", of, data=name) for name, of in values.items()]


def interval_columns(name: str, interval: Interval | None, n: str = "n") -> dict[str, Raw]:
    """Return an interval as columns of a CSV file."""
    values = (None, None, None, 0) if interval is None else (interval.estimate, interval.low, interval.high, interval.n)
    return dict(zip((name, f"{name}_low", f"{name}_high", n), values, strict=True))


def own_interval_columns(name: str, interval: Interval | None) -> dict[str, Raw]:
    """Return an interval as columns of a CSV file in which several are beside one another: its n is named too."""
    return interval_columns(name, interval, f"{name}_n")
