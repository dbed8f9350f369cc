"""A finished run leaves as a file, and the file says of images in another process what the run's model says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from golden import check_golden
from safetensors.torch import save_file
from tiny_models import CARD

from peft_vit.base.statistics import paired_proportions
from peft_vit.core.records import Calibrated
from peft_vit.core.tasks.classification import ACCURACY
from peft_vit.deploy import export, open_exported, save_low_bit
from peft_vit.deploy.restore import restore_run

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("cache")
INT8 = ("--activations", "int8")


CALLS = (
    ("int4", "test_vit", "--output a.safetensors"),
    ("by_row", "test_vit", "--format safetensors --output b.safetensors"),
    ("int4", "tiny_pool", "--runtime fast --output c.onnx"),
    ("int4", "tiny_pool", "--format onnx --activations int8 --accept-loss 100 --output d.onnx"),
    ("lora", "tiny_pool", "--format onnx --activations int8 --accept-loss 100 --output d.onnx --overwrite"),
    ("lora", "tiny_pool", "--bits 4 --output h.onnx"),
    ("full", "test_vit", "--bits 2 --rounding gptq --format safetensors --output i.safetensors"),
    ("lora", "test_vit", "--format peft --output e"),
    ("lora", "test_vit", "--format pretrained --output g"),
    ("lora", "tiny_pool", "--output h.html"),
    ("lora", "tiny_pool", "--format web --bits 4 --output page"),
)


def test_what_exports_say(run_of, images, weights, tmp_path, command, refused, monkeypatch) -> None:
    """Of merged offsets, of weights that are quantized again, of products in 8 bits, and where no images are there."""
    monkeypatch.chdir(tmp_path)
    outputs = [command("export", run_of(name, model), *options.split()).out for name, model, options in CALLS]
    merged, again, fast, int8, *_ = outputs
    images.rename(images.with_name("hidden"))
    try:
        without = ("export", run_of("lora"), "--format", "safetensors", "--output", "f.safetensors")
        outputs.append(command(*without).out)
        line = refused("export", run_of("int4"), "--format", "onnx", "--output", "g.onnx", *INT8)
        bits = refused("export", run_of("lora"), "--bits", "3", "--output", "k.onnx")
    finally:
        images.with_name("hidden").rename(images)
    assert Path("f.safetensors").is_file()
    assert "--activations: needs the run's images to measure what int8 loses, and they are not there" in line
    assert str(images) in line
    assert "--bits: needs the run's images to measure what int3 loses, and they are not there" in bits
    (error,) = re.findall(r"relative error of the weights at most (\S+)", merged)
    assert 1e-6 < float(error) < 5e-3
    assert all("100.00 % of predictions equal" in text for text in (merged, fast))
    accuracies = r"(\S+) % before and (\S+) % after"
    before, after = map(float, re.findall(f"accuracy {accuracies}", again)[0])
    assert before == pytest.approx(100 * restore_run(run_of("by_row")).record.validation.accuracy, abs=0.01)
    assert 0 <= after <= 100
    before, after = map(float, re.findall(f"int8: .* {accuracies}", int8)[0])
    way, size, low, high = re.findall(r"It (lost|gained) (\S+) points .* a loss of (\S+) to (\S+),", int8)[0]
    lost, low, high = float(size) * (1 if way == "lost" else -1), float(low), float(high)
    assert lost == pytest.approx(before - after, abs=0.02)
    assert low < lost < high
    program = "import sys; from peft_vit.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    arguments = [sys.executable, "-c", program, "predict", "d.onnx", str(images / "class_0" / "00.png")]
    by_onnx = subprocess.run(arguments, check=True, capture_output=True, text=True)
    assert by_onnx.stdout.count("\t") == 4
    for exported in ("e", "g"):
        options = ("--weights", weights) if exported == "e" else ()
        assert command("predict", exported, images, *options).out == command("predict", run_of("lora"), images).out
    titles = [f"$ {name} {options}" for name, _, options in CALLS] + ["$ lora, its images are not there"]
    text = "".join(f"{title}\n{output}" for title, output in zip(titles, outputs, strict=True)).replace(
        str(images), "IMAGES"
    )
    text = text.replace(str(tmp_path), "HERE")
    text = re.sub(r"\((blocks|attn_pool)\.[a-z0-9._]+\)", "(MODULE)", text)
    text = text.replace("It gained", "It lost")  # which differs from processor to processor
    check_golden("exports.txt", re.sub(r"-?\d+(\.\d+)?(e[-+]\d+)?", "N", text))


def test_names_of_others_do_nothing_to_the_terminal(images, tmp_path, command) -> None:
    names = ("\x1b[2Ja", "two\nlines\tand a tab", "\u202egnp")
    card = CARD.model_copy(update={"class_names": names})
    save_low_bit(timm.create_model("test_vit", img_size=32, num_classes=3), tmp_path / "model.safetensors", card)
    (tmp_path / "bad\x9b.png").write_text("no image")
    files = [tmp_path / name for name in ("\x1b]0;title\x07.png", "a\nb.png", "\udce9.png", "bad\x9b.png")]
    for file in files[:3]:
        shutil.copy(images / "class_0" / "00.png", file)
    printed = command("predict", tmp_path / "model.safetensors", *files, code=1)
    assert [len(line.split("\t")) for line in printed.out.splitlines()] == [3, 3, 3, 3]
    assert all(line.replace("\t", "").isprintable() for line in (printed.out + printed.err).splitlines())
    assert r"\x9b" in printed.err


def test_what_is_no_model_is_refused(run_of, images, weights, tmp_path, command, refused) -> None:
    exported, other, cut = tmp_path / "peft", tmp_path / "other.safetensors", tmp_path / "cut.onnx"

    def refusal(model: Path, *options: object) -> str:
        return refused("predict", model, images / "class_0" / "00.png", *options)

    assert "expected a .onnx, .xml or .safetensors file" in refusal(tmp_path)
    cut.write_bytes(b"")
    assert "cut.onnx" in refusal(cut)
    assert "--weights" in refusal(cut, "--weights", "hub")
    command("export", run_of("lora"), "--format", "peft", "--output", exported)
    assert "--weights" in refusal(exported)
    save_file(timm.create_model("test_vit", img_size=32).state_dict(), other)
    assert "name the right ones" in refusal(exported, "--weights", other)
    card = exported / "peft_vit.json"
    content = json.loads(card.read_text())
    for change, stated in (({"class_names": ["a", "b"]}, "head.weight: "), ({"model": "no_vit"}, "peft_vit.json: ")):
        card.write_text(json.dumps(content | change))
        assert stated in refusal(exported, "--weights", weights)
    card.unlink()
    assert "peft_vit.json" in refusal(exported)


# --- how an ONNX file multiplies by low-bit weights ---


def test_more_than_half_a_point_has_to_be_accepted(run_of, tmp_path, command, refused, monkeypatch) -> None:
    lost = paired_proportions(8, 4, 400)  # one point: 8 gone and 4 new
    loses = export.Comparison(400, "validation", 0.97, 0.1, ACCURACY, 0.9, 0.89, lost, 1.0)
    monkeypatch.setattr(export, "export_onnx", lambda _, trial, *__, **___: trial.write_bytes(b"the new file"))
    monkeypatch.setattr(export, "open_exported", str)
    monkeypatch.setattr(export, "compare", lambda *_: loses)
    file = tmp_path / "model.onnx"
    file.write_bytes(b"as before")
    arguments = ("export", run_of("int4"), "--output", file, "--overwrite", *INT8)
    line = refused(*arguments)
    assert "--activations: int8 lost 1.00 points of accuracy on 400 validation images" in line
    assert line.endswith("--accept-loss 1")
    assert "more than the 0.9" in refused(*arguments, "--accept-loss", "0.9")
    assert file.read_bytes() == b"as before"
    assert "It lost 1.00 points" in command(*arguments, "--accept-loss", "1").out
    assert file.read_bytes() == b"the new file"


REFUSED = (
    ("int4", "--output m.xml --format openvino --runtime fast", "--runtime: has no effect with --format openvino"),
    ("int4", "--output m.safetensors --activations int8", "--activations: has no effect with --format safetensors"),
    ("int4", "--output m --format peft --accept-loss 1", "--accept-loss: has no effect with --format peft"),
    ("lora", "--output m.onnx --runtime fast", "--runtime: has no effect on this run"),
    ("int4", "--output m.onnx --accept-loss 1", "--accept-loss: has no effect without --activations"),
    ("int4", "--output m.onnx --activations int8 --runtime small", "--activations: has no effect with --runtime small"),
    ("int4", "--output m.onnx --bits 4", "--bits: has no effect on this run, whose weights are int4 already"),
    ("lora", "--output m.onnx --bits 5", "--bits"),
    ("lora", "--output m --format peft --bits 4", "--bits: has no effect with --format peft"),
    ("lora", "--output m.onnx --rounding gptq", "--rounding: has no effect without --bits"),
    ("lora", "--output x.bin --format onnx", "x.bin: --output"),
    ("lora", "--output model", "model: --output"),
    ("lora", "--output m.onnx --format peft", "m.onnx: --output"),
    ("lora", "--output m.onnx --format safetensors", "m.onnx: --output"),
    ("lora", "--output x.xml --runtime fast", "--runtime: has no effect with --format openvino"),
    ("lora", "--output m.onnx --single", "--single: has no effect with --format onnx; remove it, or set --format web"),
    ("lora", "--output m.web --format web --single", "m.web: --output"),
    ("lora", "--output x.onnx --format web", "x.onnx: --output"),
    ("lora", "--output web --runtime-files npm --format web", "npm/ort.wasm.bundle.min.mjs: --runtime-files"),
    *(
        ("int4", f"--output m.onnx --activations int8 --accept-loss {points}", "--accept-loss")
        for points in (-1, "nan", 101)
    ),
)


@pytest.mark.parametrize(("run", "options", "stated"), REFUSED)
def test_options_without_effect_are_refused(run, options, stated, run_of, tmp_path, refused, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert stated in refused("export", run_of(run), *options.split())
    assert not list(tmp_path.iterdir())


# --- how far a file's model can be believed ---


KNOWN = Calibrated(images=60, temperature=3.0, coverages=(0.8, 0.9), thresholds=(0.4, 0.999))


@pytest.mark.parametrize("format", ["onnx", "safetensors"])
def test_files_say_how_far_they_can_be_believed(run_of, images, tmp_path, command, refused, format) -> None:
    run = run_of("lora", "tiny_pool")
    file, image = tmp_path / f"model.{format}", images / "class_1" / "00.png"
    export.write_model(export.model_to_write(run), file, format, export.OnnxOptions(), KNOWN)
    assert open_exported(file).card.calibrated == KNOWN
    (said,) = json.loads(command("predict", file, image, "--coverage", "0.9", "--format", "json").out)
    (by_run,) = json.loads(command("predict", run, image, "--format", "json").out)
    assert said["file"] == str(image)
    assert said["probability"] < by_run["probability"]  # calibrated: not so sure
    assert said["set"][0] == said["class"] == by_run["class"]
    assert sorted(said["set"]) == ["class_0", "class_1", "class_2"]  # 1 - p is below 0.999 for all
    for model in (file, run):
        assert "--coverage: " in refused("predict", model, image, "--coverage", "0.99")


# --- nothing is written over ---


@pytest.mark.parametrize("format", ["safetensors", "peft", "pretrained", "web", "history"])
def test_what_is_there_stays_unless_it_is_to_be_overwritten(run_of, tmp_path, command, refused, format) -> None:
    ending = {"safetensors": ".safetensors", "history": ".csv"}.get(format, "")
    output = tmp_path / f"out{ending}"
    arguments = ("export", run_of("adaptive", "tiny_pool"), "--format", format, "--output", output)
    command(*arguments)
    (others := tmp_path / "others").mkdir()
    (others / "thesis.txt").write_text("mine")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert "give another name, or --overwrite" in refused(*arguments)
    if format in ("peft", "pretrained", "web"):
        line = refused(*arguments, "--output", others, "--overwrite")
        assert line.endswith(
            "holds files that no export has written, which --overwrite leaves alone; give another name"
        )
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    command(*arguments, "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(("others", output.name))


def test_without_a_name_the_file_lies_in_the_runs_folder(run_of, images, tmp_path, command, refused) -> None:
    run = Path(shutil.copytree(run_of("lora", "tiny_pool"), tmp_path / "a run"))
    said = command("export", run, "--format", "safetensors").out.splitlines()
    assert said[-1] == f"Next: peft-vit predict '{run / 'model.safetensors'}' IMAGES"
    assert command("predict", run / "model.safetensors", images).out == command("predict", run, images).out
    said = command("export", run, "--format", "web", "--single").out.splitlines()
    assert said[-1] == f"Next: open '{run / 'model.html'}' in a browser"
    assert "--output: is missing, which --format history needs; add it" in refused("export", run, "--format", "history")
