"""What a tuning leaves behind: the model, what trains it again, the card and the page, and their numbers."""

import errno
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from chromium import check_page, needs_chromium
from golden import check_golden
from huggingface_hub import ModelCard
from PIL import Image
from torch import nn
from tuned import choice_of, right_of, write_images
from written_runs import run_and_write

import peft_vit
from peft_vit.api import TrainedModel
from peft_vit.base.errors import UserError
from peft_vit.base.files import write_atomically
from peft_vit.base.statistics import Interval, paired_proportions
from peft_vit.core.config import exported_bytes, load_study
from peft_vit.core.records import Calibrated, RunRecord
from peft_vit.data import load_data
from peft_vit.deploy import open_exported
from peft_vit.deploy.measures import fastest
from peft_vit.deploy.measures.bench import _opened
from peft_vit.deploy.restore import restore_run
from peft_vit.fit import request as events
from peft_vit.fit.outcomes import with_meaning
from peft_vit.fit.output import Tuning, _how_sure, what_more_buys, write_output
from peft_vit.fit.request import TuneRequest
from peft_vit.runs.records.storage import ADAPTER_FILE, RECORD_FILE, read_record
from peft_vit.runs.scheduling.plan import plan_study

pytestmark = pytest.mark.part("runner")


@pytest.fixture(scope="module")
def choice(_session_cache: str, tmp_path_factory: pytest.TempPathFactory) -> Tuning:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFT_VIT_CACHE", _session_cache)
        folder = tmp_path_factory.mktemp("tuned")
        write_images(folder / "images")
        return choice_of(folder / "images", folder / "output")


