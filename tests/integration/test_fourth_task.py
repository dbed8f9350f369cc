"""A task more takes its module, how it is shown, a line for each, and its name where configurations may say it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import peft_vit

pytestmark = [pytest.mark.part("runner"), pytest.mark.usefixtures("cache"), pytest.mark.slow]
PACKAGE = Path(peft_vit.__file__).parent
SMALL = "--weights random --model test_vit --threads 1 --precision fp32 --device cpu --image-size 32"
LATEST = "peft-vit-runs/latest"

CALLS = """
import peft_vit
from peft_vit.cli import main
from peft_vit.fit import fit

assert peft_vit.__file__.startswith({package!r})
fit.FEWEST_VALIDATION = 0  # some of the few images validate, instead of five trainings more
for words in {commands!r}:
    try:
        main(words)
    except SystemExit as end:
        print("CODE", end.code or 0, flush=True)
"""


def with_a_task_more(package: Path) -> None:
    """Write the files into a copy of the package."""
    tasks, names = package / "core/tasks/__init__.py", package / "core/config/training.py"
    shutil.copy(Path(__file__).parents[1] / "shares_task.py", package / "core/tasks/shares.py")
    text, count = re.subn(r"(REGRESSION, MULTILABEL)\)\}", r"\1, SHARES)}", tasks.read_text())
    tasks.write_text(text.replace("\nTASKS", "\nfrom peft_vit.core.tasks.shares import SHARES\n\nTASKS", 1))
    shown = package / "deploy/presentation.py"
    shutil.copy(Path(__file__).parents[1] / "shares_shown.py", package / "deploy/shares_shown.py")
    text, listed = re.subn(r"(ManyLabels\(\))\)\}", r"\1, Shares())}", shown.read_text())
    shown.write_text(text.replace("\nPRESENTED", "\nfrom peft_vit.deploy.shares_shown import Shares\n\nPRESENTED", 1))
    said, named = re.subn(r'(TaskName = Literal\[.*"regression")', r'\1, "shares"', names.read_text())
    said, measured = re.subn(r'("r2", "spearman")', r'\1, "overlap"', said)
    names.write_text(said)
    assert (count, listed, named, measured) == (1, 1, 1, 1)


def test_a_fourth_task_goes_from_a_table_to_a_page_a_prediction_and_exports(images, tmp_path) -> None:
    copied = tmp_path / "with_a_fourth"
    shutil.copytree(PACKAGE, copied / "peft_vit", ignore=shutil.ignore_patterns("__pycache__"))
    with_a_task_more(copied / "peft_vit")
    shutil.copytree(images, tmp_path / "images")
    rows = ["path,red,green,blue"]
    rng = np.random.default_rng(0)
    for file in sorted((tmp_path / "images").rglob("*.png")):
        parts = rng.uniform(0.01, 0.1, 3) + np.eye(3)[int(file.parent.name[-1])]
        parts = np.round(parts / parts.sum(), 3)
        rows.append(f"{file.relative_to(tmp_path)},{parts[0]},{parts[1]},{1 - parts[0] - parts[1]:.3f}")
    (tmp_path / "shares.csv").write_text("\n".join(rows) + "\n")
    commands = [
        f"train shares.csv {SMALL} --steps 8",
        f"predict {LATEST} images/class_2/00.png --top 2 --format json --output said.json",
        f"report {LATEST} --output page",
        f"export {LATEST} --output page.html",
        f"export {LATEST} --bits 4 --output small.safetensors",
        f"export {LATEST} --output model.onnx",
        "predict model.onnx images/class_2/00.png --top 2 --format json --output again.json",
        f"train shares.csv {SMALL} --method linear",
        "runs",
        f"train images {SMALL} --task shares",
    ]
    code = CALLS.format(commands=[command.split() for command in commands], package=str(copied))
    environment = os.environ | {"PYTHONPATH": str(copied), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert re.findall(r"CODE (\d)", said) == ["0"] * 9 + ["2"], said
    assert "  48 images with shares of red, green, blue\n" in said
    assert "  31 to train, 7 to validate, 10 to test (a fifth of them)" in said
    assert re.search(r"Test mean overlap \d\d\.\d %", said)
    assert "A linear probe has" in said
    assert re.search(r"has a folder for each class, which is not shares", said)
    (row,), (again,) = (json.loads((tmp_path / name).read_text()) for name in ("said.json", "again.json"))
    assert row["class"] == again["class"] == "blue"
    assert row["probability"] == pytest.approx(again["probability"], abs=1e-4)
    card = (tmp_path / "page/card.md").read_text()
    assert "| Share | Mean | Predicted |" in card
    assert "shares of 3: red, green, blue" in (tmp_path / "page.html").read_text()
