"""The report as Markdown: one file with five sections, figures as files beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence

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
