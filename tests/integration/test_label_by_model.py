"""`label --model`: a trained model's features, probabilities and distances, as `embed` and `predict` have them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

import peft_vit
from peft_vit.label.features import FeatureFile, compute_features

pytestmark = pytest.mark.usefixtures("cache")
pytest.importorskip("starlette")
LABEL = ("label", "new", "--no-browser", "--model")


@pytest.fixture(autouse=True)
def here(images: Path, run_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").symlink_to(run_of("lora"))
    Path("new").mkdir()
    for number in range(3):
        Path(f"new/{number}.png").write_bytes((images / f"class_{number}" / "00.png").read_bytes())


def test_values_are_those_of_embed_and_predict(command) -> None:
    names = [f"{number}.png" for number in range(3)]
    compute_features(Path("new"), names, Path("features.npy"), os.getpid(), run=Path("run"))
    file = FeatureFile(
        Path("features.npy"), [hashlib.sha256(Path("new", name).read_bytes()).hexdigest() for name in names]
    )
    file.update()
    command("embed", "new", "--model", "run", "--output", "x.npy")
    trained = peft_vit.load("run")
    probabilities = trained.predict_proba([Path("new", name) for name in names])
    expected = np.load("x.npy")
    width = expected.shape[1]
    assert file.values.shape == (3, width + 3 + 1)
    np.testing.assert_allclose(file.values[:, :width], expected, atol=1e-4)
    np.testing.assert_allclose(file.values[:, width:-1], probabilities, atol=1e-4)
    distances = [said.distance or 0.0 for said in trained.predict([Path("new", name) for name in names])]
    np.testing.assert_allclose(file.values[:, -1], distances, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "field"),
    [(("nowhere",), "nowhere: --model: "), (("new",), "new: --model: "), (("run", "--task", "multilabel"), "run: ")],
)
def test_what_is_no_model_for_it_is_refused(refused, options, field) -> None:
    assert field in refused(*LABEL, *options)


def test_unlike_needs_a_model_that_can_tell(refused) -> None:
    assert "--order: " in refused("label", "new", "--no-browser", "--order", "unlike")
