"""`train` on so few images that none is set aside to validate: trainings on folds tell how good the model is."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from peft_vit.base.statistics import TemperaturePrior, fit_temperature
from peft_vit.data import load_data
from peft_vit.deploy.export import logits_by_type
from peft_vit.fit.calls import TrainRun, train_runs
from peft_vit.fit.fit import FitFile
from peft_vit.lab.report import build_report
from peft_vit.runs.measures.held_out import read_run_neighbours
from peft_vit.runs.records.storage import read_record, single_run

pytestmark = pytest.mark.part("runner")
ASKED = "--weights random --model test_vit --threads 1 --precision fp32 --compute float --device cpu"


@pytest.fixture
def trained(images, tmp_path, command, monkeypatch, in_this_process, cache):
    """Train with some options, again and again; image sizes are 32 and 64 px unless one is asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("peft_vit.fit.fit.FEWEST_VALIDATION", 30)
    monkeypatch.setattr("peft_vit.fit.sizes.sizes_to_try", lambda _: [32, 64])

    def call(options: str = "", source: str | Path = images, code: int = 0) -> str:
        return command("train", source, *f"{ASKED} {options}".split(), code=code).out

    return call


def only_call() -> tuple[TrainRun, FitFile]:
    """Return the only call, and what it has decided."""
    (run,) = train_runs(Path("peft-vit-runs"))
    return run, FitFile.read(run.folder / "fit.json")


def folds_of(run: TrainRun, name: str, size: int) -> list[Path]:
    """Return the folders of an experiment's runs on folds."""
    return sorted(file.parent for file in run.folder.glob(f"folds-test_vit-{size}/{name}/*/record.json"))


def pooled(folders: list[Path]):
    """Return what runs on folds say of their test images: logits, labels, positions."""
    parts = [read_record(folder / "record.json").predictions for folder in folders]
    return (np.concatenate([getattr(own, name) for own in parts]) for name in ("logits", "labels", "images"))


def better(said: str, unit: str) -> bool:
    """Return whether the training is said to be expected to be better than the linear probe."""
    return re.search(rf" is expected to be [\d.]+ {unit} (better|worse) than the linear probe\n", said)[1] == "better"


@pytest.mark.usefixtures("no_page")
def test_folds_tell_how_far_a_model_can_be_believed_and_if_a_linear_probe_is_better(trained, tmp_path) -> None:
    options = "--image-size 32 --steps 20 --learning-rate 1e-2"
    said = trained(options)
    run, kept = only_call()
    main = read_record(run.folder / "lora/seed_0/record.json")
    assert main.split_sizes == {"train": 38, "validation": 0, "test": 10}
    assert "  38 to train, 10 to test (a fifth of them)" in said
    assert "  to train: LoRA, 32 px, 20 steps, about " in said
    trainings, probes = folds_of(run, "lora", 32), folds_of(run, "linear", 32)
    assert len(trainings) == len(probes) == 3
    assert {len(read_record(fold / "record.json").steps) for fold in trainings} == {20}  # 0.8 times, but for so few
    right = {}
    for name, folders in (("lora", trainings), ("linear", probes)):
        logits, labels, images = pooled(folders)
        assert len(set(images)) == len(images) >= 3 * 38 // 5  # each once, and none that tests
        assert set(images) <= set(load_data(main.spec.data, 0).train.positions)
        right[name] = 100 * (logits.argmax(1) == labels).mean()
    both = f"LoRA, 32 px: {right['lora']:.1f}%; linear probe, 32 px: {right['linear']:.1f}%"
    assert f"  on images of 3 folds, which training has left out: {both}\n" in said
    delivered = read_record(single_run(run.folder) / "record.json")
    name = "lora" if better(said, "points") else "linear"
    assert delivered.spec.experiment.method == name
    assert (kept.decisions.delivered[0].method, kept.decisions.first[0].method) == (name, "lora")
    assert kept.decisions.delivered in kept.decisions.trained

    logits, labels, images = pooled(folds_of(run, name, 32))
    temperature = fit_temperature(logits, labels, TemperaturePrior(1.5, 0.6), images)
    assert delivered.calibrated.temperature == pytest.approx(temperature, rel=1e-6)
    assert (delivered.calibrated.images, delivered.unlike.images) == (len(images), 38)
    z = read_run_neighbours(single_run(run.folder), delivered).codes.astype(float) / 16
    apart = ((z[:, None] - z[None]) ** 2).mean(2) ** 0.5 + np.diag(np.full(38, np.inf))  # (38, 38)
    assert delivered.unlike.threshold == pytest.approx(np.sort(apart.min(1))[37], rel=1e-5)  # ceil(39 * 0.95) - 1
    page = build_report(run.folder, tmp_path / "again")  # of the model, as if there were no folds
    assert page.markdown.name == "card.md"
    assert "was done before" in trained(options)


def test_probes_of_numbers_are_said_and_compared_by_their_errors(trained, images) -> None:
    files = sorted(images.rglob("*.png"))
    rng = np.random.default_rng(0)
    numbers = [round(0.1 * int(file.parent.name[-1]) + 0.01 * rng.normal(), 4) for file in files]
    rows = "".join(f"{file},{own}\n" for file, own in zip(files, numbers, strict=True))
    Path("numbers.csv").write_text(f"path,heat\n{rows}")
    said = trained("--steps 20 --learning-rate 1e-3", "numbers.csv")
    run, kept = only_call()
    record = run.record()
    deviation = np.std([numbers[place] for place in load_data(record.spec.data, 0).train.positions])
    assert list(kept.decisions.sizes) == ["test_vit-32", "test_vit-64"]
    for place, score in kept.decisions.sizes.items():
        tried = re.search(rf"  linear probe at {place[-2:]} px: (\S+) mean error", said)
        assert float(tried[1]) == pytest.approx(-score * deviation, rel=0.05)
        assert score < 0
    assert record.spec.experiment.method == ("lora" if better(said, "% of a standard deviation") else "linear")


