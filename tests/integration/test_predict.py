"""What `predict` prints and writes, of which images, and what it refuses before it opens the model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from golden import check_golden
from no_posix import run_without_posix
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from tiny_models import CARD, random_model

from peft_vit.base import console
from peft_vit.core.records import Calibrated
from peft_vit.deploy import export_onnx, save_low_bit

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(autouse=True)
def here(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to a folder with a model and four images of two of its classes."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    card = CARD.model_copy(update={"class_names": ("class_0", "class_1", "the third"), "channels": 3})
    save_low_bit(timm.create_model("test_vit", img_size=32, num_classes=3), Path("model.safetensors"), card)
    for name in ("class_0/00.png", "class_0/01.png", "class_1/00.png", "class_1/01.png"):
        file = Path("photos", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / name, file)
    Path("photos/class_0/notes.txt").write_text("no image")
    shutil.make_archive("zipped", "zip", "photos")
    Path("flat").mkdir()
    shutil.copy(images / "class_0/00.png", "flat/00.png")
    Path("flat/text.png").write_text("no image")
    Path("linked").mkdir()
    Path("linked/class_1").symlink_to(tmp_path / "photos" / "class_1")
    Path("linked/class_1_too").symlink_to(Path("linked").absolute())
    Path("linked/class_1_again").symlink_to("class_1")
    Path("linked/again.png").symlink_to("class_1/00.png")
    Path("empty").mkdir()
    return tmp_path


CALLS = (
    ("photos", 0),
    ("photos --top 2", 0),
    ("flat photos/class_1/00.png --format csv", 1),
    ("zipped.zip --top 9 --format csv", 0),
    ("linked --format json", 0),
    ("flat/text.png --format json", 1),
    ("photos --output said.csv", 0),
    ("photos --top 3 --output said.json", 0),
)


def test_what_predict_says(command, here, monkeypatch) -> None:
    document = []
    for call, code in CALLS:
        said = command("predict", "model.safetensors", *call.split(), code=code)
        document += [f"$ predict {call}", said.out, *(f"! {line}" for line in said.err.splitlines())]
    monkeypatch.setattr(console, "FIRST_S", 0.0)
    monkeypatch.setattr(console, "EVERY_S", 0.0)
    monkeypatch.setattr(console, "SELDOM_S", 0.0)
    slow = command("predict", "model.safetensors", "flat", code=1).err.splitlines()
    document += ["$ predict flat, ten seconds an image", *(line for line in slow if not line.startswith("opening "))]
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True)
    document += ["$ predict photos --top 2, on a terminal"]
    document += [command("predict", "model.safetensors", "photos", "--top", 2).out]
    text = re.sub(r"0\.\d+", "0.N", "\n".join(document))
    check_golden("predict.txt", re.sub(r"\d+ s left", "N s left", text))
    table = pd.read_csv("said.csv")
    assert table.columns.tolist() == ["file", "class", "probability"]
    rows = json.loads(Path("said.json").read_text())
    assert [row["probability"] for row in rows] == table["probability"].tolist()  # to the last bit
    for row in rows:
        assert row["probability"] > row["probability_2"] > row["probability_3"]
        assert row["probability"] + row["probability_2"] + row["probability_3"] == pytest.approx(1)
    assert sorted(row["file"] for row in rows) == [row["file"] for row in rows]


def test_a_bar_is_shown_where_the_lines_go_elsewhere(command, monkeypatch) -> None:
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: True)
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: False)
    said = command("predict", "model.safetensors", "photos", "--output", "said.csv")
    assert said.out == "4 images: said.csv\n"
    before = Path("said.csv").read_text()
    Path("said.csv").write_text("of an earlier call")
    command("predict", "model.safetensors", "photos", "--output", "said.csv", "--overwrite")
    assert Path("said.csv").read_text() == before


REFUSED = (
    ("photos empty", "empty: "),
    ("nowhere", "nowhere: "),
    ("photos --output said.txt", "said.txt: --output: "),
    ("photos --output said.csv --format json", "--format: "),
    ("photos --top 0", "--top"),
    ("photos --coverage 0.9", "model.safetensors: --coverage: "),
    ("photos --output there.csv", "there.csv: --output: "),
    ("photos --overwrite", "--overwrite: "),
    ("photos --weights hub", "--weights: "),
    ("flat/00.png no.zip", "no.zip: "),
)


@pytest.mark.parametrize(("call", "stated"), REFUSED)
def test_bad_input_is_refused_before_anything_is_predicted(command, call, stated) -> None:
    Path("no.zip").write_text("none")
    Path("there.csv").write_text("mine")
    said = command("predict", "model.safetensors", *call.split(), code=2)
    (line,) = said.err.splitlines()
    assert stated in line
    assert said.out == ""
    assert not os.path.exists("said.csv")
    assert Path("there.csv").read_text() == "mine"


def test_a_coverage_is_named_as_it_was_typed_with_what_the_model_can_tell(command) -> None:
    calibrated = Calibrated(images=40, temperature=1.0, coverages=(0.8, 0.9), thresholds=(0.5, 0.7))
    card = CARD.model_copy(update={"class_names": ("a", "b", "c"), "channels": 3, "calibrated": calibrated})
    save_low_bit(timm.create_model("test_vit", img_size=32, num_classes=3), Path("calibrated.safetensors"), card)
    said = command("predict", "calibrated.safetensors", "photos", "--coverage", 0.2, code=2).err
    expected = "expected a share of images from 0.8 to 0.9, for which the model has thresholds; got 0.2"
    assert said == f"error: calibrated.safetensors: --coverage: {expected}\n"
    held = command("predict", "calibrated.safetensors", "photos", "--coverage", 90).err.splitlines()
    assert "The set at 90 % holds the true class of about 90 in 100 images, if they are like those of training" in held


@pytest.fixture(scope="module")
def onnx_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a model of colour images whose probabilities are calibrated."""
    names = ("class_0", "class_1", "the third", "4", "5")
    calibrated = Calibrated(images=40, temperature=0.5, coverages=(), thresholds=())
    card = CARD.model_copy(update={"class_names": names, "channels": 3, "calibrated": calibrated})
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(random_model("test_vit").eval(), file, card)
    return file


