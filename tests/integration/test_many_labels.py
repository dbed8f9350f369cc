"""From a table of several labels, or of numbers, to a model, its page and a prediction."""

import json
import math
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_models  # noqa: F401 - which registers shallow_vit
from sklearn.metrics import f1_score

from peft_vit import load, load_results
from peft_vit.base.errors import UserError
from peft_vit.base.statistics import error_scale
from peft_vit.core.training import Checkpoints, Interrupted
from peft_vit.fit.calls import train_runs
from peft_vit.runs.execute import run_one
from peft_vit.runs.records.scan import read_records
from peft_vit.runs.records.storage import RECORD_FILE, read_record, single_run

pytestmark = [pytest.mark.part("runner"), pytest.mark.usefixtures("cache")]
SMALL = "--weights random --model shallow_vit --threads 1 --precision fp32 --compute float --device cpu --image-size 32"
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


@pytest.mark.usefixtures("no_page")
def test_several_labels_from_a_table_to_a_prediction(command) -> None:
    words = f"train labels.csv {SMALL.replace('shallow', 'test')} --steps 8"  # a process of its own knows timm's
    said = command(*words.split()).out
    assert "  48 images with up to 2 labels each (multilabel): warm 32, cold " in said
    assert "  31 to train, 7 to validate, 10 to test (a fifth of them)" in said
    assert "Test mean average precision" in said
    assert "A linear probe has" in said
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


@pytest.mark.usefixtures("in_this_process", "no_page")
def test_numbers_from_a_table_to_a_prediction(command) -> None:
    said = command(*f"train numbers.csv {SMALL} --steps 8".split()).out
    assert "48 images with a number for heat (regression)" in said
    assert "Test mean absolute error" in said
    record = record_of()
    sent = pickle.loads(pickle.dumps(record))  # as by a process of its own
    assert sent.model_dump_json() == record.model_dump_json()
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
    assert "has thresholds of these shares" in command(*f"predict {LATEST} images --coverage 99.9".split(), code=2).err
    command(*f"report {LATEST} --output page".split())
    assert "| heat |" in Path("page/card.md").read_text()
    assert "mae" in command("runs").out


@pytest.mark.parametrize("table", ["labels", "numbers"])
@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("method", ["linear", "qa_linear", "adalora", "qa_lora", "lora --compute int8"])
def test_every_kind_of_method_learns_them(command, request, table, method) -> None:
    steps, small = ("" if method.endswith("linear") else " --steps 24"), SMALL.replace("--compute float ", "")
    small = small if "int8" in method else SMALL
    command(*f"train {table}.csv {small} --method {method}{steps}".split())
    record = record_of()
    assert record.status == "done"
    assert record.test.more
    assert (record.provenance.integer_bits is not None) == ("int8" in method)
    request.getfixturevalue("no_page")  # that of the whole run is written
    command(*f"train {table}.csv {small} --smoke --method {method}".split())
    smoke = record_of()
    assert (smoke.spec.smoke, smoke.spec.task) == (True, record.spec.task)


@pytest.mark.parametrize("table", ["labels", "numbers"])
@pytest.mark.usefixtures("in_this_process", "no_page")
def test_memory_can_be_saved_and_a_run_goes_on_to_the_bit(command, table) -> None:
    said = f"train {table}.csv {SMALL} --steps 24 --method adalora"
    command(*said.split())
    whole = record_of()
    command(*f"{said} --micro-batch-size 8 --activation-checkpointing blocks --output saved".split())
    saved = record_of(Path("saved/latest"))
    assert saved.test.nll == pytest.approx(whole.test.nll, rel=1e-3)  # the same steps in other parts

    spec = saved.spec.model_copy(update={"study": "again"})
    done = run_one(spec)
    checkpoints, steps = Checkpoints(Path("again"), 600), []
    with pytest.raises(Interrupted):
        run_one(spec, checkpoints=checkpoints, on_progress=steps.append, should_stop=lambda: len(steps) >= 4)
    resumed = run_one(spec, checkpoints=checkpoints)
    assert resumed.record.adapter_sha256 == done.record.adapter_sha256
    assert resumed.record.predictions == done.record.predictions
    assert resumed.record.decision == done.record.decision


