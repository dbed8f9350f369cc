"""The report on all records below a directory: which files it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_vit.analysis import Results, analyze, read_results, study_agreements
from peft_vit.errors import os_fault
from peft_vit.records import HTML_FILE, MARKDOWN_FILE, as_csv, write_atomically
from peft_vit.report.document import Drawing, StudyDocument
from peft_vit.report.examples import Thumbnails
from peft_vit.report.figure import DPI, PAGE_HEIGHT_IN, WIDTHS_IN, publication_files
from peft_vit.report.html import write_html
from peft_vit.report.markdown import escaped, notice_parts, write_markdown
from peft_vit.report.sections import study_documents


@dataclass(frozen=True)
class ReportFiles:
    """Where a report lies."""

    results: Results  # what it is on, and what was left out of it
    html: Path | None  # the page, complete in itself; None if only the summary was written
    markdown: Path  # the summary, which shows the PNG files
    figures: tuple[Path, ...]  # PNG and SVG files
    figure_data: tuple[Path, ...]  # CSV files with the values that are drawn, as the page offers them
    tables: tuple[Path, ...]  # CSV files with unrounded values
    publication: tuple[Path, ...]  # figures for a paper and their captions, if they were asked for


def build_report(
    results_dir: Path,
    output_dir: Path,
    *,
    page: bool = True,
    publication: bool = False,
    thumbnails: Thumbnails | None = None,
) -> ReportFiles:
    """Write the report on all records below a directory that can be read: HTML, Markdown, figures, tables.

    Args:
        results_dir: where records lie, at any depth.
        output_dir: where to write; files of an earlier report are replaced.
        page: also write the HTML; the summary has the same tables and figures.
        publication: also draw every figure at the widths of a paper, which takes several times as long.
        thumbnails: gets pictures of test images for the page, from where the images lie; None: no pictures.

    Raises:
        UserError: if there is no record that can be read, or if the output can't be written.
    """
    results = read_results(results_dir)
    analyses = [analyze(study) for study in results.studies]
    agreements = study_agreements([(analysis.study, analysis.importance) for analysis in analyses])
    documents = study_documents(analyses, agreements, thumbnails)

    def write(name: str, content: str | bytes) -> Path:
        file = output_dir / name
        write_atomically(file, content.encode() if isinstance(content, str) else content)
        return file

    with os_fault("can't be written to", output_dir, remedy="choose another --output"):
        html = write(HTML_FILE, write_html(documents)) if page else None
        figures, figure_data, tables, paper = [], [], [], []
        for document in documents:
            for drawing in document.drawings():
                png = _figure_path(document, drawing)
                stem = png.removesuffix(".png")
                figures += [write(png, drawing.png), write(f"{stem}.svg", drawing.svg)]
                figure_data.append(write(f"{stem}.csv", as_csv(drawing.data)))
                if publication:
                    own = f"figures/publication/{document.slug}_{drawing.slug}"
                    paper += [write(own + ending, content) for ending, content in publication_files(drawing)]
            for table in document.tables():
                tables.append(write(f"tables/{document.slug}_{table.slug}.csv", as_csv(table.data)))
        markdown = write(MARKDOWN_FILE, write_markdown(documents, _figure_path))
        if publication:
            paper.append(write("figures/publication/captions.md", captions(documents)))
    return ReportFiles(results, html, markdown, tuple(figures), tuple(figure_data), tuple(tables), tuple(paper))


def _figure_path(document: StudyDocument, drawing: Drawing) -> str:
    return f"figures/{document.slug}_{drawing.slug}.png"


def captions(documents: Sequence[StudyDocument]) -> str:
    """Return captions.md of the figures for a paper, with sizes, below what stands above a study's numbers."""
    parts = [
        "# Captions",
        f"Each figure stands here as PDF, SVG and PNG ({DPI} dots an inch), {WIDTHS_IN['one']} and "
        f"{WIDTHS_IN['two']} inches wide. Text is at least 6.5 points.",
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
