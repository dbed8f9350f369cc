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

from peft_vit.cli import main
from peft_vit.deployment import ModelCard, save_low_bit
from peft_vit.runs.export import restore_run

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

_QA_LORA = {
    "quantization_bits": 4,
    "quantization_type": "int4",
    "quantization_schedule": "constant",
    "gradient_scaling_factor": 1.0,
    "rank": 2,
    "use_group_quantization": True,
    "group_size": 32,
}
EXPERIMENTS = {
    "lora": {"method": "lora", "lora": {"rank": 2, "scale": 1.7}},
    "full": {"method": "full"},
    "theirs": {"method": "peft_lora", "peft_lora": {"rank": 2, "scale": 1.7}},
    "int4": {"method": "qa_lora", "qa_lora": _QA_LORA},
    "nf4": {"method": "qa_lora", "qa_lora": {**_QA_LORA, "quantization_type": "nf4", "group_size": 16}},
    "adaptive": {
        "method": "qa_adalora",
        "qa_lora": {key: value for key, value in _QA_LORA.items() if key != "rank"},
        "adalora": {
            "importance_metric": "sensitivity",
            "update_frequency": 1,
            "warmup_steps": 2,
            "final_steps": 2,
            "allocation_strategy": "global",
            "total_rank_budget": 40,
        },
    },
    "packed_probe": {
        "method": "qa_linear",
        "training": {},
        "qa_lora": {
            "quantization_bits": 4,
            "quantization_type": "int4",
            "use_group_quantization": True,
            "group_size": 32,
        },
    },
    "mixed": {
        "method": "qa_lora",
        "qa_lora": {
            **{key: value for key, value in _QA_LORA.items() if not key.startswith("quantization_")},
            "quantization_schedule": "constant",
            "adaptive_bits": {"average_bits": 6.0, "calibration_images": 8},
        },
    },
    "by_row": {
        "method": "qa_lora",
        "qa_lora": {key: value for key, value in _QA_LORA.items() if key != "group_size"}
        | {"use_group_quantization": False},
    },
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Write colour images of three classes, to train on and to predict."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label, colour in enumerate(((200, 60, 60), (60, 200, 60), (60, 60, 200))):
        (root / f"class_{label}").mkdir()
        for number in range(16):
            pixels = rng.normal(colour, 70, (20, 30, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"class_{label}" / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def runs(images, do_runs) -> dict[str, Path]:
    return do_runs(EXPERIMENTS, dataset="image-folder", path=str(images), validation_images=12, test_images=12)


pytestmark = pytest.mark.usefixtures("cache")


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


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
def test_every_export_says_in_another_process_what_the_run_does(runs, images, weights, tmp_path, capsys) -> None:
    models: list[tuple[object, ...]] = []
    sources = []
    for name, run_dir in runs.items():
        models.append((run_dir,))
        sources.append(name)
        for kind in ("safetensors", "onnx") if name in ("lora", "int4") else ("safetensors",):
            assert command("export", run_dir, "--format", kind, "--output", tmp_path / f"{name}.{kind}") == 0
            models.append((tmp_path / f"{name}.{kind}",))
            sources.append(name)
        if name in ("lora", "theirs"):
            assert command("export", run_dir, "--output", tmp_path / name) == 0
            models.append((tmp_path / name, "--weights", weights))
            sources.append(name)
    printed = capsys.readouterr().out
    assert "12 validation images" in printed
    files = sorted(images.rglob("*.png"))
    for model, name, found in zip(models, sources, predicted_elsewhere(models, images), strict=True):
        wanted = expected(runs[name], files)
        assert list(found) == files
        exact = name != "by_row" or model == (runs[name],)
        for file in files:
            if exact:
                assert found[file][0] == wanted[file][0], (model, file)
                assert found[file][1] == pytest.approx(wanted[file][1], abs=2e-3 if name == "nf4" else 1e-3), model
        if not exact:  # quantized anew: another model, near the trained one
            assert np.mean([found[file][0] == wanted[file][0] for file in files]) > 0.5


def report(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert command("export", *arguments) == 0
    return capsys.readouterr().out


def test_merge_errors_are_printed(runs, tmp_path, capsys) -> None:
    printed = report(capsys, runs["int4"], "--format", "safetensors", "--output", tmp_path / "model.safetensors")
    errors = {
        dtype: float(error)
        for dtype, error in re.findall(
            r"with (float\d\d) offsets: relative error of the weights at most (\S+)", printed
        )
    }
    assert errors["float32"] < 1e-6 < errors["float16"] < 5e-3
    assert "stored: float16 offsets" in printed
    assert "100.00 % of predictions equal" in printed
    printed = report(capsys, runs["by_row"], "--format", "safetensors", "--output", tmp_path / "model.safetensors")
    assert "quantized anew" in printed
    assert re.search(r"with codes: relative error of the weights at most \d\.\de-\d\d \(blocks\.", printed)
    before, after = re.findall(r"accuracy (\S+) % before and (\S+) % after", printed)[0]
    assert float(before) == pytest.approx(100 * restore_run(runs["by_row"]).record.validation.accuracy, abs=0.01)
    assert 0 <= float(after) <= 100


def test_missing_images_are_said(runs, images, tmp_path, capsys) -> None:
    hidden = images.with_name("hidden")
    images.rename(hidden)
    try:
        printed = report(capsys, runs["by_row"], "--format", "safetensors", "--output", tmp_path / "model.safetensors")
    finally:
        hidden.rename(images)
    assert "Not compared with the run's model" in printed
    assert str(images) in printed
    assert (tmp_path / "model.safetensors").exists()


def test_bad_images_are_named_and_the_others_predicted(runs, images, tmp_path, capsys) -> None:
    good = images / "class_0" / "00.png"
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    bad = [tmp_path / "text.png", tmp_path / "nowhere.png", tmp_path / "empty"]
    assert command("predict", runs["lora"], bad[0], good, *bad[1:], good) == 1
    captured = capsys.readouterr()
    assert [line.split("\t")[0] for line in captured.out.splitlines()] == [str(good), str(good)]
    assert [str(path) in line for path, line in zip(bad, captured.err.splitlines(), strict=True)] == [True] * 3


def refusal(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert command(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_names_of_others_do_nothing_to_the_terminal(images, tmp_path, capsys) -> None:
    names = ("\x1b[2Ja", "two\nlines\tand a tab", "\u202egnp")
    card = ModelCard(
        run="s/e/seed_0",
        model="test_vit",
        weights_name="none",
        weights_sha256=None,
        image_size=32,
        channels=3,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.25),
        class_names=names,
    )
    save_low_bit(timm.create_model("test_vit", img_size=32, num_classes=3), tmp_path / "model.safetensors", card)
    files = [tmp_path / name for name in ("\x1b]0;title\x07.png", "a\nb.png", "\udce9.png", "bad\x9b.png")]
    for file in files[:3]:
        shutil.copy(images / "class_0" / "00.png", file)
    assert command("predict", tmp_path / "model.safetensors", *files) == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3
    assert all(len(line.split("\t")) == 3 for line in captured.out.splitlines())
    for line in (*captured.out.splitlines(), *captured.err.splitlines()):
        assert line.replace("\t", "").isprintable()
    assert r"\x9b" in captured.err


def test_what_is_no_model_is_refused(runs, images, weights, tmp_path, capsys) -> None:
    image = images / "class_0" / "00.png"
    assert "expected a .safetensors or .onnx file" in refusal(capsys, "predict", tmp_path, image)
    (tmp_path / "cut.onnx").write_bytes(b"")
    assert "cut.onnx" in refusal(capsys, "predict", tmp_path / "cut.onnx", image)
    assert "--weights" in refusal(capsys, "predict", tmp_path / "cut.onnx", image, "--weights", "hub")
    assert "ends in .onnx" in refusal(
        capsys, "export", runs["lora"], "--format", "onnx", "--output", tmp_path / "x.bin"
    )
    command("export", runs["lora"], "--output", tmp_path / "peft")
    assert "give their path with --weights" in refusal(capsys, "predict", tmp_path / "peft", image)
    save_file(timm.create_model("test_vit", img_size=32).state_dict(), tmp_path / "other.safetensors")
    line = refusal(capsys, "predict", tmp_path / "peft", image, "--weights", tmp_path / "other.safetensors")
    assert "name the right ones" in line
    card = tmp_path / "peft" / "peft_vit.json"
    content = json.loads(card.read_text())
    card.write_text(json.dumps(content | {"class_names": ["a", "b"]}))
    line = refusal(capsys, "predict", tmp_path / "peft", image, "--weights", weights)
    assert "head.weight: expected shape (2, " in line
    assert line.endswith("; or peft_vit.json is wrong")
    card.write_text(json.dumps(content | {"model": "no_vit"}))
    line = refusal(capsys, "predict", tmp_path / "peft", image, "--weights", weights)
    assert "peft_vit.json: backbone.model: unknown model" in line
    card.unlink()
    assert "peft_vit.json" in refusal(capsys, "predict", tmp_path / "peft", image)


def test_quantized_runs_go_elsewhere_than_to_peft(runs, tmp_path, capsys) -> None:
    line = refusal(capsys, "export", runs["int4"], "--output", tmp_path / "peft")
    assert "--format safetensors or onnx" in line
