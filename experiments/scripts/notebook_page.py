"""What mkdocs calls while it builds the site: each notebook in docs/ becomes a page, with the outputs that it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page beside each notebook, which stays there to be downloaded."""
    for file in list(files):
        path = Path(file.src_uri)
        if path.suffix == ".ipynb":
            cells = json.loads(file.content_string)["cells"]
            files.append(File.generated(config, path.with_suffix(".md").as_posix(), content=page(cells, path.name)))
    return files


def page(cells: list[dict[str, Any]], name: str) -> str:
    """Return a notebook's cells as Markdown, with a link to the file below its title."""
    parts = [part for cell in cells for part in _parts(cell)]
    return "\n\n".join([parts[0], f"[This page as a notebook]({name})", *parts[1:]]) + "\n"


def _parts(cell: dict[str, Any]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return [source]
    shown = [text for output in cell["outputs"] if (text := _shown(output))]
    return [f"```python\n{source}\n```", *shown]


def _shown(output: dict[str, Any]) -> str:
    """Return an output as Markdown: a table or a picture as it is, a page within the page as its plain text."""
    data = output.get("data", {})
    html = "".join(data.get("text/html", ""))
    if "image/png" in data:
        return f'<img alt="output" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    if html and "<iframe" not in html:
        return f"<div>{html}</div>"
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""
