"""What mkdocs calls while it builds the site: notebooks become pages, and the repository's address is filled in."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_UNKNOWN = "https://HOST/OWNER/peft-vit"  # as documents and notebooks name the repository


def on_config(config: MkDocsConfig) -> None:
    """Let readers choose a version where there are several: on the site that mike puts together."""
    if "MIKE_DOCS_VERSION" in os.environ:
        config.extra["version"] = {"provider": "mike"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page beside each notebook, which stays there to be downloaded."""
    for file in list(files):
        path = Path(file.src_uri)
        if path.suffix == ".ipynb":
            file.content_string = _addressed(file.content_string, config)
            cells = json.loads(file.content_string)["cells"]
            files.append(File.generated(config, path.with_suffix(".md").as_posix(), content=page(cells, path.name)))
    return files


def on_page_markdown(markdown: str, config: MkDocsConfig, **_: Any) -> str:
    """Name the repository, if it is known."""
    return _addressed(markdown, config)


def _addressed(text: str, config: MkDocsConfig) -> str:
    return text.replace(_UNKNOWN, config.repo_url) if config.repo_url else text


def page(cells: list[dict[str, Any]], name: str) -> str:
    """Return a notebook's cells as Markdown, with a link to the file below its title."""
    parts = [part for cell in cells for part in _parts(cell)]
    return "\n\n".join([parts[0], f"[This page as a notebook]({name})", *parts[1:]]) + "\n"


def _parts(cell: dict[str, Any]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return [source]
    parts, lines = [f"```python\n{source}\n```"], ""
    for output in cell["outputs"]:
        data = output.get("data", {})
        html = "".join(data.get("text/html", "")).replace(' border="1" class="dataframe"', "")  # the site's own style
        if "image/png" in data:
            picture = "".join(data["image/png"]).strip()
            parts += [_text(lines), f'<img alt="output" src="data:image/png;base64,{picture}">']
        elif "<table" in html and "<iframe" not in html:
            parts += [_text(lines), f"<div>{html}</div>"]
        else:  # lines of one cell stand together; a page within the page is its plain text
            lines += "".join(output.get("text", data.get("text/plain", ""))).rstrip() + "\n"
            continue
        lines = ""
    return [part for part in (*parts, _text(lines)) if part]


def _text(lines: str) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", lines.rstrip())  # colors of a terminal
    return f"```text\n{plain}\n```" if plain else ""
