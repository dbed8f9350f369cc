"""The report as one HTML file: no network, no script, figures inline, light and dark."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from peft_vit.report.document import Drawing, StudyDocument
from peft_vit.report.style import GRID, INK, MUTED, PAPER

# The colors that a figure shares with the page follow the page's theme.
_THEME = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)"}


def write_html(documents: Sequence[StudyDocument]) -> str:
    """Return the page; every text in it is escaped by the template engine."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    source = files("peft_vit.report").joinpath("templates", "report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(documents=documents, inline_svg=inline_svg)


def inline_svg(document: StudyDocument, drawing: Drawing) -> Markup:
    """Return a figure as an SVG element for this page.

    The prolog goes, ids get a prefix (many figures share one page), colors become the page's variables, and
    the fixed size becomes a fluid one. The SVG comes from matplotlib, which escapes the texts in it.
    """
    svg = drawing.svg[drawing.svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    prefix = f"{document.slug}-{drawing.slug}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = svg.replace('xlink:href="#', f'xlink:href="#{prefix}').replace("url(#", f"url(#{prefix}")
    for color, variable in _THEME.items():
        svg = svg.replace(color, variable)
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return Markup(f'{head} role="img" aria-label="{escape(drawing.title)}">{rest}')
