"""The notebook of the documentation runs from its first cell to its last, and what it shows is of the kind it says."""

from collections.abc import Mapping
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import peft_vit

FILE = Path(__file__).parents[2] / "docs" / "tutorials" / "notebook.ipynb"


def shown(notebook: Mapping) -> list[set[str]]:
    """Return the forms in which each code cell shows its last value."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    results = [[out for out in cell["outputs"] if out["output_type"] == "execute_result"] for cell in cells]
    return [set(outputs[-1]["data"]) if outputs else set() for outputs in results]


@pytest.mark.slow  # what it calls is called by test_api.py and the README
@pytest.mark.real
def test_it_runs_and_shows_what_the_file_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(peft_vit.__file__).parents[1]))
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    kept = shown(notebook)
    assert all(kept)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, kernel_name="python3", timeout=None, resources=place).execute()
    assert shown(notebook) == kept
    accuracies = peft_vit.load_results(tmp_path / "runs").runs.set_index("experiment").test_accuracy
    assert set(accuracies.index) == {"linear", "lora"}
    assert accuracies.min() > 0.5  # of three classes


def test_it_names_nobodys_folders_and_holds_no_warning() -> None:
    notebook = nbformat.read(FILE, as_version=4)
    outputs = [out for cell in notebook["cells"] if cell["cell_type"] == "code" for out in cell["outputs"]]
    assert not [out for out in outputs if out["output_type"] == "error" or out.get("name") == "stderr"]
    assert "/home/" not in FILE.read_text(encoding="utf-8")
    assert "site-packages" not in FILE.read_text(encoding="utf-8")
