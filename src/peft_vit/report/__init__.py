"""Reports from records, without torch: the same records give the same bytes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peft_vit.analysis import analyze, load_studies
from peft_vit.errors import UserError
from peft_vit.records import write_atomically
from peft_vit.report.document import Drawing, StudyDocument, Table
from peft_vit.report.html import write_html
from peft_vit.report.markdown import write_markdown
from peft_vit.report.sections import study_documents

__all__ = ["ReportFiles", "build_report", "write_analysis"]

HTML_FILE = "report.html"
MARKDOWN_FILE = "analysis_summary.md"


@dataclass(frozen=True)
class ReportFiles:
    """Where a report lies.

    Attributes:
        html: the page, complete in itself.
        markdown: the summary, which shows the PNG files.
        figures: PNG and SVG files.
        tables: CSV files with unrounded values.
    """

    html: Path
    markdown: Path
    figures: tuple[Path, ...]
    tables: tuple[Path, ...]


def build_report(results_dir: Path, output_dir: Path) -> ReportFiles:
    """Write the report on all records below a directory: HTML, Markdown, figures, tables.

    Raises:
        UserError: if there is no record, or an unreadable one, or if the output can't be written.
    """
    documents = _documents(results_dir)
    html = output_dir / HTML_FILE
    with _writing_to(output_dir):
        write_atomically(html, write_html(documents).encode())
        markdown, figures, tables = _write_parts(documents, output_dir)
    return ReportFiles(html, markdown, figures, tables)


def write_analysis(results_dir: Path, output_dir: Path) -> Path:
    """Write the summary as Markdown with its figures and tables, and return its path.

    Raises:
        UserError: if there is no record, or an unreadable one, or if the output can't be written.
    """
    documents = _documents(results_dir)
    with _writing_to(output_dir):
        markdown, _, _ = _write_parts(documents, output_dir)
    return markdown


@contextmanager
def _writing_to(output_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"can't be written to ({error.strerror}); choose another --output-dir"
        raise UserError(problem, file=output_dir) from None


def _documents(results_dir: Path) -> tuple[StudyDocument, ...]:
    return study_documents([analyze(study) for study in load_studies(results_dir)])


def _write_parts(
    documents: Sequence[StudyDocument], output_dir: Path
) -> tuple[Path, tuple[Path, ...], tuple[Path, ...]]:
    figures, tables = [], []
    for document in documents:
        for drawing in document.drawings():
            png = output_dir / _figure_path(document, drawing)
            svg = png.with_suffix(".svg")
            write_atomically(png, drawing.png)
            write_atomically(svg, drawing.svg.encode())
            figures += [png, svg]
        for table in document.tables():
            file = output_dir / "tables" / f"{document.slug}_{table.slug}.csv"
            write_atomically(file, as_csv(table).encode())
            tables.append(file)
    markdown = output_dir / MARKDOWN_FILE
    write_atomically(markdown, write_markdown(documents, _figure_path).encode())
    return markdown, tuple(figures), tuple(tables)


def _figure_path(document: StudyDocument, drawing: Drawing) -> str:
    return f"figures/{document.slug}_{drawing.slug}.png"


def as_csv(table: Table) -> str:
    """Return a table's unrounded values; floats in the shortest form that reads back to the same bits."""
    columns = list(dict.fromkeys(key for row in table.data for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.data)
    return text.getvalue()