@pytest.mark.usefixtures("in_this_process", "no_page")
def test_what_decides_the_loss_and_weights_of_classes_can_be_chosen(command) -> None:
    said = command(
        *f"train labels.csv {SMALL} --steps 4 --metric f1_macro --loss asymmetric --class-weights effective".split()
    ).out
    assert re.search(r"class weights in the loss, effective: from '(warm|cold)' [\d.]+ to '(warm|cold)' [\d.]+", said)
    record = record_of()
    of_test = record.test.more["f1_macro"]
    assert f"Test macro F1 {100 * of_test:.1f} %" in said
    assert record.spec.experiment.training.metric == "f1_macro"
    assert len(record.probe_test.thresholds) == 2
    command(*f"report {LATEST} --output page".split())
    card = Path("page/card.md").read_text()
    assert "effective, in the loss" in card
    assert "asymmetric" in card

    said = command(*f"train numbers.csv {SMALL} --steps 4 --metric spearman --loss quantile".split()).out
    assert "Test Spearman's correlation" in said
    record = record_of()
    assert record.spec.experiment.training.metric == "spearman"
    said = command("train", "images", *f"{SMALL} --steps 4 --class-weights balanced".split()).out
    assert re.search(r"class weights in the loss, balanced: from 'class_\d' 1.* to 'class_\d'", said)


def by_fold(folder):
    """Return what the runs on folds of a call say of their test images: labels, what is predicted, and of probes."""
    records = [read_record(file) for file in sorted(folder.glob("folds-*/lora/*/record.json"))]
    columns = [[own.predictions.labels, own.predictions.logits, own.probe_test.predicted] for own in records]
    arrays = [np.concatenate([np.array(own[k], dtype=float) for own in columns]) for k in range(3)]
    return records, *arrays


@pytest.mark.usefixtures("in_this_process", "no_page")
def test_folds_tell_what_a_model_of_few_labels_is_worth(command, monkeypatch) -> None:
    monkeypatch.setattr("peft_vit.fit.fit.FEWEST_VALIDATION", 30)
    said = command(*f"train numbers.csv {SMALL} --steps 10".split()).out
    assert "  38 to train, 10 to test (a fifth of them)" in said
    (run,) = train_runs(Path("peft-vit-runs"))
    folds, truth, outputs, of_probes = by_fold(run.folder)
    assert len(truth) >= 3 * 7  # of three folds of five
    means = np.repeat([fold.decision.center for fold in folds], [len(fold.predictions.images) for fold in folds], 0)
    spreads = np.repeat([fold.decision.spread for fold in folds], [len(fold.predictions.images) for fold in folds], 0)
    predicted = means + spreads * outputs  # each fold has its own mean and standard deviation
    errors = np.abs(predicted - truth)
    record = read_record(run.folder / "lora/seed_0/record.json")
    _, quotients = error_scale(predicted[:, 0], truth[:, 0])
    rank = math.ceil((len(truth) + 1) * 0.9) - 1
    assert record.decision.threshold(0.9)[0] == pytest.approx(np.sort(quotients)[rank], rel=1e-3)
    assert record.decision.images == len(truth)
    assert 0.9 in record.tested_calibration.covered
    both = (
        f"LoRA, 32 px: {errors.mean():.3g} mean error; linear probe, 32 px: {np.abs(of_probes - truth).mean():.3g} mean"
    )
    assert f"on images of 3 folds, which training has left out: {both}" in said

    said = command(*f"train labels.csv {SMALL} --steps 10 --metric f1_micro".split()).out
    run = train_runs(Path("peft-vit-runs"))[-1]
    folds, truth, outputs, _ = by_fold(run.folder)
    assert all((np.nansum(np.array(fold.predictions.labels, float), 0) > 0).all() for fold in folds)  # stratified
    record = read_record(run.folder / "lora/seed_0/record.json")
    decision, known = record.decision, ~np.isnan(truth)
    scores = 1 / (1 + np.exp(-outputs / decision.temperature))
    for k, threshold in enumerate(decision.thresholds):
        own, y = scores[known[:, k], k], truth[known[:, k], k]
        assert f1_score(y, own >= threshold) == pytest.approx(max(f1_score(y, own >= level) for level in own))
    told = np.array(record.predictions.predicted) >= decision.thresholds
    of_test = np.array(record.predictions.labels, float)
    there = ~np.isnan(of_test)
    assert record.test.more["f1_micro"] == pytest.approx(f1_score(of_test[there], told[there]))
    assert "was done before" in command(*f"train labels.csv {SMALL} --steps 10 --metric f1_micro".split()).out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"train labels.csv {SMALL} --shots 3", "is there for one class an image, and these have multilabel labels"),
        (f"train labels.csv {SMALL} --task regression", "expected a number in column cold, got ''"),
        (f"train images {SMALL} --task multilabel", "has a folder for each class, which is not multilabel"),
        (f"train labels.csv {SMALL} --metric mae", "--metric: mae is not a metric of multilabel; give map or auroc or"),
        (
            f"train images {SMALL} --metric f1_macro",
            "--metric: f1_macro is not a metric of classification; give accuracy",
        ),
        (f"train labels.csv {SMALL} --loss huber", "--loss: huber is not a loss of multilabel; give"),
        (
            f"train numbers.csv {SMALL} --class-weights balanced",
            "--class-weights: has no effect on numbers, which have",
        ),
        (f"train numbers.csv {SMALL} --method linear --loss mse", "--loss: has no effect with --method linear"),
    ],
)
def test_what_is_not_there_yet_is_refused_in_one_line(command, words, message) -> None:
    assert message in command(*words.split(), code=2).err


