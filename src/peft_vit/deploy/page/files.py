"""The files of a page: itself, one Markdown file, every figure and table.

The page is one HTML file: no network, figures inline, light and dark, complete without its one script. What a figure's
script needs is in the page as JSON: points, rows of the CSV file, names. Texts repeat (names, steps), so each column
holds its distinct texts once and an index a row. Every character that could end the block or a string literal is
written as an escape: no name can break out of it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

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
from peft_vit.deploy.page.figure import DPI, PAGE_HEIGHT_IN, THEME, WIDTHS_IN, publication_files
from peft_vit.runs.records.run_rows import as_csv
from peft_vit.runs.records.storage import HTML_FILE

_UNSAFE = str.maketrans(
    {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}
)  # U+2028 and all else beyond ASCII: json escapes it


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


# --- HTML ---


def write_html(documents: Sequence[StudyDocument]) -> str:
    """Return the page; every text in it is escaped by the template engine."""
    return rendered(
        "report.html.j2",
        "figures.js",
        documents=documents,
        data_uri=data_uri,
        inline_svg=inline_svg,
        embedded=embedded,
        theme=THEME,
    )


def rendered(template: str, script: str, **values: Any) -> str:
    """Return a page of a template with its script; every text in it is escaped by the template engine.

    Args:
        template: its name; its policy is to name the script by `script_hash`, so that no other runs.
        script: the name of a file beside it.
        values: what is in it.
    """
    text = files("peft_vit.deploy.page").joinpath("templates", script).read_text(encoding="utf-8")
    assert "</" not in text
    return _TEMPLATES.get_template(template).render(script=Markup(text), script_hash=script_hash(text), **values)


def script_hash(script: str) -> str:
    """Return a script's hash as a Content-Security-Policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def soft(text: str) -> Markup:
    """Return escaped text whose backticks mark code; it may break after _ and /, not between a number and its unit."""
    safe = re.sub("`([^`]+)`", r"<code>\1</code>", re.sub("([_/])", r"\1<wbr>", str(escape(text))))
    return Markup(re.sub(r"n = (\d)", "n\u00a0=\u00a0\\1", re.sub(r"(?<=\d) %", "\u00a0%", safe)))


_TEMPLATES = Environment(
    loader=PackageLoader("peft_vit.deploy.page"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters["soft"] = soft


def data_uri(png: bytes) -> str:
    """Return an image as an address that is the image."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def inline_svg(document: StudyDocument, drawing: Drawing) -> Markup:
    """Return a figure as an SVG element for this page.

    The prolog goes, ids get a prefix (many figures share one page), parts of a series say which it is, colors
    become the page's variables, and the fixed size becomes a fluid one. The SVG comes from matplotlib, which
    escapes the texts in it.
    """
    svg = drawing.svg[drawing.svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    prefix = f"{document.slug}-{drawing.slug}-"
    svg = re.sub(r'\bid="(series(\d+)-[^"]*)"', r'id="\1" data-series="\2" data-gid="\1"', svg)
    svg = re.sub(r'(?<= )id="', f'id="{prefix}', svg)
    svg = svg.replace('xlink:href="#', f'xlink:href="#{prefix}').replace("url(#", f"url(#{prefix}")
    for color, variable in THEME.items():
        svg = svg.replace(color, variable)
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return Markup(f'{head} role="img" aria-label="{escape(drawing.title)}">{rest}')


def coded(texts: Iterable[str]) -> dict[str, list[Any]]:
    """Return texts as indices into their distinct values, in order of appearance."""
    place: dict[str, int] = {}
    index = [place.setdefault(text, len(place)) for text in texts]
    return {"values": list(place), "index": index}


def embedded(document: StudyDocument, drawing: Drawing) -> Markup:
    """Return the content of a figure's JSON block; values are written as in the CSV file."""
    points, rows = drawing.points, drawing.data
    values = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    content: dict[str, Any] = {
        "file": f"{document.slug}_{drawing.slug}.csv",
        "names": [series.name for series in drawing.series],
        # A value that is not finite is not drawn, and stands where no pointer comes near.
        "x": [point.x_pt if math.isfinite(point.x_pt) else -1e6 for point in points],
        "y": [point.y_pt if math.isfinite(point.y_pt) else -1e6 for point in points],
        "series": [point.series for point in points],
        "text": coded(point.text for point in points),
        "columns": [{"name": n, **coded("" if v is None else str(v) for v in column)} for n, column in values.items()],
    }
    return as_json(content)


def as_json(content: Any) -> Markup:
    """Return the content of a JSON block of a page, which no text in it can end."""
    return Markup(json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).translate(_UNSAFE))


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
