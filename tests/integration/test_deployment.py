"""A finished run leaves as a file, and the file says of images in another process what the run's model says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_models import CARD

from peft_vit.deployment import save_low_bit
from peft_vit.runs.restore import restore_run

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("cache")


def expected(run_dir: Path, files: list[Path]) -> dict[Path, tuple[str, float]]:
    """Return class and probability of each file by the restored model, images prepared by hand."""
    run = restore_run(run_dir)
    mean, std = (np.array(values, dtype=np.float32) for values in (run.backbone.mean, run.backbone.std))
    pixels = [
        np.asarray(Image.open(file).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32)
        for file in files
    ]
    batch = torch.from_numpy(((np.stack(pixels) / 255 - mean) / std).transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        probabilities, classes = run.model(batch).softmax(1).max(1)
    names = [run.record.class_names[index] for index in classes]
    return dict(zip(files, zip(names, probabilities.tolist(), strict=True), strict=True))


def predicted_elsewhere(models: list[tuple[object, ...]], *images: Path) -> list[dict[Path, tuple[str, float]]]:
    """Let another process predict with each model in turn; return what it printed by file."""
    program = (
        "import json, sys\nfrom peft_vit.cli import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    try:\n        main(['predict', *arguments])\n"
        "    except SystemExit as ended:\n        assert not ended.code, ended.code\n"
        "    print('next')\n"
    )
    arguments = [[str(part) for part in (*model, *images)] for model in models]
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(arguments)], check=True, capture_output=True, text=True
    )
    tables = [part.splitlines() for part in done.stdout.split("next\n")[:-1]]
    rows = [[line.split("\t") for line in lines] for lines in tables]
    return [{Path(file): (name, float(probability)) for file, name, probability in table} for table in rows]


@pytest.mark.slow
def test_every_export_says_in_another_process_what_the_run_does(run_of, images, weights, tmp_path, command) -> None:
    names = ("lora", "full", "theirs", "int4", "nf4", "int4_adaptive", "packed_linear", "mixed", "by_row")
    models: list[tuple[object, ...]] = []
    sources = []
    for name in names:
        run_dir = run_of(name)
        models.append((run_dir,))
        sources.append(name)
        for kind in ("safetensors", "onnx", "openvino") if name in ("lora", "int4") else ("safetensors",):
            file = tmp_path / f"{name}.{'xml' if kind == 'openvino' else kind}"
            assert "12 validation images" in command("export", run_dir, "--format", kind, "--output", file).out
            models.append((file,))
            sources.append(name)
        if name in ("lora", "theirs"):
            command("export", run_dir, "--output", tmp_path / name)
            models.append((tmp_path / name, "--weights", weights))
            sources.append(name)
    files = sorted(images.rglob("*.png"))
    for model, name, found in zip(models, sources, predicted_elsewhere(models, images), strict=True):
        wanted = expected(run_of(name), files)
        assert list(found) == files
        exact = name != "by_row" or model == (run_of(name),)
        for file in files:
            if exact:
                assert found[file][0] == wanted[file][0], (model, file)
                assert found[file][1] == pytest.approx(wanted[file][1], abs=2e-3 if name == "nf4" else 1e-3), model
        if not exact:  # quantized anew: another model, near the trained one
            assert np.mean([found[file][0] == wanted[file][0] for file in files]) > 0.5


def test_merge_errors_are_printed(run_of, tmp_path, command) -> None:
    to_file = ("--format", "safetensors", "--output", tmp_path / "model.safetensors")
    printed = command("export", run_of("int4"), *to_file).out
    errors = {
        dtype: float(error)
        for dtype, error in re.findall(
            r"with (float\d\d) offsets: relative error of the weights at most (\S+)", printed
        )
    }
    assert errors["float32"] < 1e-6 < errors["float16"] < 5e-3
    assert "stored: float16 offsets" in printed
    assert "100.00 % of predictions equal" in printed
    printed = command("export", run_of("by_row"), *to_file).out
    assert "quantized anew" in printed
    assert re.search(r"with codes: relative error of the weights at most \d\.\de-\d\d \(blocks\.", printed)
    before, after = re.findall(r"accuracy (\S+) % before and (\S+) % after", printed)[0]
    assert float(before) == pytest.approx(100 * restore_run(run_of("by_row")).record.validation.accuracy, abs=0.01)
    assert 0 <= float(after) <= 100


def test_missing_images_are_said(run_of, images, tmp_path, command) -> None:
    run_dir, hidden = run_of("by_row"), images.with_name("hidden")
    images.rename(hidden)
    try:
        said = command("export", run_dir, "--format", "safetensors", "--output", tmp_path / "model.safetensors")
    finally:
        hidden.rename(images)
    assert "Not compared with the run's model" in said.out
    assert str(images) in said.out
    assert (tmp_path / "model.safetensors").exists()


def test_bad_images_are_named_and_the_others_predicted(run_of, images, tmp_path, command) -> None:
    good = images / "class_0" / "00.png"
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    bad = [tmp_path / "text.png", tmp_path / "nowhere.png", tmp_path / "empty"]
    said = command("predict", run_of("lora"), bad[0], good, *bad[1:], good, code=1)
    assert [line.split("\t")[0] for line in said.out.splitlines()] == [str(good), str(good)]
    assert [str(path) in line for path, line in zip(bad, said.err.splitlines(), strict=True)] == [True] * 3


def test_names_of_others_do_nothing_to_the_terminal(images, tmp_path, command) -> None:
    names = ("\x1b[2Ja", "two\nlines\tand a tab", "\u202egnp")
    card = CARD.model_copy(update={"class_names": names})
    save_low_bit(timm.create_model("test_vit", img_size=32, num_classes=3), tmp_path / "model.safetensors", card)
    files = [tmp_path / name for name in ("\x1b]0;title\x07.png", "a\nb.png", "\udce9.png", "bad\x9b.png")]
    for file in files[:3]:
        shutil.copy(images / "class_0" / "00.png", file)
    said = command("predict", tmp_path / "model.safetensors", *files, code=1)
    assert [len(line.split("\t")) for line in said.out.splitlines()] == [3, 3, 3]
    assert all(line.replace("\t", "").isprintable() for line in (said.out + said.err).splitlines())
    assert r"\x9b" in said.err


def test_what_is_no_model_is_refused(run_of, images, weights, tmp_path, command, refused) -> None:
    def refusal(model: Path, *options: object) -> str:
        return refused("predict", model, images / "class_0" / "00.png", *options)

    assert "expected a .onnx, .xml or .safetensors file" in refusal(tmp_path)
    (tmp_path / "cut.onnx").write_bytes(b"")
    assert "cut.onnx" in refusal(tmp_path / "cut.onnx")
    assert "--weights" in refusal(tmp_path / "cut.onnx", "--weights", "hub")
    to_onnx = ("--format", "onnx", "--output", tmp_path / "x.bin")
    assert "ends in .onnx" in refused("export", run_of("lora"), *to_onnx)
    exported = tmp_path / "peft"
    command("export", run_of("lora"), "--output", exported)
    assert "give their path with --weights" in refusal(exported)
    save_file(timm.create_model("test_vit", img_size=32).state_dict(), tmp_path / "other.safetensors")
    assert "name the right ones" in refusal(exported, "--weights", tmp_path / "other.safetensors")
    card = exported / "peft_vit.json"
    content = json.loads(card.read_text())
    card.write_text(json.dumps(content | {"class_names": ["a", "b"]}))
    line = refusal(exported, "--weights", weights)
    assert "head.weight: expected shape (2, " in line
    assert line.endswith("; or peft_vit.json is wrong")
    card.write_text(json.dumps(content | {"model": "no_vit"}))
    assert "peft_vit.json: backbone.model: unknown model" in refusal(exported, "--weights", weights)
    card.unlink()
    assert "peft_vit.json" in refusal(exported)
