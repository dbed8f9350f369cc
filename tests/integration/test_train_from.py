"""`train --from`: a model of `train` or `tune`, its test images and its settings are where another call starts."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from peft_vit.core.adapters.adapter_file import read_adapter_file
from peft_vit.data import ImagesFile
from peft_vit.deploy.restore import restore_run
from peft_vit.fit.fit import FitFile
from peft_vit.runs.records.storage import RECORD_FILE, read_record, single_run

pytestmark = [pytest.mark.part("runner"), pytest.mark.usefixtures("cache", "in_this_process")]

SHORT = ("--steps", "12", "--threads", "1", "--minutes", "5")
COLORS = {"cat": (200, 40, 40), "dog": (40, 200, 40), "elk": (40, 40, 200)}


def add(folder: Path, name: str, images: range) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    for i in images:
        noise = np.random.default_rng([i, len(name), ord(name[0])]).integers(-40, 40, (24, 24, 3))
        Image.fromarray(np.uint8(np.clip(np.array(COLORS[name]) + noise, 0, 255))).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("from") / "photos"
    for name in ("cat", "dog"):
        add(folder, name, range(15))
    return folder


@pytest.fixture
def first(photos, weights, tmp_path, command) -> Path:
    """Return the folder of a call of `train`, after which images and a class have come."""
    images = tmp_path / "photos"
    shutil.copytree(photos, images)
    model = ("--model", "test_vit", "--weights", weights, "--image-size", "32", "--augment", "none")
    command("train", images, *model, *SHORT, "--output", tmp_path / "out")
    add(images, "cat", range(15, 25))
    add(images, "elk", range(15))
    return next((tmp_path / "out").glob("0001-*"))


def correct_a_test_label(first: Path, images: Path) -> float:
    """Return how many percent of its test images a model was right on by the labels of then."""
    wrong = next(name for name in ImagesFile.read(first / "images.json").sealed if name.startswith("dog/"))
    (images / wrong).rename(images / "cat" / "corrected.png")
    found = read_record(single_run(first) / RECORD_FILE).predictions
    return 100 * np.mean([a == b for a, b in zip(found.predicted, found.labels, strict=True)])


def test_after_a_test_label_is_corrected_the_earlier_model_is_counted_by_both(
    first, weights, tmp_path, command
) -> None:
    images = tmp_path / "photos"
    options = ("--method", "linear", "--model", "test_vit", "--weights", weights, "--image-size", "32")
    call = ("train", images, *options, "--minutes", "5", "--threads", "1", "--output", tmp_path / "out")
    said = command(*call).out
    assert "changed since" not in said  # there are more images, of the same labels
    assert "the last call's was" not in said
    assert "the last call's was accuracy;" in command(*call, "--metric", "balanced_accuracy", code=0).out
    shutil.rmtree(next((tmp_path / "out").glob("0003-*")))
    shutil.rmtree(next((tmp_path / "out").glob("0002-*")))
    then = correct_a_test_label(first, images)
    said = command(*call).out
    assert f"1 test label was changed since {first}" in said
    assert f"Of 6 test images its model is right on {then:.1f} % by the labels of then, " in said
    assert "changed since" not in command(*call, "--seed", "1").out  # its test images are others


def test_a_model_goes_on_with_more_images_and_a_class(first, tmp_path, command) -> None:
    then = correct_a_test_label(first, tmp_path / "photos")
    call = (
        "train",
        tmp_path / "photos",
        "--from",
        first,
        *SHORT,
        "--learning-rate",
        "1e-6",
        "--output",
        tmp_path / "out",
    )
    said = command(*call)
    (second,) = (tmp_path / "out").glob("0002-*")
    assert "The 6 images that tested 0001-" in said.out
    assert f"right on {then:.1f} % by the labels of then" in said.out
    earlier, images = (ImagesFile.read(run / "images.json") for run in (first, second))
    assert earlier.tested <= images.tested
    assert not images.tested & (set(earlier.digests.values()) - earlier.tested)
    run, start = single_run(second), read_adapter_file(single_run(first) / "adapter.safetensors")
    record = read_record(run / RECORD_FILE)
    assert (record.class_names, record.split_sizes["validation"]) == (["cat", "dog", "elk"], 0)
    assert record.spec.data.image_size == 32
    assert record.spec.experiment.lora.start == str(single_run(first) / "adapter.safetensors")
    assert record.probe_test is None  # what it starts from is no linear probe
    assert record.rank_history[0].ranks == start.ranks
    trained = load_file(run / "adapter.safetensors")
    for name, tensor in start.tensors.items():  # so slowly it hardly moves; a probe is elsewhere
        assert trained[name][: len(tensor)].sub(tensor).abs().max() < 1e-3
    assert restore_run(second).record.status == "done"
    assert "This call was done before" in command(*call).out


@pytest.mark.slow  # it tunes
def test_the_model_of_tune_goes_on(photos, weights, tmp_path, command, monkeypatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt  # its first model is written

    monkeypatch.setattr("peft_vit.fit.costs.MOST_STEPS", 24)
    monkeypatch.setattr("peft_vit.fit.tune.know_by_folds", stop)
    images, tuned = tmp_path / "photos", tmp_path / "tuned"
    shutil.copytree(photos, images)
    model = ("--model", "test_vit", "--weights", weights, "--image-size", "32", "--augment", "none", "--threads", "1")
    command("tune", images, *model, "--minutes", "8", "--output", tuned, code=130)
    add(images, "elk", range(15))
    said = command("train", images, "--from", tuned, *SHORT, "--output", tmp_path / "out")
    assert "The 6 images that tested tuned: " in said.out
    (run,) = (tmp_path / "out").glob("0001-*")
    earlier, later = (ImagesFile.read(folder / "images.json") for folder in (tuned, run))
    assert earlier.tested < later.tested
    assert not later.tested & (set(earlier.digests.values()) - earlier.tested)
    before, after = (read_record(single_run(folder) / RECORD_FILE) for folder in (tuned, run))
    assert after.class_names == ["cat", "dog", "elk"]
    assert after.spec.experiment.method == before.spec.experiment.method
    assert after.spec.backbone == before.spec.backbone
    if before.spec.experiment.method == "lora":
        assert after.spec.experiment.lora.start == str(tuned / "model" / "adapter.safetensors")


def without_dogs(first: Path, images: Path) -> None:
    shutil.rmtree(images / "dog")


def of_earlier_version(first: Path, images: Path) -> None:
    content = json.loads((first / "images.json").read_text())
    (first / "images.json").write_text(json.dumps(content | {"digests": {}}))


def with_groups(first: Path, images: Path) -> None:
    content = json.loads((first / "request.json").read_text())
    content["request"]["group"] = "folder"
    (first / "request.json").write_text(json.dumps(content))


def of_a_tuning_without_a_model(first: Path, images: Path) -> None:
    (first / "tune.json").write_text(FitFile().model_dump_json())


def test_what_can_not_be_started_from_is_refused_in_a_line(first, tmp_path, command) -> None:
    images = tmp_path / "photos"
    refused = (
        (("--from", first, "--model", "other"), None, "--model: other is asked for"),
        (("--from", first, "--image-size", "48"), None, "--image-size: 48 is asked for"),
        (("--from", first, "--method", "linear"), None, "--method: linear is asked for"),
        (("--from", first, "--method", "adalora"), None, "--from: has no effect with --method adalora"),
        (("--from", first, "--rank", "4"), None, "--from: has no effect with --rank"),
        (("--from", single_run(first)), None, "is not the folder of a call of `train`"),
        (("--from", tmp_path / "model.onnx"), None, "is not the folder of a call of `train`"),
        (("--from", first), with_groups, "was split with --group"),
        (("--from", first), of_earlier_version, "is of an earlier version"),
        (("--from", first), without_dogs, "knows class 'dog', of which no image is here"),
        (("--from", first), of_a_tuning_without_a_model, "--from: is not done"),
    )
    kept = {name: (first / name).read_text() for name in ("images.json", "request.json")}
    for options, change, line in refused:
        if change is not None:
            change(first, images)
        said = command("train", images, *options, "--output", tmp_path / "refused", code=2)
        assert line in said.err, line
        assert len(said.err.strip().splitlines()) == 1
        for name, text in kept.items():
            (first / name).write_text(text)
    assert not (tmp_path / "refused").exists()


def test_where_no_training_from_a_run_fits_no_probe_takes_its_place(first, tmp_path, command) -> None:
    options = ("--from", first, "--minutes", "0.1", "--threads", "1", "--output", tmp_path / "out")
    said = command("train", tmp_path / "photos", *map(str, options), code=2)
    assert re.search(r"--minutes: no training from .* fits; give about [1-9]\d*, or", said.err)
    assert not list((tmp_path / "out").glob("0002-*"))
