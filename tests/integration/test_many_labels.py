"""From a table of several labels, or of numbers, to a model, its page and a prediction."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from peft_vit import load
from peft_vit.errors import UserError
from peft_vit.records import RECORD_FILE, read_record, single_run
from peft_vit.runs.execute import run_one
from peft_vit.training import Checkpoints, Interrupted

pytestmark = [pytest.mark.part("runner"), pytest.mark.usefixtures("cache")]
SMALL = "--weights random --model test_vit --threads 1 --precision fp32 --compute float --device cpu --image-size 32"
LATEST = Path("peft-vit-runs/latest")


@pytest.fixture(autouse=True)
def tables(images, tmp_path, monkeypatch) -> None:
    """Go to a folder with tables of 48 images of three colours."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(images, "images")
    files = sorted(Path("images").rglob("*.png"))
    rng = np.random.default_rng(0)
    classes = [int(file.parent.name[-1]) for file in files]
    labels = [(f"{int(k < 2)}", f"{int(k > 0)}" if rng.random() > 0.1 else "") for k in classes]
    Path("labels.csv").write_text(
        "path,warm,cold\n" + "".join(f"{file},{','.join(own)}\n" for file, own in zip(files, labels, strict=True))
    )
    numbers = [round(10 * k + rng.normal(), 2) for k in classes]
    Path("numbers.csv").write_text(
        "path,heat\n" + "".join(f"{file},{own}\n" for file, own in zip(files, numbers, strict=True))
    )


def record_of(folder=LATEST):
    return read_record(single_run(folder) / RECORD_FILE)


def test_several_labels_from_a_table_to_a_prediction(command) -> None:
    words = f"train labels.csv {SMALL} --steps 8"
    said = command(*words.split()).out
    assert "48 images with up to 2 labels each (multilabel): 30 to train, 9 to validate, 9 to test." in said
    assert "Test mean average precision" in said
    assert "A logistic regression a label on the same frozen features has" in said
    record = record_of()
    assert record.spec.task == "multilabel"
    assert record.test.more["map"] > 0.8  # colours tell them apart
    assert len(record.decision.thresholds) == 2
    assert record.tested_calibration.nll == record.test.nll
    assert "This call was done before" in command(*words.split()).out

    rows = json.loads(command(*f"predict {LATEST} images/class_0/00.png --format json".split()).out)
    assert list(rows[0])[:4] == ["file", "labels", "class", "probability"]
    assert "warm" in rows[0]["labels"]
    command(*f"export {LATEST} --format onnx --output model.onnx".split())
    again = json.loads(command(*["predict", "model.onnx", "images/class_0/00.png", "--format", "json"]).out)
    assert again[0]["labels"] == rows[0]["labels"]
    assert again[0]["probability"] == pytest.approx(rows[0]["probability"], abs=1e-4)
    model = load(LATEST)
    assert model.predict_proba(["images/class_0/00.png"])[0, 0] == pytest.approx(rows[0]["probability"], abs=1e-4)
    command(*f"report {LATEST} --output page".split())
    card = Path("page/card.md").read_text()
    assert "| warm |" in card
    assert "mean average precision" in card
    assert (
        "one class an image so far" in command(*f"export {LATEST} --format web --output page.html".split(), code=2).err
    )


def test_numbers_from_a_table_to_a_prediction(command) -> None:
    said = command(*f"train numbers.csv {SMALL} --steps 8".split()).out
    assert "48 images with a number for heat (regression)" in said
    assert "Test mean absolute error" in said
    record = record_of()
    assert record.test.more["mae"] < 5
    assert record.decision.center[0] == pytest.approx(10, abs=2)
    assert 0.8 in record.tested_calibration.covered
    (row,) = json.loads(command(*f"predict {LATEST} images/class_2/00.png --format json --coverage 0.8".split()).out)
    assert row["heat_low"] < row["heat"] < row["heat_high"]
    command(*f"export {LATEST} --format safetensors --output model.safetensors".split())
    (prediction,) = load("model.safetensors").predict("images/class_2/00.png", coverage=0.8)
    assert prediction.numbers["heat"] == pytest.approx(
        [row[name] for name in ("heat", "heat_low", "heat_high")], rel=1e-3
    )
    with pytest.raises(UserError, match="predicts numbers"):
        load(LATEST).predict_proba(["images/class_2/00.png"])
    assert "shares of images" in command(*f"predict {LATEST} images --coverage 0.999".split(), code=2).err
    command(*f"report {LATEST} --output page".split())
    assert "| heat |" in Path("page/card.md").read_text()
    assert "mae" in command("runs").out
    command(*f"train numbers.csv {SMALL} --method linear".split())
    assert "reports compare runs of one class an image" in command("report", "peft-vit-runs", code=2).err

    spec = record.spec.model_copy(update={"study": "again"})
    whole = run_one(spec)
    checkpoints, steps = Checkpoints(Path("again"), 600), []
    with pytest.raises(Interrupted):
        run_one(spec, checkpoints=checkpoints, on_progress=steps.append, should_stop=lambda: len(steps) >= 4)
    resumed = run_one(spec, checkpoints=checkpoints)
    assert resumed.record.adapter_sha256 == whole.record.adapter_sha256  # to the bit
    assert resumed.record.predictions == whole.record.predictions


@pytest.mark.parametrize("table", ["labels", "numbers"])
@pytest.mark.parametrize("method", ["linear", "adalora", "qa_lora"])
def test_every_kind_of_method_learns_them(command, table, method) -> None:
    command(*f"train {table}.csv {SMALL} --method {method}{'' if method == 'linear' else ' --steps 24'}".split())
    record = record_of()
    assert record.status == "done"
    assert record.test.more
    command(*f"train {table}.csv {SMALL} --smoke --method {method}".split())
    smoke = record_of()
    assert (smoke.spec.smoke, smoke.spec.task) == (True, record.spec.task)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"train labels.csv {SMALL} --shots 3", "needs one class an image, and these have multilabel labels"),
        ("tune labels.csv", "tune compares models of one class an image; use train"),
        (f"train labels.csv {SMALL} --task regression", "expected a number in column cold, got ''"),
        (f"train images {SMALL} --task multilabel", "has a folder for each class, which is not multilabel"),
    ],
)
def test_what_is_not_there_yet_is_refused_in_one_line(command, words, message) -> None:
    assert message in command(*words.split(), code=2).err


STUDY = """
name: several
seeds: [0{seeds}]
backbone: {{model: test_vit, weights: random}}
data: {{dataset: csv, path: labels.csv, image_size: 32, validation_images: 9, test_images: 9}}
measures: {measures}
experiments:
  - {{name: lora, method: lora, lora: {{rank: 2}}, training: {{learning_rate: 0.001, steps: 4, {training}}}}}
"""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": ", 1"}, "experiments: a study of several runs is there for one class an image"),
        ({"measures": "{removal_images: 4}"}, "measures.removal_images: is there for one class an image"),
        ({"training": "metric: map, label_smoothing: 0.1"}, "training.label_smoothing: is there for one class"),
        ({"training": "metric: accuracy"}, "experiments[0].training.metric: accuracy is not a metric of multilabel"),
    ],
)
def test_a_study_of_one_run_may_learn_them(command, changes, message) -> None:
    settings = {"seeds": "", "measures": "{logits: true}", "training": "metric: auto"}
    Path("study.yaml").write_text(STUDY.format(**settings | changes))
    assert message in command("plan", "study.yaml", code=2).err
