"""What a report consists of, before it is written as HTML or Markdown: plain values, texts not yet escaped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
class Table:
    """A table: what a reader sees, and the unrounded values behind it.

    Attributes:
        slug: name for files and anchors.
        title: what it shows.
        columns: headings.
        rows: texts, one a column.
        note: how to read it, which uncertainty the intervals describe.
        data: rows for the CSV file, in full precision and plain units.
    """

    slug: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str
    data: tuple[dict[str, Raw], ...]
    kind: Literal["table"] = "table"


@dataclass(frozen=True)
class Drawing:
    """A finished figure as SVG text and PNG bytes."""

    slug: str
    title: str
    caption: str
    svg: str
    png: bytes
    kind: Literal["figure"] = "figure"


Block = Paragraph | Table | Drawing


@dataclass(frozen=True)
class Card:
    """What one method reached, at a glance."""

    method: str
    experiment: str
    figure: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class RunDetails:
    """Provenance of one run: key and value, as texts."""

    title: str
    rows: tuple[tuple[str, str], ...]


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

    def drawings(self) -> tuple[Drawing, ...]:
        """Return all figures, in order."""
        return tuple(b for blocks in self.sections.values() for b in blocks if isinstance(b, Drawing))

    def tables(self) -> tuple[Table, ...]:
        """Return all tables, in order."""
        return tuple(b for blocks in self.sections.values() for b in blocks if isinstance(b, Table))