def test_images_that_are_too_few_for_a_test_are_refused(command) -> None:
    Path("few.csv").write_text("".join(Path("numbers.csv").read_text().splitlines(keepends=True)[:8]))
    assert "7 images are too few: a fifth of them tests, at least 2" in command("train", "few.csv", code=2).err


STUDY = """
name: several
seeds: [0{seeds}]
threads: 1
device: cpu
precision: fp32
backbone: {{model: shallow_vit, weights: random}}
data: {{dataset: csv, path: labels.csv, image_size: 32, validation_images: 9, test_images: 9}}
measures: {measures}
experiments:
  - {{name: lora, method: lora, lora: {{rank: 2}}, training: {{learning_rate: 0.001, steps: 4, {training}}}}}
"""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measures": "{removal_images: 4}"}, "measures.removal_images: is there for one class an image"),
        ({"training": "metric: map, label_smoothing: 0.1"}, "training.label_smoothing: is there for one class"),
        ({"training": "metric: accuracy"}, "experiments[0].training.metric: accuracy is not a metric of multilabel"),
        (
            {"training": "metric: auto, augmentation: [mixup, cutmix]", "table": "numbers"},
            "[0].training.augmentation: cutmix makes images whose numbers nobody can tell; give mixup or none",
        ),
    ],
)
def test_what_a_study_of_them_can_not_do_is_refused(command, changes, message) -> None:
    settings = {"seeds": "", "measures": "{logits: true}", "training": "metric: auto", "table": "labels"} | changes
    Path("study.yaml").write_text(STUDY.format(**settings).replace("labels.csv", f"{settings['table']}.csv"))
    assert message in command("plan", "study.yaml", code=2).err


@pytest.mark.parametrize(("table", "metric", "unit"), [("labels", "map", "points"), ("numbers", "mae", "%")])
@pytest.mark.usefixtures("in_this_process")
def test_a_study_of_several_runs_compares_them_in_the_metrics_unit(command, table, metric, unit) -> None:
    settings = {"seeds": ", 1, 2", "measures": "{}", "training": f"metric: {metric}"}
    probe = f"  - {{name: probe, method: linear, training: {{metric: {metric}}}}}\n"
    text = STUDY.format(**settings) + probe
    Path("study.yaml").write_text(text.replace("labels.csv", f"{table}.csv").replace("images: 9}}", "images: 9}"))
    command("run", "study.yaml", "--output", "results")
    records = {read.spec.name: read for read in read_records(Path("results"))}
    assert len(records) == 6

    def score(name: str, seed: int) -> float:
        record = records[f"{name}/seed_{seed}"]
        value = record.test.more[metric]
        return value if metric == "map" else -value / np.std([row[0] for row in record.predictions.labels])

    differences = [score("lora", seed) - score("probe", seed) for seed in range(3)]
    found = load_results("results").comparisons.set_index(["experiment", "reference"])
    assert found.loc[("lora", "probe"), "difference"] == pytest.approx(np.mean(differences))
    command("report", "results", "--output", "page")
    summary = Path("page/analysis_summary.md").read_text()
    words = {"map": "mean average precision", "mae": "mean absolute error"}[metric]
    assert f"Test {words} by method" in summary
    assert f"difference ({unit}" in summary
    said = command("recommend", "results", "--margin", "1").out
    assert f"loses less than {'1 point' if unit == 'points' else '1 % of a standard deviation'} of test {words}" in said
