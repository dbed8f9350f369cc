"""The files of a page: itself, one Markdown file, every figure and table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_vit.base.errors import os_fault
from peft_vit.base.files import write_atomically
from peft_vit.deploy.page.document import (
    SECTION_TITLES,
    Block,
    Drawing,
    Facts,
    Gallery,
    Paragraph,
    StudyDocument,
    Table,
)
from peft_vit.deploy.page.figure import DPI, PAGE_HEIGHT_IN, WIDTHS_IN, publication_files
from peft_vit.deploy.page.html import write_html
from peft_vit.runs.records.run_rows import as_csv
from peft_vit.runs.records.storage import HTML_FILE


@dataclass(frozen=True)
class WrittenFiles:
    """Where a page and what belongs to it lie."""

    html: Path | None  # the page, complete in itself; None if only the summary was written
    markdown: Path  # the summary, which shows the PNG files


def write_report(
    documents: Sequence[StudyDocument],
    markdown: Mapping[str, str],
    output_dir: Path,
    *,
    page: bool = True,
    publication: bool = False,
) -> WrittenFiles:
    """Write documents that were made: the page, one Markdown file by its name, and every figure and table.

    Raises:
        UserError: if the output can't be written.
    """

    def write(name: str, content: str | bytes) -> Path:
        file = output_dir / name
        write_atomically(file, content.encode() if isinstance(content, str) else content)
        return file

    with os_fault("can't be written to", output_dir, remedy="choose another --output"):
        html = write(HTML_FILE, write_html(documents)) if page else None
        for document in documents:
            for drawing in document.drawings():
                stem = figure_path(document, drawing).removesuffix(".png")
                for ending, content in ((".png", drawing.png), (".svg", drawing.svg), (".csv", as_csv(drawing.data))):
                    write(stem + ending, content)
                for ending, content in publication_files(drawing) if publication else ():
                    write(f"figures/publication/{document.slug}_{drawing.slug}{ending}", content)
            for table in document.tables():
                write(f"tables/{document.slug}_{table.slug}.csv", as_csv(table.data))
        (summary_file,) = (write(name, text) for name, text in markdown.items())
        if publication:
            write("figures/publication/captions.md", captions(documents))
    return WrittenFiles(html, summary_file)


def captions(documents: Sequence[StudyDocument]) -> str:
    """Return captions.md of the figures for a paper, with sizes, below what is above a study's numbers."""
    parts = [
        "# Captions",
        (
            f"Each figure is here as PDF, SVG and PNG ({DPI} dots an inch), {WIDTHS_IN['one']} and {WIDTHS_IN['two']} "
            "inches wide. Text is at least 6.5 points."
        ),
    ]
    for document in documents:
        parts += [f"## {escaped(document.label)}", *notice_parts(document)]
        for drawing in document.drawings():
            narrow, wide = drawing.narrow_height_in, drawing.height_in
            size = f"{narrow:.1f} inches high in one column, {wide:.1f} in two"
            size += f"; a page holds {PAGE_HEIGHT_IN} inches" if max(narrow, wide) > PAGE_HEIGHT_IN else ""
            caption = f"**{escaped(drawing.title)}.** {escaped(drawing.caption)}"
            parts += [f"### {document.slug}_{drawing.slug}", caption, f"({size})"]
    return "\n\n".join(parts) + "\n"


# --- Markdown: five sections, figures as files beside it ---


def figure_path(document: StudyDocument, drawing: Drawing) -> str:
    """Return where a figure's PNG lies, relative to the page."""
    return f"figures/{document.slug}_{drawing.slug}.png"


def escaped(text: str) -> str:
    """Return text whose characters mean themselves in Markdown and in a table cell.

    Underscores inside words and brackets that start no link need no escape in CommonMark: names and
    intervals stay readable.
    """
    text = re.sub(r"([\\`*#|~]|\](?=[(\[:]))", r"\\\1", text)
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def write_markdown(documents: Sequence[StudyDocument]) -> str:
    """Return the text of analysis_summary.md, of one document a study."""
    parts = ["# Analysis summary"]
    for document in documents:
        parts += [f"**Study: {escaped(document.label)}**", *summary_parts(document)]
    for title in SECTION_TITLES:
        with_blocks = [document for document in documents if document.sections[title]]
        if with_blocks:
            parts.append(f"## {title}")
        for document in with_blocks:
            parts += [f"### {escaped(document.label)}"] if len(documents) > 1 else []
            parts += [block_text(block, document) for block in document.sections[title]]
    return "\n\n".join(parts) + "\n"


def section_parts(document: StudyDocument) -> list[str]:
    """Return the sections of one document, with their headings."""
    parts = []
    for title, blocks in document.sections.items():
        if blocks:
            parts.append(f"## {title}")
            parts += [block_text(block, document) for block in blocks]
    return parts


def summary_parts(document: StudyDocument) -> list[str]:
    """Return what is above the sections: notices first."""
    return [
        *notice_parts(document),
        *([_rows(("asked", ""), document.facts)] if document.facts else []),
        f"**Results**\n\n{_bullets(document.results)}",
        *([f"**How sure**\n\n{_bullets(document.how_sure)}"] if document.how_sure else []),
        *(block_text(block, document) for block in document.progress),
        *([f"**What this does not show**\n\n{_bullets(document.not_shown)}"] if document.not_shown else []),
    ]


def notice_parts(document: StudyDocument) -> list[str]:
    """Return what has to be known before a number is believed, as one block; nothing without notices."""
    return ["\n".join(f"> **{escaped(notice)}**  " for notice in document.notices)] if document.notices else []


def block_text(block: Block, document: StudyDocument) -> str:
    """Return a block of a document as Markdown."""
    if isinstance(block, Paragraph):
        return escaped(block.text)
    if isinstance(block, Table):
        rows = [_rows(block.columns, block.rows)] if block.rows else []
        return "\n\n".join((f"**{escaped(block.title)}**", *rows, escaped(block.note)))
    if isinstance(block, Facts):
        return _rows(("", ""), block.rows)
    title, caption = escaped(block.title), escaped(block.caption)
    if isinstance(block, Gallery):
        return f"{title or 'Examples'}: see the pictures in report.html. {caption}"
    return f"![{title}]({figure_path(document, block)})\n\n{title}. {caption}"


def _rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head, *body = ([escaped(text) for text in row] for row in (columns, *rows))
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(columns), *body))


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {escaped(sentence)}" for sentence in sentences)
