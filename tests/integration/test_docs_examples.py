"""The documents' examples: Python runs as it stands, commands and options exist, settings make a valid study."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import typer
from nbclient import NotebookClient
from PIL import Image

import peft_vit
from peft_vit.cli import app
from peft_vit.core.config import load_study

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks_of(document: str, language: str) -> list[str]:
    return [match[2] for match in _FENCE.finditer(text_of(document)) if match[1] == language]


GUIDES = sorted(
    str(file.relative_to(ROOT)) for folder in ("tutorials", "how_to") for file in (ROOT / "docs" / folder).glob("*.md")
)
WITH_PYTHON = [document for document in GUIDES if blocks_of(document, "python")]
SLOW = ["docs/how_to/own_loop.md"]


def run_python_blocks(text: str, document: str) -> int:
    """Execute each fenced Python block, all in one namespace, and return how many there were."""
    namespace: dict[str, object] = {"__name__": "example"}
    blocks = [match for match in _FENCE.finditer(text) if match[1] == "python"]
    for block in blocks:
        above = text.count("\n", 0, block.start(2))  # blank lines, so that a traceback names the document's own line
        exec(compile("\n" * above + block[2], document, "exec"), namespace)
    return len(blocks)


@pytest.fixture
def images(tmp_path: Path) -> None:
    """Write twelve images of two classes into the folder that the documents call `images`."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")


@pytest.mark.usefixtures("images", "cache")
@pytest.mark.parametrize(
    "document",
    [pytest.param(document, marks=[pytest.mark.slow] if document in SLOW else []) for document in WITH_PYTHON]
    + [pytest.param("docs/reference/python.md", marks=[pytest.mark.slow, pytest.mark.real])],
)
def test_every_python_block_runs(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the examples write files
    assert run_python_blocks(text_of(document), document) > 0


# A block with another word would be neither run nor checked, and nobody would notice.
def test_blocks_say_what_they_hold() -> None:
    languages = {match[1] for document in GUIDES for match in _FENCE.finditer(text_of(document))}
    assert languages <= {"", "python", "yaml", "text"}


COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def unknown_options(line: str) -> list[str]:
    """Return what a line in a document asks of `peft-vit` that it does not have."""
    words = shlex.split(line.split("  #", maxsplit=1)[0].removeprefix(".venv/bin/"))[1:]
    if words[0].startswith("-"):
        return []
    if words[0] not in COMMANDS:
        return [words[0]]
    known = {
        option for parameter in COMMANDS[words[0]].params for option in (*parameter.opts, *parameter.secondary_opts)
    } | {"--help"}
    return [word for word in words if word.startswith("--") and word.split("=")[0] not in known]


def test_commands_and_their_options_exist() -> None:
    assert unknown_options("peft-vit run study.yaml --nothing 3  # --else") == ["--nothing"]
    assert unknown_options("peft-vit walk") == ["walk"]
    for document in ("README.md", *GUIDES):
        lines = [line for block in blocks_of(document, "") for line in block.splitlines()]
        calls = [line for line in lines if line.removeprefix(".venv/bin/").startswith("peft-vit ")]
        calls += re.findall(r"`(peft-vit [^`]+)`", text_of(document))
        assert {line: unknown for line in calls if (unknown := unknown_options(line))} == {}, document


STUDY = "docs/tutorials/study.md"
SETTINGS = [(document, block) for document in GUIDES for block in blocks_of(document, "yaml")]


def sections(text: str) -> dict[str, str]:
    """Return the top-level sections of a configuration, by name, as they are written."""
    return {match[1]: match[0] for match in re.finditer(r"^(\w+):.*\n(?:[ #].*\n|\n)*", text, re.MULTILINE)}


@pytest.mark.parametrize(("document", "block"), SETTINGS)
def test_settings_make_a_valid_study(document: str, block: str, tmp_path: Path) -> None:
    """A study by itself, or what changes in that of the tutorial."""
    given = sections(block)
    if "name" not in given:
        given = sections(blocks_of(STUDY, "yaml")[0]) | given
    file = tmp_path / "study.yaml"
    file.write_text("".join(given.values()), encoding="utf-8")
    study = load_study(file)
    assert study.name == "digits" or "name" in sections(block)


@pytest.mark.usefixtures("in_this_process", "images", "cache")
def test_the_readme_trains_predicts_and_reports(weights, tmp_path, monkeypatch, capsys) -> None:
    """As it stands, but for a small model instead of the default one."""
    small = {"model": "test_vit", "weights": str(weights), "image_size": 32, "steps": 4, "device": "cpu"}
    monkeypatch.setattr(peft_vit, "train", partial(peft_vit.train, threads=1, precision="fp32", **small))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to("images/cat")
    assert run_python_blocks(text_of("README.md"), "README.md") == 1
    said = capsys.readouterr().out
    assert re.search(r"0\.png (cat|dog) 0\.\d", said)
    assert "report.html" in said


PATTERNS = ("*.md", "docs/**/*.md", "examples/*.md")
DOCUMENTS = sorted(str(file.relative_to(ROOT)) for pattern in PATTERNS for file in ROOT.glob(pattern))


def test_linked_files_exist_and_the_readme_is_short() -> None:
    links = [
        (document, link)
        for document in DOCUMENTS
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text_of(document))
    ]
    assert len(links) > 100
    places = [(ROOT / document).parent / link for document, link in links]
    missing = [place for place in places if not place.exists() and not place.with_suffix(".ipynb").exists()]
    assert missing == []  # a notebook's page is made with the site
    assert len(text_of("README.md").splitlines()) <= 120  # a reader gives it a minute


