"""`train` on so few images that none is set aside to validate: trainings on folds tell how good the model is."""

import re
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from peft_vit.base.statistics import TemperaturePrior, fit_temperature
from peft_vit.core.tasks import metric_of
from peft_vit.data import load_data
from peft_vit.deploy.post_training import logits_by_type
from peft_vit.fit.calls import SizesFile, train_runs
from peft_vit.lab.report import build_report
from peft_vit.runs.measures.held_out import read_run_neighbours
from peft_vit.runs.records.storage import read_record, single_run

pytestmark = pytest.mark.part("runner")
ASKED = "--weights random --model test_vit --threads 1 --precision fp32 --compute float --device cpu"


@pytest.fixture
def trained(images, tmp_path, command, monkeypatch, in_this_process, cache):
    """Train with some options, again and again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("peft_vit.fit.fit.FEWEST_VALIDATION", 30)

    def call(options: str = "", source: str | Path = images, code: int = 0) -> str:
        return command("train", source, *f"{ASKED} {options}".split(), code=code).out

    return call


def rows_of(study: Path):
    """Return what the runs of a study on folds say of their test images: logits, labels, positions, hits of probes."""
    records = [read_record(file) for file in sorted(study.rglob("record.json"))]
    parts = [
        (np.array(own.predictions.logits), own.predictions.labels, own.predictions.images, own.probe_test)
        for own in records
    ]
    hits = [[] if probe is None else np.equal(probe.predicted, labels) for _, labels, _, probe in parts]
    return *(np.concatenate([part[k] for part in parts]) for k in range(3)), np.concatenate(hits)


@pytest.mark.usefixtures("no_page")
def test_folds_tell_how_far_a_model_can_be_believed_and_if_a_regression_is_better(trained, tmp_path) -> None:
    said = trained("--image-size 32 --steps 20 --learning-rate 1e-2")
    (run,) = train_runs(Path("peft-vit-runs"))
    main = read_record(run.folder / "lora/seed_0/record.json")
    assert main.split_sizes == {"train": 39, "validation": 0, "test": 9}
    assert "39 to train, 9 to test." in said
    assert "Images of 32 px, 20 steps." in said
    logits, labels, images, hits = rows_of(run.folder / "folds")
    kept = load_data(main.spec.data, 0).train.positions
    assert sorted(images) == sorted(kept)  # each once, and none that tests
    temperature = fit_temperature(logits, labels, TemperaturePrior(1.5, 0.6), images)
    assert main.calibrated.temperature == pytest.approx(temperature, rel=1e-6)
    assert main.calibrated.images == main.unlike.images == 39
    neighbours = read_run_neighbours(run.folder / "lora/seed_0", main)
    z = neighbours.codes.astype(float) / 16
    apart = ((z[:, None] - z[None]) ** 2).mean(2) ** 0.5 + np.diag(np.full(39, np.inf))  # (39, 39)
    assert main.unlike.threshold == pytest.approx(np.sort(apart.min(1))[37], rel=1e-5)  # ceil(40 * 0.95) - 1
    assert 0 <= main.tested_calibration.unlike <= 9
    right = (logits.argmax(1) == labels).mean()
    sizes = run.sizes()
    assert (sizes.signed, sizes.trained) == ({32: pytest.approx(hits.mean())}, pytest.approx(right))
    hits_of_model = round(39 * right)
    assert sizes.upper == pytest.approx(binomtest(hits_of_model, 39).proportion_ci(method="wilson").high)
    better = hits.mean() > sizes.upper
    delivered = read_record(single_run(run.folder) / "record.json")
    assert delivered.spec.experiment.method == ("linear" if better else "lora")
    assert (delivered.tested_calibration.nll < delivered.test.nll) or delivered.calibrated.temperature < 2
    folds = [read_record(file) for file in (run.folder / "folds").rglob("record.json")]
    assert {len(fold.steps) for fold in folds} == {13}
    assert len(folds) == 3  # steps before folds: five from 96 steps on
    assert f"the model {100 * right:.1f}%" in said
    page = build_report(run.folder, tmp_path / "again")  # of the model, as if there were no folds
    assert page.markdown.name == "card.md"
    assert "was done before" in trained("--image-size 32 --steps 20 --learning-rate 1e-2")


def test_errors_are_compared_with_errors() -> None:
    """A positive share of an error's, such as R², lies above every model's error, which is negative here."""
    values, two = {56: 0.5, 112: -5.0}, {56: -0.02, 112: -0.03}
    assert SizesFile(values=values, trained=-0.01, upper=-0.008).better_than(112) is None
    assert SizesFile(values=values, signed=two, trained=-0.01, upper=-0.008).better_than(112) is None
    assert SizesFile(values=values, signed=two, trained=-0.05, upper=-0.025).better_than(112) == 56
    assert SizesFile(values={56: -5.0, 112: 0.5}, signed=two).better_than(112) == 56


def test_regressions_of_numbers_are_said_and_compared_by_their_errors(trained, images, monkeypatch) -> None:
    files = sorted(images.rglob("*.png"))
    rng = np.random.default_rng(0)
    numbers = [round(0.1 * int(file.parent.name[-1]) + 0.01 * rng.normal(), 4) for file in files]
    rows = "".join(f"{file},{own}\n" for file, own in zip(files, numbers, strict=True))
    Path("numbers.csv").write_text(f"path,heat\n{rows}")
    monkeypatch.setattr("peft_vit.fit.train.sizes_to_try", lambda _: [32, 64])
    said = trained("--steps 20 --learning-rate 1e-3", "numbers.csv")
    (run,) = train_runs(Path("peft-vit-runs"))
    main, sizes = read_record(run.folder / "lora/seed_0/record.json"), run.sizes()
    assert list(sizes.values) == [32, 64]
    assert max(sizes.values.values()) > 0 > max(sizes.signed.values())  # R² and minus an error
    own = main.spec.data.image_size
    for size, value in sizes.signed.items():
        tried = re.search(rf"frozen features of {size} px: (\S+) mean error on images left out", said)
        assert size == own or -value == pytest.approx(float(tried[1]), rel=0.01)
        assert f"a regression at {size} px {-value:.3g} mean error" in said
    better = max(sizes.signed.values()) > sizes.upper
    assert run.record().spec.experiment.method == ("linear" if better else "lora")


def test_a_regression_that_is_better_on_folds_is_delivered_with_folds_of_its_own(trained, monkeypatch) -> None:
    options = "--steps 20 --learning-rate 1e-6"
    with monkeypatch.context() as patch:
        patch.setattr(SizesFile, "better_than", lambda *_: 64)
        said = trained(options)
        (run,) = train_runs(Path("peft-vit-runs"))
        record = run.record()
        assert record.spec.experiment.method == "linear"
        assert record.calibrated.images == 39
        assert "The model is the regression at 64 px." in said
        text = (run.folder / "report/card.md").read_text()
        assert "It is a linear probe" in text
        place = run.folder / record.spec.study / "folds"
        logits, labels, images, _ = rows_of(place)
        temperature = fit_temperature(logits, labels, TemperaturePrior(1.5, 0.6), images)
        assert record.calibrated.temperature == pytest.approx(temperature, rel=1e-6)
        for fold in place.rglob("record.json"):
            assert (
                read_record(fold).spec.experiment.training.probe_l2 is None
            )  # the run's was chosen on its test images
        spent = sum(read_record(file).seconds for file in run.folder.rglob("record.json")) + run.sizes().seconds
        assert run.seconds() == pytest.approx(spent)
        assert re.search(r"the rest measures|was done before", trained(options))


@pytest.mark.usefixtures("no_page")
def test_a_call_that_ends_within_its_folds_goes_on_there(trained, monkeypatch) -> None:
    options = "--method linear --image-size 32"

    def press(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("peft_vit.fit.train.known_by_folds", press)
        trained(options, code=130)
    (run,) = train_runs(Path("peft-vit-runs"))
    assert run.folds_left()
    assert run.record().calibrated is None
    done = {file: file.read_bytes() for file in (run.folder / "folds").rglob("record.json")}
    said = trained(options)
    assert f"Training is done in {run.folder}; the rest measures how good it is." in said
    assert {file: file.read_bytes() for file in (run.folder / "folds").rglob("record.json")} == done
    assert not run.folds_left()
    record = run.record()
    value = metric_of(record.spec).of(record.test)
    assert 0 <= value <= 1
    assert record.calibrated.images == 39


def test_what_bits_lose_is_measured_on_images_that_folds_left_out(trained, command) -> None:
    trained("--method linear --image-size 32")
    (run,) = train_runs(Path("peft-vit-runs"))
    words = [
        "export",
        run.folder,
        "--output",
        "small.safetensors",
        "--bits",
        "2",
        "--rounding",
        "nearest",
        "--overwrite",
    ]
    said = command(*words).out
    logits, labels, _, _ = rows_of(run.folder / "folds")
    before = (logits.argmax(1) == labels).mean()
    folds = sorted((run.folder / "folds").rglob("record.json"))
    rounded = [logits_by_type(file.parent, ["int2"], "nearest")["int2"] for file in folds]
    after = (np.concatenate(rounded).argmax(1) == labels).mean()
    assert f"accuracy {100 * before:.2f} % before and {100 * after:.2f} % after" in said
    assert f"Lost: {100 * (before - after) + 0.0:.2f} points of accuracy on 39 held-out images" in said
    assert "39 training images, float32:" in said
    (run.folder / "folds").rename("elsewhere")
    said = command(*words).out
    assert "What that loses isn't measured: no image validated, and training images would hide it." in said
    assert "Lost:" not in said
    assert "accuracy" not in said