def test_a_linear_probe_that_is_better_is_delivered_with_folds_of_its_own(trained, command, monkeypatch) -> None:
    options = "--steps 20 --learning-rate 1e-6"
    monkeypatch.setattr("peft_vit.fit.train.worth_training", lambda *_: False)
    said = trained(options)
    run, kept = only_call()
    record, size = run.record(), kept.decisions.delivered[0].image_size
    assert f"The model is the linear probe at {size} px." in said
    place = f"{run.folder.name}-probe-{size}px/linear/seed_0"
    assert (run.folder / "model.txt").read_text() == f"{place}\n"
    assert record == read_record(run.folder / place / "record.json")
    assert (record.spec.experiment.method, record.spec.experiment.training.probe_l2) == ("linear", None)
    assert "It is a linear probe" in (run.folder / "report/card.md").read_text()
    logits, labels, images = pooled(folds_of(run, "linear", size))
    temperature = fit_temperature(logits, labels, TemperaturePrior(1.5, 0.6), images)
    assert record.calibrated.temperature == pytest.approx(temperature, rel=1e-6)
    assert {"look", "sizes", "first", "folds", "final"} <= kept.seconds.keys()
    assert f"\nTime: {run.seconds():.0f} s.\n" in said
    assert run.seconds() == pytest.approx(sum(kept.seconds.values()))
    command("runs", "--output", "runs.json")
    (row,) = json.loads(Path("runs.json").read_text())
    assert row["minutes"] == run.seconds() / 60
    assert row["method"] == "linear probe"
    assert "was done before" in trained(options)

    (run.folder / "model.txt").unlink()  # as if the call had ended before the probe
    shutil.rmtree(run.folder / place)
    kept.decisions.delivered = None
    (run.folder / "fit.json").write_text(kept.model_dump_json())
    said = trained(options)
    assert f"Continues from step 20 in {run.folder}" in said or f"Continues in {run.folder}" in said
    assert f"The model is the linear probe at {size} px." in said
    assert only_call()[0].record().calibrated == record.calibrated


@pytest.mark.usefixtures("no_page")
def test_a_call_that_ends_within_its_folds_goes_on_there(trained, command, monkeypatch) -> None:
    options = "--method linear --image-size 32"

    def press(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("peft_vit.fit.train.know_by_folds", press)
        trained(options, code=130)
    run, _ = only_call()
    assert not run.is_done
    assert "trained, but not known yet how good it is" in command("runs").out
    assert run.record().calibrated is None
    before = run.record().test
    said = trained(options)
    assert f"Continues in {run.folder}" in said
    run, _ = only_call()
    assert run.is_done
    assert run.record().test == before  # temperature moves no accuracy
    assert run.record().calibrated.images >= 3 * 38 // 5


def test_what_bits_lose_is_measured_on_images_that_folds_left_out(trained, command) -> None:
    trained("--method linear --image-size 32")
    run, _ = only_call()
    words = f"export {run.folder} --output small.safetensors --bits 2 --rounding nearest --overwrite".split()
    said = command(*words).out
    folds = folds_of(run, "linear", 32)
    logits, labels, _ = pooled(folds)
    before = (logits.argmax(1) == labels).mean()
    rounded = [logits_by_type(folder, ["int2"], "nearest")["int2"] for folder in folds]
    after = (np.concatenate(rounded).argmax(1) == labels).mean()
    assert f"accuracy {100 * before:.2f} % before and {100 * after:.2f} % after" in said
    way = "lost" if before >= after else "gained"
    lost = f"It {way} {100 * abs(before - after):.2f} points of accuracy on {len(labels)} held-out images"
    assert lost in said
    assert "38 training images, float32:" in said
    shutil.rmtree(run.folder / "folds-test_vit-32")
    said = command(*words).out
    assert "The loss isn't measured: there are no validation images, and on training images it would not show." in said
    assert "It lost" not in said
    assert "accuracy" not in said


@pytest.mark.parametrize(("images_each", "options"), [(2, ""), (3, ""), (4, "--method linear")])
def test_two_images_of_a_class_make_a_linear_probe(trained, images, tmp_path, images_each, options) -> None:
    for file in sorted(images.rglob("*.png")):
        if int(file.stem) < images_each:
            (tmp_path / "few" / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / "few" / file.parent.name)
    said = trained(options, "few")
    record = only_call()[0].record()
    few = "  a class has fewer than 3 images to learn from, so it is a linear probe; add images\n"
    assert (few in said) == (not options)
    assert (record.spec.experiment.method, record.split_sizes["test"]) == ("linear", 3)
    assert "failed" not in said
    of_folds = 0 if record.on_folds is None else len(record.on_folds.images)
    assert bool(of_folds) == (images_each > 2)  # of one image to learn from none can be left out
    assert ("images that trainings like it left out in turn; 3 images tested it alone" in said) == (of_folds > 3)
    assert of_folds > 3 or not options
