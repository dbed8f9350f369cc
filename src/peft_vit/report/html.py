"""The report as one HTML file: no network, figures inline, light and dark, complete without its one script."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from peft_vit.report.document import SECTION_TITLES, Drawing, StudyDocument
from peft_vit.report.figure_json import embedded, script, script_hash
from peft_vit.report.style import THEME

# A page is read from the top: what the methods reached comes first.
PAGE_ORDER = (SECTION_TITLES[3], *SECTION_TITLES[:3], SECTION_TITLES[4])
MAIN_FACTS = ("Backbone", "Images", "Experiments", "Seeds", "Runs")  # of what was asked; the others stand folded below


def write_html(documents: Sequence[StudyDocument]) -> str:
    """Return the page; every text in it is escaped by the template engine."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["soft"] = soft
    source = files("peft_vit.report").joinpath("templates", "report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        documents=documents,
        page_order=PAGE_ORDER,
        main_facts=MAIN_FACTS,
        data_uri=data_uri,
        inline_svg=inline_svg,
        embedded=embedded,
        theme=THEME,
        script=script(),
        script_hash=script_hash(),
    )


def soft(text: str) -> Markup:
    """Return escaped text that may break after an underscore, and not between a number and its unit."""
    safe = str(escape(text)).replace("_", "_<wbr>")
    return Markup(re.sub(r"n = (\d)", "n\u00a0=\u00a0\\1", re.sub(r"(?<=\d) %", "\u00a0%", safe)))


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
