"""`label --model`: a trained model's features, probabilities and distances, as `embed` and `predict` have them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import peft_vit
from peft_vit.base.files import sha256_of
from peft_vit.label.features import compute_features, read_records

pytestmark = pytest.mark.usefixtures("cache")
pytest.importorskip("starlette")


@pytest.fixture(autouse=True)
def here(images: Path, run_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").symlink_to(run_of("lora"))
    Path("new").mkdir()
    for number in range(3):
        Path(f"new/{number}.png").write_bytes((images / f"class_{number}" / "00.png").read_bytes())


def test_values_are_those_of_embed_and_predict(command) -> None:
    files = [Path("new", f"{number}.png") for number in range(3)]
    compute_features(Path("new"), Path("features.npy"), os.getpid(), run=Path("run"))
    _, records = read_records(Path("features.npy"), [sha256_of(file) for file in files])
    command("embed", "new", "--model", "run", "--output", "x.npy")
    trained = peft_vit.load("run")
    distances = [said.distance or 0.0 for said in trained.predict(files)]
    np.testing.assert_allclose(records["features"], np.load("x.npy"), atol=1e-4)
    np.testing.assert_allclose(records["probabilities"], trained.predict_proba(files), atol=1e-4)
    np.testing.assert_allclose(records["distance"], distances, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (("--model", "nowhere"), "nowhere: --model: "),
        (("--model", "new"), "new: --model: "),
        (("--model", "run", "--task", "multilabel"), "run: "),
        (("--order", "unlike"), "--order: "),
    ],
)
def test_what_is_no_model_for_it_is_refused(refused, options, field) -> None:
    assert field in refused("label", "new", "--no-browser", *options)