# --- the notebook ---


NOTEBOOK = ROOT / "examples" / "first_model.ipynb"


def code_cells(notebook: Mapping) -> tuple[Any, list[Any]]:
    """Return the first code cell, which installs the package, and those that compute."""
    first, *others = (cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    return first, others


@pytest.mark.slow  # starts four processes that import PyTorch
@pytest.mark.parametrize(
    "small", [pytest.param(True, id="a-small-model"), pytest.param(False, id="as-it-is", marks=pytest.mark.real)]
)
def test_the_notebook_runs_from_images_to_a_file_that_predicts(
    small: bool, weights: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(peft_vit.__file__).parents[1]))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    _, notebook["cells"] = code_cells(notebook)
    for cell in notebook["cells"]:
        cell["outputs"] = []
    if small:
        request.getfixturevalue("cache")
        settings = f"model='test_vit', weights={str(weights)!r}, image_size=32, steps=4, device='cpu', threads=1"
        (training,) = [cell for cell in notebook["cells"] if "image_size=56, steps=60" in cell["source"]]
        training["source"] = training["source"].replace("image_size=56, steps=60", settings)
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, kernel_name="python3", timeout=None, resources=place).execute()
    shown = [cell["outputs"][-1].get("data", {}).get("text/html", "") for cell in notebook["cells"]]
    assert sum("<iframe srcdoc=" in html for html in shown) == 1
    assert sum('<table border="1"' in html for html in shown) == 1
    assert (tmp_path / "model.onnx").exists()
    runs = peft_vit.load_results(tmp_path / "peft-vit-runs").runs
    accuracies = runs.test_accuracy[~runs.study.str.startswith("folds-")]  # and of a probe if it is better
    assert accuracies.max() > (0.05 if small else 0.9)  # of ten classes


def test_the_notebook_installs_first_names_nobodys_folders_and_holds_no_warning() -> None:
    first, others = code_cells(nbformat.read(NOTEBOOK, as_version=4))
    assert first["metadata"]["tags"] == ["install"]
    assert "%pip install" in first["source"]
    outputs = [out for cell in others for out in cell["outputs"]]
    assert not [out for out in outputs if out["output_type"] == "error" or out.get("name") == "stderr"]
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not [name for name in ("/home/", "/tmp/", "site-packages") if name in text]
    assert len(text) < 40_000  # the page that it shows is left out
