"""The report on all records below a directory: which files it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peft_vit.analysis import Results, analyze, read_results, study_agreements
from peft_vit.errors import UserError
from peft_vit.records import HTML_FILE, MARKDOWN_FILE, as_csv, write_atomically
from peft_vit.report.document import Drawing, StudyDocument
from peft_vit.report.examples import Thumbnails
from peft_vit.report.html import write_html
from peft_vit.report.markdown import write_markdown
from peft_vit.report.publication import write_publication
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
    with _writing_to(output_dir):
        return ReportFiles(
            results=results,
            html=_write(output_dir / HTML_FILE, write_html(documents)) if page else None,
            figures=tuple(_write_figures(documents, output_dir)),
            figure_data=tuple(
                _write((output_dir / _figure_path(document, drawing)).with_suffix(".csv"), as_csv(drawing.data))
                for document in documents
                for drawing in document.drawings()
            ),
            tables=tuple(
                _write(output_dir / "tables" / f"{document.slug}_{table.slug}.csv", as_csv(table.data))
                for document in documents
                for table in document.tables()
            ),
            markdown=_write(output_dir / MARKDOWN_FILE, write_markdown(documents, _figure_path)),
            publication=write_publication(documents, output_dir / "figures" / "publication") if publication else (),
        )


@contextmanager
def _writing_to(output_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"can't be written to ({error.strerror}); choose another --output"
        raise UserError(problem, file=output_dir) from None


def _write(file: Path, text: str) -> Path:
    write_atomically(file, text.encode())
    return file


def _write_figures(documents: Sequence[StudyDocument], output_dir: Path) -> Iterator[Path]:
    for document in documents:
        for drawing in document.drawings():
            png = output_dir / _figure_path(document, drawing)
            write_atomically(png, drawing.png)
            yield png
            yield _write(png.with_suffix(".svg"), drawing.svg)


def _figure_path(document: StudyDocument, drawing: Drawing) -> str:
    return f"figures/{document.slug}_{drawing.slug}.png"
