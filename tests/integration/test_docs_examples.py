"""The documents' Python blocks run as they stand, top to bottom, one namespace a document."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_python_blocks(text: str, document: str) -> int:
    """Execute each fenced Python block and return how many there were."""
    namespace: dict[str, object] = {"__name__": "example"}
    blocks = list(_BLOCK.finditer(text))
    for block in blocks:
        above = text.count("\n", 0, block.start(1))  # blank lines, so that a traceback names the document's own line
        exec(compile("\n" * above + block.group(1), document, "exec"), namespace)
    return len(blocks)


# The numbers of blocks: one with another fence would not be run, and nobody would notice.
@pytest.mark.parametrize(("document", "blocks"), [("README.md", 1), ("docs/library.md", 6)])
def test_every_python_block_runs(document: str, blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the examples write files
    text = (ROOT / document).read_text(encoding="utf-8")
    assert run_python_blocks(text, document) == blocks


def test_a_wrong_block_fails_at_its_own_line() -> None:
    text = "a\n\n```python\nx = 1\n```\n\n```\nnot python\n```\n\n```python\nassert x == 2\n```\n"
    with pytest.raises(AssertionError) as raised:
        run_python_blocks(text, "document.md")
    assert raised.traceback[-1].lineno == 11  # counted from 0


# What a reader follows: links between documents, and files that a document names in backticks.
@pytest.mark.parametrize(
    "document", ["README.md", "docs/library.md", "docs/methods.md", "experiments/docs/task_8_3_implementation.md"]
)
def test_linked_files_exist(document: str) -> None:
    file = ROOT / document
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", file.read_text(encoding="utf-8"))
    missing = [link for link in links if not (file.parent / link).exists()]
    assert missing == []