@pytest.fixture(scope="module")
def left(choice: Tuning, _session_cache: str):
    """Leave it for onnxruntime alone, with made-up seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFT_VIT_CACHE", _session_cache)
        patch.setattr(fastest, "bench", lambda files, **_: [row(file, 0.012) for file in files])
        patch.setattr(fastest, "missing_packages", lambda _: ["openvino"])
        said: list[str] = []
        output = choice.request.output
        write_output(choice, output, said.append)
        names = {"model": "model/model.onnx", "adapter": f"model/{ADAPTER_FILE}", "config": "config.yaml"}
        names |= {"card": "card.md", "report": "report.html"}
        return SimpleNamespace(**{name: output / file for name, file in names.items()}), said


def row(file: Path, seconds: float) -> object:
    """Return what a timing says."""
    times = dict.fromkeys(("median_s", "low_s", "high_s"), seconds)
    return SimpleNamespace(file=str(file), bytes=exported_bytes(file), **times, processor="one")


def final(choice: Tuning) -> RunRecord:
    return read_record(choice.final.folder / RECORD_FILE)


def test_everything_lies_below_the_output_and_is_told(choice, left) -> None:
    """What is told is a document, with the card, whose numbers are a matter of the machine."""
    files, said = left
    output = choice.request.output
    assert all(path.is_file() for path in (files.model, files.adapter, files.config, files.card, files.report))
    assert not list(output.glob("model/.*"))  # no trials
    assert files.adapter.read_bytes() == (choice.final.folder / ADAPTER_FILE).read_bytes()
    card = files.card.read_text()
    assert all((output / figure).is_file() for figure in re.findall(r"\]\((figures/[^)]*)\)", card))
    text = "\n".join([*said, "# card.md", card]).replace(str(output), "OUTPUT")
    text = text.replace(str(choice.request.images), "IMAGES")
    text = re.sub(r"\| (Versions|Machine) \| .*", r"| \1 | HERE |", text)
    check_golden("tune_output.txt", re.sub(r"[-−+]?\d+(\.\d+)?", "N", text) + "\n")


@pytest.mark.slow
@needs_chromium
def test_axe_finds_nothing_on_the_page(left) -> None:
    check_page(left[0].report)


def test_the_file_predicts_as_was_compared_and_says_how_far_to_believe_it(choice, left) -> None:
    record, model = final(choice), open_exported(left[0].model)
    sealed = load_data(record.spec.data, 0).test.open()
    ((pixels, labels),) = sealed.ordered_batches(100, model.card.mean, model.card.std)
    np.testing.assert_allclose(model.logits(pixels.numpy()), choice.final.logits, rtol=0, atol=1e-4)
    assert not np.allclose(choice.final.logits, record.predictions.logits, rtol=0, atol=1e-3)  # of float weights
    assert labels.tolist() == record.predictions.labels
    assert model.card.calibrated == choice.meaning
    assert model.card.calibrated.images == 38  # of 48, 10 sealed; each held out once
    assert model.card.unlike.images == 38  # the same, each left out of what the last training has seen
    assert restore_run(left[0].model.parent).reference is not None  # the folder has all of the run's files
    known = model.with_distances(pixels.numpy())[1] <= model.card.unlike.threshold
    assert known.mean() > 0.5


def test_the_configuration_trains_the_same_adapter_again(choice, left, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PEFT_VIT_CACHE", str(tmp_path / "cache"))  # not the user's, whose features may be of other sums
    study = load_study(left[0].config)
    (planned,) = plan_study(study, tmp_path, file=left[0].config).runs
    assert run_and_write(planned.spec, tmp_path).adapter_sha256 == final(choice).adapter_sha256
    for file in (left[0].config, left[0].card):
        assert "peft-vit run config.yaml --output again\n" in file.read_text()
        (folder,) = re.findall(r"peft-vit export again/(\S+) --bits nf4 --output again.onnx\n", file.read_text())
        assert restore_run(tmp_path / folder).card.run == planned.spec.run_id


def test_the_card_is_one_of_the_hub(choice, left) -> None:
    card = ModelCard(left[0].card.read_text())
    assert card.data.pipeline_tag == "image-classification"
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    right, labels = right_of(choice.final), choice.final.labels
    balanced = np.mean([right[labels == label].mean() for label in np.unique(labels)])
    assert values == {"accuracy": round(right.mean(), 4), "balanced_accuracy": round(balanced, 4)}


def test_faults_are_told_as_what_they_are(choice, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(fastest, "missing_packages", lambda _: ["openvino"])
    monkeypatch.setattr(fastest, "write_model", Mock(side_effect=UserError("no room")))
    refusal = (
        r"can't be exported \(ONNX, codes expanded when it is loaded: no room; .*\); the same command tries it again"
    )
    with pytest.raises(UserError, match=refusal):
        write_output(choice, tmp_path, lambda _: None)

    def unreadable(*_, **more) -> None:
        raise OSError(errno.EIO, "Input/output error", "photos/1.png")

    monkeypatch.setattr("peft_vit.fit.output.export_fastest", unreadable)
    with pytest.raises(UserError, match=r"^photos/1\.png: Input/output error; fix that"):  # it is not unwritable
        write_output(choice, tmp_path, lambda _: None)


def test_numbers_on_the_sealed_images_are_those_of_the_form_that_is_delivered(choice) -> None:
    calibrated = choice.meaning
    record = with_meaning(final(choice), calibrated, [], choice.final)
    truth, logits = choice.final.labels, choice.final.logits
    assert record.predictions.predicted == logits.argmax(1).tolist()
    assert record.predictions.files == final(choice).predictions.files
    assert record.test.accuracy == right_of(choice.final).mean()
    weights = np.exp(logits / calibrated.temperature)
    p = weights / weights.sum(1, keepdims=True)
    rows = np.arange(len(truth))
    np.testing.assert_allclose(record.tested_calibration.probability, p[rows, logits.argmax(1)], rtol=1e-5)
    for asked, share in record.tested_calibration.covered.items():
        inside = (1 - p <= calibrated.threshold(asked)) | (logits == logits.max(1, keepdims=True))
        assert share == pytest.approx(inside[rows, truth].mean())
    before, after = right_of(choice.before_rounding), right_of(choice.final)
    losses, gains = int((before & ~after).sum()), int((after & ~before).sum())
    assert choice.changed_by_rounding == paired_proportions(gains, losses, len(truth))
    assert replace(choice, before_rounding=choice.final).changed_by_rounding is None


def test_how_many_models_have_read_the_test_and_that_the_last_training_was_shorter_is_told(choice, tmp_path) -> None:
    folder = tmp_path / "studies" / "final-test_vit-32"
    for name in ("lora_1", "lora_2"):
        (folder / name / "seed_0").mkdir(parents=True)
        (folder / name / "seed_0" / "record.json").touch()
    later = replace(choice, final=replace(choice.final, folder=folder / "lora_2" / "seed_0"), longer=0.5)
    said = " ".join(_how_sure(later))
    assert "read by 2 models" in said
    assert "has 0.5 times the steps of those on folds, since time was short" in said
    _, steps, left = what_more_buys(None, 0.3, Interval(0.01, 0.0, 0.03, 38, 0.95), 0.5, [], [], 20.0)
    assert "0.5 times the steps" in steps
    assert "all steps of the last training" in left


def test_tune_from_python_asks_as_the_command_does(choice, left, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr("peft_vit.fit.request.check_images", lambda *_: None)
    monkeypatch.setattr("peft_vit.fit.tune.tune", lambda *given, started: asked.append(given) or choice)
    output = choice.request.output
    limits = {"max_bytes": "16MB", "max_latency": "50ms", "minutes": 5}
    tuned = peft_vit.tune("photos", output=str(output), model=["test_vit"], image_size=28, seed=3, **limits)
    limited = {"max_bytes": 16_000_000, "max_latency": 0.05, "minutes": 5}
    limited |= {"models": ("test_vit",), "image_sizes": (28,), "seed": 3}
    assert asked.pop() == (TuneRequest(images=Path("photos"), output=output, **limited), events.print_event)
    assert tuned.choice is choice
    assert tuned.classifier.card.run == f"final-tiny_pool-32/{choice.recipe.trained.name}/seed_0"
    first, test, size = repr(tuned).splitlines()
    assert first.startswith("lora on tiny_pool, 32 px, 3 classes: ")
    assert test.startswith("Test accuracy ")
    assert size.endswith(f" MB: {left[0].model}")
    lines: list[str] = []
    peft_vit.tune("photos", output=output, tell=lines.append)
    request, emit = asked.pop()
    emit("found")
    assert (request, lines) == (TuneRequest(images=Path("photos"), output=output), ["found"])


def test_from_python_it_predicts_and_shows_itself(choice, left) -> None:
    tuned = peft_vit.load(choice.request.output)
    assert isinstance(tuned, TrainedModel)
    assert tuned.record == with_meaning(final(choice), choice.meaning, choice.folds, choice.final)
    assert tuned.record.predictions.predicted == choice.final.logits.argmax(1).tolist()  # of 4 bits, as delivered
    assert isinstance(tuned.model, nn.Module)  # of the run: the file is for onnxruntime
    with pytest.raises(UserError, match="runs without PyTorch and holds no module of it"):
        peft_vit.load(left[0].model).model  # noqa: B018
    folder = choice.request.images / "class_0"
    by_path = tuned.predict(folder, coverage=0.8)
    assert [one.file for one in by_path] == sorted(folder.iterdir())
    array = np.asarray(Image.open(folder / "01.png"))
    (grey,) = tuned.predict(array[..., 0])
    assert grey.classes == ()
    with pytest.raises(UserError, match=r"coverage: expected a share of images from 0\.8 to 0\.97"):
        tuned.predict(array, coverage=0.99)
    (in_floats,) = tuned.predict(array / 255, coverage=0.8)
    assert in_floats.classes == by_path[1].classes
    assert in_floats.probability == pytest.approx(by_path[1].probability, abs=1e-5)
    assert tuned._repr_html_() == tuned.report._repr_html_()
    shown = re.fullmatch(r'<iframe srcdoc="([^"]*)" [^>]*></iframe>', tuned.report._repr_html_())
    assert unescape(shown[1]) == Path(tuned.report).read_text() == left[0].report.read_text()


@pytest.mark.parametrize("place", ["", "model"])
def test_commands_take_the_output_as_they_take_a_run(choice, left, place, command, tmp_path) -> None:
    output, image = choice.request.output / place, choice.request.images / "class_0" / "00.png"
    of_file, of_folder = (command("predict", model, image, "--format", "json").out for model in (left[0].model, output))
    assert of_folder == of_file
    assert _opened(output, tmp_path).file == left[0].model  # what bench times
    exported = tmp_path / "again.onnx"
    command("export", output, "--bits", "nf4", "--output", exported)
    assert open_exported(exported).card.run == open_exported(left[0].model).card.run
    assert f"Report: {output / 'report/report.html'}" in command("report", output).out
    assert peft_vit.load(output).record.test == read_record(left[0].model.parent / RECORD_FILE).test


# --- which form is taken ---


SIZES_AND_SECONDS = {"small": (4_000_000, 0.030), "fast": (4_100_000, 0.020), "openvino": (3_000_000, 0.012)}


@pytest.fixture
def made_up(monkeypatch, run_of):
    """Write files of made-up sizes, which take made-up seconds."""
    taken = {}

    def write(_source, file: Path, _format, options, _calibrated):
        kind = "openvino" if file.suffix == ".xml" else options.runtime
        write_atomically(file, bytes(SIZES_AND_SECONDS[kind][0]))
        if kind == "openvino":
            file.with_suffix(".bin").touch()
        taken[str(file)] = kind
        return SimpleNamespace(comparison=None)

    def time_them(files, *, alone):
        assert not alone or len(files) == 1
        return [row(file, SIZES_AND_SECONDS[taken[str(file)]][1]) for file in files]

    monkeypatch.setattr(fastest, "write_model", write)
    monkeypatch.setattr(fastest, "bench", time_them)
    monkeypatch.setattr(fastest, "missing_packages", lambda _: ["openvino"])

    def export(folder: Path, **limits):
        return fastest.export_fastest(run_of("int4"), folder, meaning=None, **limits)

    return export


@pytest.mark.parametrize(
    ("limits", "taken", "missed"),
    [
        ({}, "fast", ""),
        ({"max_latency_s": 0.02}, "fast", ""),
        ({"max_latency_s": 0.015}, "fast", "No form keeps within 15 ms"),
        ({"max_bytes": 4_100_000}, "fast", ""),
        ({"max_bytes": 4_050_000, "max_latency_s": 0.025}, "small", "No form that is small enough keeps within 25 ms"),
        ({"max_bytes": 1_000_000, "max_latency_s": 0.025}, "small", "No form keeps within 1 MB"),
        ({"max_bytes": 1_000_000}, "small", "No form keeps within 1 MB: the smallest takes 4.00 MB."),
    ],
)
def test_the_fastest_within_the_limits_is_taken(made_up, tmp_path, limits, taken, missed) -> None:
    (tmp_path / "model.xml").write_text("of an earlier call")
    found = made_up(tmp_path, **limits)
    assert found.model.stat().st_size == found.timed.bytes == SIZES_AND_SECONDS[taken][0]
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert " ".join(found.missed).startswith(missed)
    assert bool(found.missed) == bool(missed)
    assert sum(not form.left_out for form in found.forms) == 1


@pytest.mark.parametrize(("limit_s", "name"), [(0.025, "model.onnx"), (0.019, "model.xml"), (0.001, "model.xml")])
def test_the_model_is_called_model_onnx_within_the_limits(made_up, tmp_path, monkeypatch, limit_s, name) -> None:
    monkeypatch.setattr(fastest, "missing_packages", lambda _: [])
    found = made_up(tmp_path, max_latency_s=limit_s)
    assert found.model.name == name
    whys = [form.left_out for form in found.forms if form.name == "OpenVINO"]
    assert [why.startswith("ONNX keeps within the limits") for why in whys] == [name == "model.onnx"]


@pytest.mark.parametrize(
    ("seconds", "limits", "taken"),
    [
        (0.0219, {"max_latency_s": 0.03}, "small"),
        (0.0221, {"max_latency_s": 0.03}, "fast"),
        (0.0219, {}, "fast"),  # which alone is written
        (0.0219, {"max_latency_s": 0.0205}, "fast"),  # within a tenth of the other, but above the limit
    ],
)
def test_of_forms_that_are_as_fast_the_smallest_is_taken(
    made_up, tmp_path, monkeypatch, seconds, limits, taken
) -> None:
    monkeypatch.setitem(SIZES_AND_SECONDS, "small", (4_000_000, seconds))
    found = made_up(tmp_path, **limits)
    assert (found.timed.bytes, found.missed) == (SIZES_AND_SECONDS[taken][0], ())


@pytest.mark.slow
def test_a_packed_model_is_written_in_every_form_of_onnx(run_of, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fastest, "bench", lambda files, **_: [row(file, 0.012) for file in files])
    monkeypatch.setattr(fastest, "missing_packages", lambda _: ["openvino"])
    known = Calibrated(images=60, temperature=3.0, coverages=(0.8,), thresholds=(0.4,))
    run = run_of("int4")
    found = fastest.export_fastest(run, tmp_path, meaning=known, max_latency_s=0.001)
    fast, packed = found.forms
    assert packed.timed.bytes < fast.timed.bytes
    assert all(form.comparison.same_predictions > 0.9 for form in (packed, fast))
    assert not packed.left_out  # the smallest of those that are as fast
    assert open_exported(found.model).card.calibrated == known
