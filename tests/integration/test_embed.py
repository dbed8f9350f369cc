"""`embed` writes what the head of a trained or pretrained model sees of images; what it refuses is one line."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import peft_vit
from peft_vit.base.errors import DataWarning, UserError
from peft_vit.deploy import predict_images

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(autouse=True)
def here(images: Path, run_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go to a folder with a run, an image that can't be read, and three that can."""
    monkeypatch.chdir(tmp_path)
    Path("run").symlink_to(run_of("linear"))
    Path("new").mkdir()
    Path("new/0.png").write_text("no image")
    for number in (1, 2, 3):
        Path(f"new/{number}.png").symlink_to(images / f"class_{number - 1}" / "00.png")


@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_features_are_what_the_head_sees(command, ending: str) -> None:
    said = command("embed", "new", "--model", "run", "--output", f"x.{ending}", code=1)
    assert said.err.startswith("error: new/0.png: ")
    if ending == "npy":
        files, features = pd.read_csv("x.csv")["file"].tolist(), np.load("x.npy")
    else:
        table = pd.read_parquet("x.parquet").set_index("file")
        files, features = table.index.tolist(), table.to_numpy(copy=True)
    assert files == [str(file) for file in sorted(Path("new").glob("[123].png"))]
    trained = peft_vit.load("run")
    head = trained.model.get_classifier()
    with torch.inference_mode():
        logits = head(torch.from_numpy(features)).numpy()
    expected = [said.class_name for said in predict_images(trained.classifier, map(Path, files))]
    assert [trained.classes[k] for k in logits.argmax(1)] == expected


def test_python_gets_what_the_command_writes(command, images: Path) -> None:
    command("embed", "new", "--model", "run", "--output", "x.npy", code=1)
    with pytest.warns(DataWarning, match=r"1 can't be read and are left out:\nnew/0.png: ") as said:
        files, features = peft_vit.embed("new", "run")
    assert (len(said), said[0].filename) == (1, __file__)
    assert files == sorted(Path("new").glob("[123].png"))
    assert np.array_equal(features, np.load("x.npy"))
    array = np.asarray(Image.open(images / "class_0" / "00.png").convert("RGB"))
    none, of_array = peft_vit.embed(array, "run")
    assert none == [None]
    assert of_array == pytest.approx(features[:1], abs=1e-5)
    with pytest.raises(UserError, match=r"new/0.png"):
        peft_vit.embed(["new/1.png", "new/0.png"], "run")


def test_a_folder_is_predicted_without_what_can_not_be_read() -> None:
    trained = peft_vit.load("run")
    with pytest.warns(DataWarning, match=r"1 can't be read and are left out:\nnew/0.png: ") as said:
        found = trained.predict("new")
    assert (len(said), said[0].filename) == (1, __file__)
    assert [prediction.file for prediction in found] == sorted(Path("new").glob("[123].png"))
    for call in (partial(trained.predict, ["new/1.png", "new/0.png"]), partial(trained.predict_proba, "new")):
        with pytest.raises(UserError, match=r"new/0.png"):  # or rows would be of other images
            call()
    for number in (1, 2, 3):
        Path(f"new/{number}.png").unlink()
    with pytest.raises(UserError, match=r"new/0.png"):
        trained.predict("new")


def test_a_pretrained_model_has_features_too(command, images: Path) -> None:
    model = ("--model", "test_vit", "--weights", "random", "--image-size", 32)
    call = ("embed", images / "class_0", "--output", "x.npy", *model)
    assert command(*call).out == "16 images, 64 features each: x.npy\n"
    assert "exists" in command(*call, code=2).err


@pytest.mark.parametrize(
    ("call", "stated"),
    [
        ("new --output new.csv", "new.csv: --output: "),
        ("nowhere --output new.npy", "nowhere: "),
        ("new --output new.npy --model run --image-size 32", "--image-size: "),
    ],
)
def test_bad_input_is_refused(refused, call: str, stated: str) -> None:
    assert stated in refused("embed", *call.split())
