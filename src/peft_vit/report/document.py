"""What a report consists of, before it is written as HTML or Markdown: plain values, texts not yet escaped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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
    kind: Literal["paragraph"] = "paragraph"


@dataclass(frozen=True)
class Cell:
    """A cell of a table: the text that a reader sees, and the unrounded values behind it by their columns' names."""

    text: str
    values: Mapping[str, Raw] = field(default_factory=dict)


Row = Mapping[str, Cell | str]
"""Cells by their headings; a text alone stands for nothing more. `UNSEEN` heads values that are not shown."""
UNSEEN = ""


@dataclass(frozen=True)
class Table:
    """A table: what a reader sees, and the unrounded values behind it.

    Attributes:
        slug: name for files and anchors.
        title: what it shows.
        columns: headings.
        rows: texts, one a column.
        note: how to read it, which uncertainty the intervals describe.
        data: rows for the CSV file, in full precision and plain units.
        folded: whether the page shows only its title until a reader opens it; paper and Markdown show all of it.
    """

    slug: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str
    data: tuple[dict[str, Raw], ...]
    folded: bool = False
    kind: Literal["table"] = "table"

    @classmethod
    def of(
        cls,
        slug: str,
        title: str,
        rows: Iterable[Row],
        note: str,
        *,
        data: Iterable[dict[str, Raw]] | None = None,
        folded: bool = False,
    ) -> Table:
        """Return a table of cells.

        Args:
            slug: as in the class, like `title`, `note` and `folded`.
            title: see there.
            rows: each with the same headings in the same order; without any there are no headings, and the note is all.
            note: see there.
            data: rows for the CSV file; None: the values of the cells.
            folded: see there.
        """
        cells = [{name: Cell(c) if isinstance(c, str) else c for name, c in row.items()} for row in rows]
        if data is None:
            data = [{key: value for cell in row.values() for key, value in cell.values.items()} for row in cells]
        columns = tuple(name for name in (cells[0] if cells else {}) if name != UNSEEN)
        texts = tuple(tuple(row[name].text for name in columns) for row in cells)
        return cls(slug, title, columns, texts, note, tuple(data), folded)


@dataclass(frozen=True)
class Series:
    """What a reader can switch off in a figure: its artists have the gid ``series<index>-<number>``."""

    name: str
    color: str
    glyph: str  # its marker as a character, so that color is not the only difference


@dataclass(frozen=True)
class Point:
    """One value that a reader can point at.

    Attributes:
        series: index of its series.
        x_pt: distance from the figure's left edge in points, as in the SVG. y_pt: from its upper edge.
        text: what it is, with unit; lines are separated by a line feed.
    """

    series: int
    x_pt: float
    y_pt: float
    text: str


@dataclass(frozen=True)
class Panel:
    """A heat map that can show other steps than the one it was drawn with.

    Attributes:
        gid: of its cells in the SVG; that of its title ends in ``-title``.
        first_point: index of its first cell among the points; cells follow by row.
        titles: one for each of its frames.
        frames: texts of the cells, one tuple a frame; empty where there is no value.
        frame_at: the frame to show at each of the player's positions.
    """

    gid: str
    first_point: int
    titles: tuple[str, ...]
    frames: tuple[tuple[str, ...], ...]
    frame_at: tuple[int, ...]


@dataclass(frozen=True)
class Player:
    """A walk of heat maps through recorded steps.

    Attributes:
        steps: the positions. start: index of the first to show.
        unit: of the values, as a word before the number.
        colors: from 0 to `highest`. missing: for a cell without a value.
        panels: the maps that change.
    """

    steps: tuple[int, ...]
    start: int
    unit: str
    colors: tuple[str, ...]
    missing: str
    highest: float
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Drawing:
    """A finished figure as SVG text and PNG bytes.

    Attributes:
        slug: name for files and anchors.
        title: stands above it. caption: how to read it.
        svg: text of the figure for a page. png: the same as an image.
        series: what can be switched off.
        points: what can be pointed at.
        data: rows for the CSV file, in full precision and plain units.
        player: the walk through steps, for heat maps.
        height_in: height at the width of the page. narrow_height_in: in one column of a paper.
        paint: draws it again into an empty figure of another width, for publication.
    """

    slug: str
    title: str
    caption: str
    svg: str
    png: bytes
    series: tuple[Series, ...] = ()
    points: tuple[Point, ...] = ()
    data: tuple[dict[str, Raw], ...] = ()
    player: Player | None = None
    height_in: float = 4.0
    narrow_height_in: float = 4.0
    paint: Callable[[Any], Any] | None = field(default=None, repr=False, compare=False)
    kind: Literal["figure"] = "figure"


@dataclass(frozen=True)
class Picture:
    """An image of the data set as PNG, and what is to be said of it."""

    png: bytes
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Gallery:
    """Pictures in groups, for the page only; `caption` says how they were chosen and whose they are."""

    slug: str
    title: str
    caption: str
    groups: tuple[tuple[str, tuple[Picture, ...]], ...]
    kind: Literal["gallery"] = "gallery"


Block = Paragraph | Table | Drawing | Gallery


@dataclass(frozen=True)
class Card:
    """What one method reached, at a glance."""

    method: str
    experiment: str
    figure: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class RunDetails:
    """Provenance of one run: key and value, as texts; `traceback` keeps its lines."""

    title: str
    rows: tuple[tuple[str, str], ...]
    traceback: str = ""


@dataclass(frozen=True)
class StudyDocument:
    """The report of one study.

    Attributes:
        label: the study's name as shown.
        slug: the name in files and anchors.
        notices: what stands above every number.
        facts: what was asked, key and value.
        cards: the best experiment of each method, chosen on validation.
        came_out: sentences: what came out.
        how_sure: sentences: how sure that is.
        sections: title of one of SECTION_TITLES -> blocks.
        not_shown: what this does not show.
        runs: provenance.
        progress: which runs are not done, and how to go on; stands after `how_sure`.
    """

    label: str
    slug: str
    notices: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    cards: tuple[Card, ...]
    came_out: tuple[str, ...]
    how_sure: tuple[str, ...]
    sections: dict[str, tuple[Block, ...]]
    not_shown: tuple[str, ...]
    runs: tuple[RunDetails, ...]
    progress: tuple[Block, ...] = ()

    def drawings(self) -> tuple[Drawing, ...]:
        """Return all figures, in order."""
        return tuple(b for blocks in self.sections.values() for b in blocks if isinstance(b, Drawing))

    def tables(self) -> tuple[Table, ...]:
        """Return all tables, in order."""
        every = (self.progress, *self.sections.values())
        return tuple(b for blocks in every for b in blocks if isinstance(b, Table))
