"""A notebook becomes a page of the site: lines of a cell stand together, tables stay tables, a report is not copied."""

from __future__ import annotations

from notebook_page import page


def test_cells_become_markdown() -> None:
    html = '<table border="1" class="dataframe"><tr><td>7</td></tr></table>'
    outputs = [
        {"text": ["one\n", "\x1b[1mtwo\x1b[0m\n"]},
        {"data": {"text/plain": ["three"]}},
        {"data": {"text/plain": "a table", "text/html": [html]}},
        {"data": {"text/plain": "a report", "text/html": ["<iframe srcdoc='<table>'></iframe>"]}},
        {"data": {"text/plain": "a figure", "image/png": "AAAA\n"}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "\n", "Text."]},
        {"cell_type": "code", "source": ["f()"], "outputs": outputs},
        {"cell_type": "code", "source": ["x = 1"], "outputs": []},
    ]
    assert page(cells, "some.ipynb").split("\n\n") == [
        "# Title",
        "Text.",
        "[This page as a notebook](some.ipynb)",
        "```python\nf()\n```",
        "```text\none\ntwo\nthree\n```",
        "<div><table><tr><td>7</td></tr></table></div>",
        "```text\na report\n```",
        '<img alt="output" src="data:image/png;base64,AAAA">',
        "```python\nx = 1\n```\n",
    ]
