"""What a report consists of, before it is written as HTML or Markdown: plain values, texts not yet escaped.

Tables are columns over rows. A column is defined once, for the reader and for the CSV file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Literal, NamedTuple

from peft_vit.base.statistics import Interval

Raw = str | int | float | None
SECTION_TITLES = (
    "Layer importance patterns",
    "Allocation effectiveness",
    "Quantization impact",
    "Method comparison",
    "Insights",
)


@dataclass(frozen=True)
class Paragraph:
    """One paragraph of text."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table: what a reader sees, and the unrounded values behind it."""

    slug: str  # name for files and anchors
    title: str  # what it shows
    columns: tuple[str, ...]  # headings
    rows: tuple[tuple[str, ...], ...]  # texts, one a column
    note: str  # how to read it, which uncertainty the intervals describe
    data: tuple[dict[str, Raw], ...]  # rows for the CSV file, in full precision and plain units
    folded: bool = False  # the page shows only its title until a reader opens it; paper and Markdown show all of it


class Series(NamedTuple):
    """What a reader can switch off in a figure: its artists have the gid ``series<index>-<number>``."""

    name: str
    color: str
    glyph: str  # its marker as a character, so that color is not the only difference


class Point(NamedTuple):
    """One value that a reader can point at."""

    series: int  # its index
    x_pt: float  # from the figure's left edge in points, as in the SVG
    y_pt: float  # from its upper edge
    text: str  # what it is, with unit; lines are separated by a line feed


@dataclass(frozen=True)
class Drawing:
    """A finished figure as SVG text and PNG bytes."""

    slug: str  # name for files and anchors
    title: str  # stands above it
    caption: str  # how to read it
    svg: str  # for a page
    png: bytes
    series: tuple[Series, ...]  # what can be switched off
    points: tuple[Point, ...]  # what can be pointed at
    data: tuple[dict[str, Raw], ...]  # rows for the CSV file, in full precision and plain units
    height_in: float  # at the width of the page
    narrow_height_in: float  # in one column of a paper
    paint: Callable[[Any], Any] = field(repr=False, compare=False)  # draws it again at another width, for publication


class Picture(NamedTuple):
    """An image of the data set as PNG, and what is to be said of it."""

    png: bytes
    lines: tuple[str, ...]
    right: bool | None = None  # whether a model is right on it; None: that is not asked
    key: str = ""  # what a cell of the confusion matrix says that leads to it


@dataclass(frozen=True)
class Gallery:
    """Pictures in groups, for the page only; `caption` says how they were chosen and whose they are."""

    slug: str
    title: str
    caption: str
    groups: tuple[tuple[str, tuple[Picture, ...]], ...]
    small: bool = False


@dataclass(frozen=True)
class Facts:
    """Keys and values, such as settings."""

    rows: tuple[tuple[str, str], ...]


Block = Paragraph | Table | Drawing | Gallery | Facts


class Card(NamedTuple):
    """A number at a glance."""

    title: str  # what it is, such as a measure or a method
    subtitle: str  # of what, such as test images or an experiment
    value: str
    lines: tuple[str, ...]


class RunDetails(NamedTuple):
    """Provenance of one run: key and value, as texts; `traceback` keeps its lines."""

    title: str
    rows: tuple[tuple[str, str], ...]
    traceback: str = ""


@dataclass(frozen=True)
class StudyDocument:
    """The report of one study, or of one model."""

    label: str  # the study's name as shown
    slug: str  # the name in files and anchors
    alerts: tuple[str, ...]  # what to know before believing a number; stands above all
    warnings: tuple[str, ...]  # likewise; counted above, and told further down
    cards: tuple[Card, ...]  # of a study the best experiment of each method, chosen on validation
    came_out: tuple[str, ...]  # sentences
    sections: dict[str, tuple[Block, ...]]  # by title, in the order of the page; of a study SECTION_TITLES
    not_shown: tuple[str, ...]  # sentences: what this does not show
    runs: tuple[RunDetails, ...]  # provenance
    facts: tuple[tuple[str, str], ...] = ()  # what was asked, key and value
    how_sure: tuple[str, ...] = ()  # sentences
    commands: tuple[tuple[str, str], ...] = ()  # what each is for, and how it is typed
    progress: tuple[Block, ...] = ()  # which runs are not done, and how to go on
    kind: Literal["study", "model"] = "study"
    web: str = ""  # address of a page that asks the model

    @property
    def notices(self) -> tuple[str, ...]:
        """Return all that has to be known before a number is believed."""
        return (*self.alerts, *self.warnings)

    @property
    def results(self) -> tuple[str, ...]:
        """Return what came out and the commands that use it, as sentences."""
        return (*self.came_out, *(f"{what}: {command}" for what, command in self.commands))

    def drawings(self) -> tuple[Drawing, ...]:
        """Return all figures, in order."""
        return tuple(b for blocks in self.sections.values() for b in blocks if isinstance(b, Drawing))

    def tables(self) -> tuple[Table, ...]:
        """Return all tables, in order."""
        every = (self.progress, *self.sections.values())
        return tuple(b for blocks in every for b in blocks if isinstance(b, Table))


# --- tables ---


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
