"""`peft-vit tune` on tables of several labels, and of numbers: real runs of a tiny model, from images to a file."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from peft_vit import load
from peft_vit.deploy.measures import fastest
from peft_vit.fit.fit import Environment
from peft_vit.fit.output import answer
from peft_vit.fit.request import TuneRequest
from peft_vit.fit.tune import tune
from peft_vit.runs.costs.estimate import Throughput
from peft_vit.runs.records.scan import read_records

pytestmark = pytest.mark.usefixtures("cache", "in_this_process")


@pytest.fixture
def tuned(images, tmp_path, monkeypatch):
    """Return what tunes on a table of 48 images of three colours, and the lines that it tells."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(images, "images")
    monkeypatch.setattr("peft_vit.fit.tune.LEARNING_RATES", (1e-3,))
    monkeypatch.setattr("peft_vit.fit.costs.MOST_STEPS", 24)
    monkeypatch.setattr("peft_vit.fit.costs.MOST_LAST_STEPS", 32)
    row = SimpleNamespace(bytes=300_000, median_s=0.01, low_s=0.01, high_s=0.01, processor="one")
    monkeypatch.setattr(fastest, "bench", lambda files, **_: [SimpleNamespace(**vars(row), file=str(f)) for f in files])
    throughput = replace(Throughput.estimated(1e9), process_s=1.0)

    def call(columns: str, cells, **asked):
        files = sorted(Path("images").rglob("*.png"))
        lines = [f"{file},{cells(int(file.parent.name[-1]), n)}" for n, file in enumerate(files)]
        Path("table.csv").write_text("\n".join([f"path,{columns}", *lines]) + "\n")
        given = {"models": ("test_vit",), "weights": "random", "image_sizes": (32,), "threads": 1, "minutes": 8.0}
        given |= {"precision": "fp32", "compute": "float", "device": "cpu", "max_bytes": 500_000}
        said: list[str] = []
        request = TuneRequest.of(images=Path("table.csv"), output=tmp_path / "tuned", **given | asked)
        environment = Environment(throughput=throughput)
        return tune(request, lambda event: said.append(str(event)), environment), "\n".join(said)

    return call


@pytest.mark.slow
def test_several_labels(tuned, tmp_path) -> None:
    def cells(k: int, n: int) -> str:
        return f"{int(k < 2)},{int(k > 0) if n % 7 else ''}"

    choice, said = tuned("warm,cold", cells)
    assert re.search(r"\d+ to train, \d+ to test \(a fifth", said)
    assert re.search(r"32 px: \d+\.\d% mAP", said)
    assert re.search(r"% mean average precision on new images \(.* by \d+ test images\)", answer(choice))
    records = list(read_records(tmp_path / "tuned/studies"))
    assert {record.spec.experiment.training.metric for record in records} == {"map"}
    folds = [read for read in records if read.spec.data.folds]
    assert all(np.nansum(np.array(fold.predictions.labels, float), 0).min() > 0 for fold in folds)  # stratified
    model = load(tmp_path / "tuned")
    (prediction,) = model.predict(["images/class_0/00.png"])
    assert "warm" in dict(prediction.labels)
    assert model.classifier.card.decision == choice.meaning
    assert choice.meaning.images == len({image for fold in choice.folds for image in fold.images})
    card = (tmp_path / "tuned/card.md").read_text()
    assert "1 point of mean average precision" in card
    assert "| warm |" in card
    assert "Labels that go together" in card
    assert "An image's labels in its set | On folds |" in card


@pytest.mark.slow
def test_numbers(tuned, tmp_path) -> None:
    rng = np.random.default_rng(0)
    choice, _ = tuned("heat", lambda k, _: f"{10 * k + rng.normal():.2f}", metric="rmse", margin=2.0)
    sealed = choice.final.labels
    predicted = choice.final.learned.predicted(choice.final.logits)
    error = float(np.sqrt(((predicted - sealed) ** 2).mean()))
    assert choice.score.estimate == pytest.approx(error)
    assert f"{error:.3g} root mean squared error on new images" in answer(choice)
    assert error < sealed.std()
    (prediction,) = load(tmp_path / "tuned").predict(["images/class_2/00.png"])
    value, low, high = prediction.numbers["heat"]
    assert low < value < high
    card = (tmp_path / "tuned/card.md").read_text()
    assert "2 % of a standard deviation" in card
    assert "Against the best, % of a standard deviation" in card
    assert "| heat |" in card
    assert "Predicted against true" in card
    assert "Intervals that hold the number | On folds |" in card
