"""Figures for a paper: one and two columns wide, as PDF, SVG and PNG, and their captions.

Fonts travel with the files: PDF embeds TrueType (Type 42; journals refuse Type 3), SVG holds outlines of the
glyphs. The same records give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from peft_vit.records import write_atomically
from peft_vit.report.document import Drawing, StudyDocument
from peft_vit.report.markdown import escaped, notice_parts
from peft_vit.report.style import STYLE, laid_out

WIDTHS_IN: dict[str, float] = {"one": 3.5, "two": 7.2}
PAGE_HEIGHT_IN = 9.7
DPI = 300
_FORMATS: dict[str, dict[str, Any]] = {
    "pdf": {"metadata": {"CreationDate": None, "Creator": None, "Producer": None}},
    "svg": {"metadata": {"Date": None, "Creator": None}},
    "png": {"metadata": {"Software": None}, "dpi": DPI},
}
_PAPER: dict[str, Any] = {
    **STYLE,
    "svg.fonttype": "path",  # outlines: the same letters without the font
    "pdf.fonttype": 42,
    "pdf.compression": 6,
}
_SMALL: dict[str, Any] = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "legend.handlelength": 1.4,
}


def publication_files(drawing: Drawing) -> Iterator[tuple[str, bytes]]:
    """Draw a figure again at the widths of a paper.

    Yields:
        The end of the file's name, such as ``_one_column.pdf``, and its content.
    """
    for columns, width_in in WIDTHS_IN.items():
        with matplotlib.rc_context(style_of(columns)):
            height_in = drawing.narrow_height_in if columns == "one" else drawing.height_in
            figure, _ = laid_out(width_in, height_in, drawing.paint)
            for ending, options in _FORMATS.items():
                content = io.BytesIO()
                figure.savefig(content, format=ending, **options)
                yield f"_{columns}_column.{ending}", content.getvalue()


def style_of(columns: str) -> dict[Any, Any]:
    """Return matplotlib's settings for a width."""
    return _PAPER | (_SMALL if columns == "one" else {})


def write_publication(documents: Sequence[StudyDocument], folder: Path) -> tuple[Path, ...]:
    """Write every figure of some studies for a paper, and ``captions.md``; return the files.

    Raises:
        OSError: if the folder can't be written to.
    """
    written = []
    for document in documents:
        for drawing in document.drawings():
            for ending, content in publication_files(drawing):
                written.append(folder / f"{document.slug}_{drawing.slug}{ending}")
                write_atomically(written[-1], content)
    written.append(folder / "captions.md")
    write_atomically(written[-1], captions(documents).encode())
    return tuple(written)


def captions(documents: Sequence[StudyDocument]) -> str:
    """Return the captions of all figures as Markdown, with sizes, below what stands above a study's numbers."""
    parts = [
        "# Captions",
        f"Each figure stands here as PDF, SVG and PNG ({DPI} dots an inch), {WIDTHS_IN['one']} and "
        f"{WIDTHS_IN['two']} inches wide. Text is at least 6.5 points.",
    ]
    return "\n\n".join([*parts, *(part for document in documents for part in _captions(document))]) + "\n"


def _captions(document: StudyDocument) -> list[str]:
    parts = [f"## {escaped(document.label)}", *notice_parts(document)]
    for drawing in document.drawings():
        sizes = f"{drawing.narrow_height_in:.1f} inches high in one column, {drawing.height_in:.1f} in two"
        if max(drawing.narrow_height_in, drawing.height_in) > PAGE_HEIGHT_IN:
            sizes += f"; a page holds {PAGE_HEIGHT_IN} inches"
        caption = f"**{escaped(drawing.title)}.** {escaped(drawing.caption)}"
        parts.append(f"### {document.slug}_{drawing.slug}\n\n{caption}\n\n({sizes})")
    return parts
