"""`test` scores a model on new labelled images; what it refuses is one line."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from golden import check_golden

import peft_vit

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(autouse=True)
def here(images: Path, run_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to a folder with a run, a copy of some of its images, others whose class is unknown, and a table."""
    monkeypatch.chdir(tmp_path)
    Path("run").symlink_to(run_of("linear"))
    for kind in ("class_0", "class_1"):
        shutil.copytree(images / kind, Path("new", kind))
        shutil.copytree(images / kind, Path("others", kind if kind == "class_0" else "walrus"))
    Path("new/class_1/00.png").write_text("no image")
    Path("table.csv").write_text(
        "path,label,split\nnew/class_0/00.png,class_0,test\nnew/class_1/01.png,class_1,train\n"
    )
    return tmp_path


def test_a_model_is_scored_beside_its_own_test(command, here: Path) -> None:
    said = command("test", "run", "new", code=1)
    document = [said.out, *(f"! {line}" for line in said.err.splitlines())]
    document += ["$ of a table, its test split", command("test", "run", "table.csv", "--output", "t").out]
    text = "\n".join(document).replace(f"{here}/", "")
    check_golden("test_images.txt", re.sub(r"\d+(\.\d)?", "N", text))
    trained = peft_vit.load("run")
    files = [file for file in sorted(Path("new").rglob("*.png")) if file != Path("new/class_1/00.png")]
    right = [said.class_name == file.parent.name for file, said in zip(files, trained.predict(files), strict=True)]
    assert f"ccuracy {100 * np.mean(right):.1f} % " in said.out.partition("\n")[0]
    assert Path("peft-vit-test/report.html").read_text().count("data:image/png") >= 8


REFUSED = (
    ("test run others", "others: has 'walrus', which the model does not know"),
    ("test run {images}", "{images}: holds the images that the model was trained on"),
    ("test new run", "new: is not a model"),
)


@pytest.mark.parametrize(("call", "stated"), REFUSED)
def test_bad_input_is_refused(refused, images: Path, call: str, stated: str) -> None:
    assert stated.format(images=images) in refused(*call.format(images=images).split())
