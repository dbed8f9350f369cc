"""The page that asks a model, opened from disk in Chromium: it says what `predict` says, and nothing leaves."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chromium import axe_violations, fits_the_screen, needs_chromium
from exported_files import packed_model
from PIL import Image
from tiny_models import CARD, random_model

from peft_vit.base.errors import UserError
from peft_vit.base.statistics import Neighbours
from peft_vit.core.backbones import Backbone
from peft_vit.core.quantization import QuantizationFormat
from peft_vit.core.records import Calibrated, Decision, Unlike
from peft_vit.deploy import ExportMetadata, export_onnx, open_exported, predict_images
from peft_vit.deploy.page.web_page import runtime_files, write_web_page

pytest.importorskip("onnxscript")
pytestmark = [pytest.mark.slow, needs_chromium]

HOSTILE = "</script><img src=x onerror=alert(1)>"
READ = """() => [...document.querySelectorAll('#results > li')].map((item) => ({
  name: item.querySelector('h2').textContent,
  classes: [...item.querySelectorAll('.bars li')].map((bar) => [bar.firstChild.textContent, Number(bar.dataset.share)]),
  told: item.querySelector('.told').textContent,
  bold: [...item.querySelectorAll('.first')].map((bar) => bar.firstChild.textContent),
  set: item.querySelector('.set').textContent,
  unlike: !item.querySelector('.warn').hidden,
  took: item.querySelector('.took').textContent,
}))"""
ALL_TOLD = "n => [...document.querySelectorAll('#results > li .took')].filter((took) => took.textContent).length === n"
GIVE = """([kind, place, bytes]) => {
  const data = new DataTransfer();
  if (bytes.length) data.items.add(new File([new Uint8Array(bytes)], "given.png", { type: "image/png" }));
  const names = { drop: "dataTransfer", paste: "clipboardData" };
  document.querySelector(place).dispatchEvent(
    Object.defineProperty(new Event(kind, { bubbles: true, cancelable: true }), names[kind], { value: data }));
}"""


@pytest.fixture(scope="module")
def runtime() -> dict[str, bytes]:
    try:
        return runtime_files(None)
    except UserError as error:
        pytest.skip(f"onnxruntime-web is not here: {error}")


def card_of(**changes: Any) -> ExportMetadata:
    return CARD.model_copy(update=changes)


def asked(page: Any, files: list[Path]) -> list[dict[str, Any]]:
    """Give files to a page, and return what it says of each."""
    page.set_input_files("#choose", files)
    page.wait_for_function(ALL_TOLD, arg=len(files))
    said: list[dict[str, Any]] = page.evaluate(READ)
    return said


def photos(folder: Path, count: int) -> list[Path]:
    """Write pictures of all kinds: sizes, formats, colours, transparent, grey, turned by EXIF."""
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        height, width = (int(side) for side in rng.integers(20, 300, 2))
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 4), np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        noise = rng.normal(0, 25, (height, width, 4))
        pixels = Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))
        suffix, mode = (("jpg", "RGB"), ("png", "RGBA"), ("png", "L"), ("webp", "RGB"), ("png", "LA"), ("gif", "P"))[
            number % 6
        ]
        exif = Image.Exif()
        exif[0x0112] = 1 + number % 8
        files.append(folder / f"{number:03}.{suffix}")
        pixels.convert(mode).save(files[-1], **({"exif": exif, "quality": 92} if suffix == "jpg" else {}))
    return files


FORMS = {
    "float": (lambda: random_model("test_vit"), {}),
    "int8_products": (lambda: random_model("test_vit"), {"activations": "int8"}),
    **{
        kind: (partial(packed_model, [QuantizationFormat(kind, 32, True, torch.float16)]), {})
        for kind in ("int2", "int3", "int4", "int8", "nf4", "fp4")
    },
    "int3_fast": (partial(packed_model, [QuantizationFormat("int3", 32, True, torch.float16)]), {"runtime": "fast"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_that_export_writes_runs_and_says_what_predict_says(runtime, open_page, tmp_path, form) -> None:
    make, options = FORMS[form]
    file, files = tmp_path / "model.onnx", photos(tmp_path, 6)
    export_onnx(make(), file, CARD, **options)
    page = open_page(write_web_page(tmp_path / "page", file.read_bytes(), open_exported(file).card, runtime))
    said = asked(page, files)
    for prediction, shown in zip(predict_images(open_exported(file), files), said, strict=True):
        (name, share), *_ = shown["classes"]
        assert prediction.file is not None
        assert shown["name"] == prediction.file.name
        assert (name, share) == (prediction.class_name, pytest.approx(prediction.probability, abs=0.02))


@pytest.mark.parametrize(
    ("channels", "interpolation", "size"),
    [(3, "bicubic", 32), (1, "bilinear", 32), (3, "lanczos", 32), (1, "nearest", 32)],
)
def test_classes_are_those_of_predict_but_for_one_in_a_hundred(
    runtime, open_page, tmp_path, channels, interpolation, size
) -> None:
    file, files = tmp_path / "model.onnx", photos(tmp_path, 120)
    model = random_model("test_vit")
    images = torch.randn(50, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        known = Neighbours.of(Backbone(model).logits_and_middle(images)[1].numpy())
    calibrated = Calibrated(images=60, temperature=2.0, coverages=(0.8, 0.9), thresholds=(0.5, 0.8))
    likes = {"channels": channels, "interpolation": interpolation, "unlike": Unlike(images=40, threshold=0.9)}
    export_onnx(model, file, card_of(calibrated=calibrated, **likes), known)
    classifier = open_exported(file)
    said = asked(open_page(write_web_page(tmp_path / "page.html", file.read_bytes(), classifier.card, runtime)), files)
    predictions = predict_images(classifier, files, coverage=0.9)
    assert [shown["name"] for shown in said] == [file.name for file in files]
    assert len({prediction.class_name for prediction in predictions}) > 1
    others = [shown["classes"][0][0] != p.class_name for shown, p in zip(said, predictions, strict=True)]
    assert np.mean(others) <= 0.01
    gaps = [abs(shown["classes"][0][1] - p.probability) for shown, p in zip(said, predictions, strict=True)]
    assert np.median(gaps) < 1e-4
    sets = [
        shown["set"] == "Set at 90 %: " + ", ".join(name for name, _ in p.classes)
        for shown, p in zip(said, predictions, strict=True)
    ]
    assert np.mean(sets) >= 0.95
    flagged = [p.unlike for p in predictions]
    assert 0 < sum(flagged) < len(flagged)
    assert np.mean([shown["unlike"] == p.unlike for shown, p in zip(said, predictions, strict=True)]) >= 0.95


MEANINGS = {
    "multilabel": Decision(
        images=30, temperature=1.5, thresholds=(0.5, 0.4, 0.6, 0.5, 0.7), coverages=(0.9,), set_thresholds=(0.45,)
    ),
    "regression": Decision(
        images=30,
        center=(10.0, 0.0, -3.0, 500.0, 1.0),
        spread=(2.0, 1.0, 0.5, 90.0, 1.0),
        coverages=(0.9,),
        half_widths=((1.6, 1.7, 1.8, 1.9, 2.0),),
        scale_at=((9.0, 10.0, 11.0), *(((0.0,),) * 4)),
        scale=((0.5, 1.0, 4.0), *(((2.0,),) * 4)),
    ),
}


@pytest.mark.parametrize("task", MEANINGS)
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
def test_labels_and_numbers_are_those_of_predict(runtime, open_page, tmp_path, task, scheme, width) -> None:
    file, files = tmp_path / "model.onnx", photos(tmp_path, 12)
    export_onnx(random_model("test_vit"), file, card_of(task=task, decision=MEANINGS[task]))
    classifier = open_exported(file)
    page = open_page(
        write_web_page(tmp_path / "page", file.read_bytes(), classifier.card, runtime),
        viewport={"width": width, "height": 740},
        color_scheme=scheme,
    )
    predictions, alike = predict_images(classifier, files, coverage=0.9), []
    for prediction, shown in zip(predictions, asked(page, files), strict=True):
        if task == "multilabel":
            names = [name for name, _ in prediction.labels]
            alike.append(shown["told"] == f"Labels: {', '.join(names) or 'none'}")
            alike.append(shown["bold"] == names)
            alike.append(shown["set"] == f"Set at 90 %: {', '.join(name for name, _ in prediction.classes) or 'none'}")
        else:
            numbers = [float(number) for number in re.findall(r"-?\d[\d.]*(?:e-?\d+)?", shown["told"])]
            alike.append(numbers == pytest.approx(np.ravel([*prediction.numbers.values()]), rel=0.03, abs=0.05))
            assert re.findall(r"[a-e](?= -?\d)", shown["told"]) == [*"abcde"]
            assert not shown["classes"]
    assert np.mean(alike) > 0.9
    assert fits_the_screen(page)
    assert axe_violations(page) == []


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("model") / "model.onnx"
    export_onnx(random_model("test_vit"), file, CARD)
    return file.read_bytes()


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen_and_axe_finds_nothing(runtime, open_page, model, tmp_path, width, scheme) -> None:
    calibrated = Calibrated(images=60, temperature=2.0, coverages=(0.9,), thresholds=(0.8,))
    names = ("a class whose name goes on and on_and_on_without_a_space_for_longer_than_a_phone", HOSTILE, "c", "d", "e")
    card = card_of(calibrated=calibrated, class_names=names)
    (bad := tmp_path / "notes.txt").write_text("no image")
    page = open_page(
        write_web_page(tmp_path / "page", model, card, runtime),
        viewport={"width": width, "height": 740},
        color_scheme=scheme,
        has_touch=width == 360,
        is_mobile=width == 360,
    )
    assert page.locator("#choose").evaluate("input => input.labels[0].textContent") == "Choose images"
    first, second, third = asked(page, [*photos(tmp_path, 2), bad])
    assert len(first["classes"]) == len(second["classes"]) == 5
    assert third["took"] == "This is no image that the browser can read. Give a JPEG or PNG."
    assert page.get_by_role("status").inner_text() == "notes.txt is no image that the browser can read."
    assert page.locator("#photograph").evaluate("input => input.parentElement.checkVisibility()") == (width == 360)
    assert fits_the_screen(page)
    page.evaluate("document.querySelector('.warn[hidden]').hidden = false")
    assert axe_violations(page) == []


def test_images_are_dropped_and_pasted_and_the_latest_stands_first(runtime, open_page, model, tmp_path) -> None:
    page = open_page(write_web_page(tmp_path / "page.html", model, CARD, runtime))
    (file,) = photos(tmp_path, 1)
    assert [shown["name"] for shown in asked(page, [file])] == [file.name]
    page.evaluate(GIVE, ["drop", "#drop", []])
    page.get_by_text("That was no file. Save the picture, and drop the file.").wait_for()
    page.evaluate(GIVE, ["paste", "body", []])
    page.get_by_text("The clipboard holds no image.").wait_for()
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    for count, (kind, place) in enumerate((("drop", "#drop"), ("paste", "body")), start=2):
        page.evaluate(GIVE, [kind, place, list((tmp_path / "red.png").read_bytes())])
        page.wait_for_function(ALL_TOLD, arg=count)
        assert [shown["name"] for shown in page.evaluate(READ)] == ["given.png"] * (count - 1) + [file.name]


def test_the_public_copy_is_fetched_by_its_hash_and_what_is_missing_is_said(
    runtime, open_page, model, tmp_path
) -> None:
    files = photos(tmp_path, 1)
    (expected,) = asked(open_page(write_web_page(tmp_path / "a.html", model, CARD, runtime)), files)
    page = write_web_page(tmp_path / "page", model, CARD, None)
    (said,) = asked(open_page(page, runtime), files)
    assert said["classes"] == expected["classes"]
    wasm = "ort-wasm-simd-threaded.wasm"
    for copy in ({}, {**runtime, wasm: runtime[wasm] + b"x"}):
        broken = open_page(page, copy, may_fail=True)
        broken.get_by_text("cdn.jsdelivr.net was not reached; go online and load the page again").wait_for()
    (page.parent / "model.js").unlink()
    alone = open_page(page, runtime, may_fail=True)
    alone.get_by_text("a file that belongs beside this page is missing: copy the whole folder").wait_for()
    unfit = open_page(write_web_page(tmp_path / "b.html", b"no model", CARD, runtime), may_fail=True)
    unfit.get_by_text("The model can't run in this browser: ").wait_for()


def test_it_shows_where_the_model_looked_when_it_is_asked_to(runtime, open_page, model, tmp_path) -> None:
    page = open_page(write_web_page(tmp_path / "page.html", model, CARD, runtime))
    asked(page, photos(tmp_path, 1))
    page.get_by_text("Where did it look?").click()
    page.get_by_text("each of 16 was covered").wait_for()
    read = "[...document.querySelector('canvas').getContext('2d').getImageData(0, 0, 224, 224).data]"
    shown = np.reshape(page.evaluate(read), (224, 224, 4))[..., :3]
    assert shown.std() > 0
