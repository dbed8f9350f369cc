"""The files of a page: itself, one Markdown file, every figure and table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_vit.base.errors import os_fault
from peft_vit.base.files import write_atomically
from peft_vit.deploy.page.document import StudyDocument
from peft_vit.deploy.page.figure import DPI, PAGE_HEIGHT_IN, WIDTHS_IN, publication_files
from peft_vit.deploy.page.html import write_html
from peft_vit.deploy.page.markdown import escaped, figure_path, notice_parts
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
