"""The documents' Python blocks run as they stand, top to bottom, one namespace a document."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from peft_vit.cli import app
from peft_vit.config import load_study

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
@pytest.mark.parametrize(
    ("document", "blocks"), [("README.md", 1), pytest.param("docs/tutorials/own_loop.md", 15, marks=pytest.mark.slow)]
)
def test_every_python_block_runs(document: str, blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the examples write files
    text = (ROOT / document).read_text(encoding="utf-8")
    assert run_python_blocks(text, document) == blocks


def test_a_wrong_block_fails_at_its_own_line() -> None:
    text = "a\n\n```python\nx = 1\n```\n\n```\nnot python\n```\n\n```python\nassert x == 2\n```\n"
    with pytest.raises(AssertionError) as raised:
        run_python_blocks(text, "document.md")
    assert raised.traceback[-1].lineno == 11  # counted from 0


def test_the_readme_data_section_makes_a_valid_study(tmp_path: Path) -> None:
    """Follow the README: copy the quickstart and change its `data`."""
    block = re.search(
        r"^```yaml\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert block is not None
    quickstart = (ROOT / "experiments" / "configs" / "quickstart.yaml").read_text(encoding="utf-8")
    changed, replaced = re.subn(r"^data:\n(?:  .*\n)+", block.group(1), quickstart, flags=re.MULTILINE)
    assert replaced == 1
    file = tmp_path / "my_study.yaml"
    file.write_text(changed, encoding="utf-8")
    assert load_study(file).data.dataset == "image-folder"


def test_the_study_of_its_page_is_one_whose_options_exist(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "tutorials" / "study.md").read_text(encoding="utf-8")
    block = re.search(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    file = tmp_path / "study.yaml"
    file.write_text(block.group(1), encoding="utf-8")
    study = load_study(file)
    assert (study.name, study.execution.workers) == ("small", 2)
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(re.findall(r"peft-vit (\w+)", text)) <= commands.keys()
    parameters = [parameter for command in commands.values() for parameter in command.params]
    options = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}
    assert set(re.findall(r"--[a-z][a-z-]+", text)) - {"--head"} <= options  # which is Ray's


PATTERNS = ("*.md", "docs/**/*.md", "experiments/docs/*.md")
DOCUMENTS = sorted(str(file.relative_to(ROOT)) for pattern in PATTERNS for file in ROOT.glob(pattern))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_linked_files_exist(document: str) -> None:
    file = ROOT / document
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", file.read_text(encoding="utf-8"))
    missing = [link for link in links if not (file.parent / link).exists()]
    assert missing == []
