"""The report as one HTML file: no network, figures inline, light and dark, complete without its one script.

What a figure's script needs is in the page as JSON: points, rows of the CSV file, names. Texts
repeat (names, steps), so each column holds its distinct texts once and an index a row. Every character that could end
the block or a string literal is written as an escape: no name can break out of it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from peft_vit.deploy.page.document import Drawing, StudyDocument
from peft_vit.deploy.page.figure import THEME

_UNSAFE = str.maketrans(
    {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}
)  # U+2028 and all else beyond ASCII: json escapes it


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