def test_the_documented_program_says_what_predict_says(here: Path, onnx_model: Path, command, capsys) -> None:
    shutil.copy(onnx_model, "model.onnx")
    exif, pixels = Image.Exif(), np.random.default_rng(0).integers(0, 256, (30, 50, 4), np.uint8)
    exif[0x0112] = 6  # turned
    Image.fromarray(pixels).save("photo.png", exif=exif)
    (row,) = json.loads(command("predict", "model.onnx", "photo.png", "--format", "json").out)
    text = (Path(__file__).parents[2] / "docs/how_to/serve.md").read_text()
    (program,) = re.findall(r"^```\n(import json\n.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(compile(program, "serve.md", "exec"), {})
    name, probability = capsys.readouterr().out.rsplit(maxsplit=1)
    assert (name, float(probability)) == (row["class"], pytest.approx(row["probability"], rel=1e-5))


@pytest.mark.parametrize(
    ("call", "stated"),
    [
        ("predict model.onnx photos/class_0", r"^photos/class_0/00\.png\t\w+\t0\.\d"),
        ("test model.onnx photos", r"^Accuracy \d+\.0 % .*on 4 images\.\n[^!]*^Page: peft-vit-test/report\.html"),
    ],
)
def test_an_onnx_file_needs_neither_torch_nor_anything_of_posix(
    here: Path, onnx_model: Path, call: str, stated: str
) -> None:
    shutil.copy(onnx_model, "model.onnx")
    absent = ["torch", "torchvision", "timm", "transformers", "huggingface_hub"]
    said = run_without_posix(here, call, imports="import onnxruntime", absent=absent)
    assert re.search(stated, said, re.MULTILINE), said


# As docs/how_to/deploy.md says.
LEAN = ("numpy", "onnx", "onnxruntime", "pillow", "pydantic", "pyyaml", "scipy", "typer")


def distributions(names: Iterable[str]) -> set[str]:
    """Return distributions with all that they require, as `pip install` brings them."""
    found: set[str] = set()
    waiting = [*names]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in found and any(metadata.distributions(name=name)):
            found.add(name)
            needs = [Requirement(text) for text in metadata.requires(name) or ()]
            waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


@pytest.mark.parametrize(
    ("call", "stated"),
    [("predict", r"^photos/class_0/00\.png\t\w+\t0\.\d"), ("test", r"^Accuracy \d+\.0 % .*on 4 images\.\n")],
)
def test_an_onnx_file_is_asked_where_nothing_but_eight_packages_is(onnx_model: Path, call: str, stated: str) -> None:
    """In a process in which no module of another distribution can be imported."""
    shutil.copy(onnx_model, "model.onnx")
    lean = distributions(LEAN) | {"peft-vit"}
    modules = metadata.packages_distributions().items()
    missing = [module for module, of in modules if not lean & {canonicalize_name(name) for name in of}]
    assert {"torch", "timm", "transformers", "peft", "sklearn", "matplotlib"} <= {*missing}
    code = f"import sys; sys.modules |= dict.fromkeys({missing!r}); from peft_vit.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, call, "model.onnx", "photos"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(stated, done.stdout, re.MULTILINE), done.stdout


def test_pictures_of_where_the_model_looked_go_into_an_empty_folder(command) -> None:
    command("predict", "model.safetensors", "photos", "flat", "--explain", "looked", code=1)  # one is no image
    names = ["0001-00.png", "0002-01.png", "0003-00.png", "0004-01.png", "0005-00.png"]
    assert sorted(file.name for file in Path("looked").iterdir()) == names
    said = command("predict", "model.safetensors", "photos", "--explain", "looked", code=2)
    assert said.err == "error: looked: --explain: holds files already; choose another folder\n"
    assert said.out == ""
