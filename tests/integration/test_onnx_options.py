"""How `export --format onnx` multiplies by low-bit weights, as the command line is asked for it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import small_methods

from peft_vit.runs import export
from peft_vit.statistics import paired_proportions

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("cache")


def test_fast_computes_what_the_run_does(run_of, tmp_path, command) -> None:
    file = tmp_path / "model.onnx"
    said = command("export", run_of("int4"), "--format", "onnx", "--runtime", "fast", "--output", file).out
    assert "12 validation images, float32: 100.00 % of predictions equal" in said
    assert "Lost:" not in said


def test_int8_says_what_it_loses(run_of, images, tmp_path, command) -> None:
    file = tmp_path / "model.onnx"
    asked = ("--format", "onnx", "--activations", "int8", "--accept-loss", "100", "--output", file)
    said = command("export", run_of("int4"), *asked).out
    before, after = map(float, re.findall(r"12 validation images, int8: .* (\S+) % before and (\S+) % after", said)[0])
    lost, low, high = map(
        float,
        re.findall(r"Lost: (\S+) points of accuracy on 12 validation images \(95 % interval (\S+) to (\S+)\)", said)[0],
    )
    assert lost == pytest.approx(before - after, abs=0.02)
    assert low < lost < high
    assert command("predict", file, images / "class_0" / "00.png").out.count("\t") == 2


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every file lose one point of accuracy on 400 images: 8 gone and 4 new."""
    compare = export.compare

    def worse(*sides: object) -> export.Comparison:
        return dataclasses.replace(compare(*sides), accuracy_loss=paired_proportions(8, 4, 400))

    monkeypatch.setattr(export, "compare", worse)


@pytest.mark.usefixtures("losing")
def test_more_than_half_a_point_has_to_be_accepted(run_of, tmp_path, command, refused) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"as before")
    asked = ("export", run_of("int4"), "--format", "onnx", "--output", file, "--activations", "int8")
    line = refused(*asked)
    assert re.search(
        r"--activations: int8 loses 1\.00 points of accuracy on 400 validation images \(95 % interval ", line
    )
    assert "more than the 0.5 that are accepted" in line
    assert line.endswith("--accept-loss 1")
    assert file.read_bytes() == b"as before"
    assert "more than the 0.9" in refused(*asked, "--accept-loss", "0.9")
    assert "Lost: 1.00 points" in command(*asked, "--accept-loss", "1").out
    assert file.stat().st_size > 10_000


INT8 = ("--activations", "int8")


@pytest.mark.parametrize(
    ("run", "format", "options", "said"),
    [
        ("int4", "openvino", ("--runtime", "fast"), "--runtime: has no effect with --format openvino"),
        ("int4", "history", ("--runtime", "small"), "--runtime: has no effect with --format history"),
        ("int4", "safetensors", INT8, "--activations: has no effect with --format safetensors"),
        ("int4", "peft", ("--accept-loss", "1"), "--accept-loss: has no effect with --format peft"),
        ("int4", "onnx", ("--runtime", "quick"), "'quick' is not one of 'small', 'fast'"),
        ("int4", "onnx", ("--activations", "int4"), "'int4' is not one of 'int8'"),
        ("lora", "onnx", ("--runtime", "fast"), "--runtime: has no effect on this run, whose weights are floats"),
        ("lora", "onnx", INT8, "--activations: has no effect on this run, whose weights are floats"),
        ("int4", "onnx", ("--accept-loss", "1"), "--accept-loss: has no effect without --activations"),
        ("int4", "onnx", (*INT8, "--runtime", "small"), "--activations: has no effect with --runtime small"),
        *(("int4", "onnx", (*INT8, "--accept-loss", points), "--accept-loss") for points in ("-1", "nan", "101")),
    ],
)
def test_options_without_effect_are_refused(run, format, options, said, run_of, tmp_path, refused) -> None:
    ending = {"openvino": "xml", "history": "csv"}.get(format, format)
    assert said in refused(
        "export", run_of(run), "--format", format, "--output", tmp_path / f"model.{ending}", *options
    )
    assert not list(tmp_path.iterdir())


def test_int2_has_no_products_in_8_bits(
    run_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path, refused
) -> None:
    int4 = small_methods.EXPERIMENTS["int4"]
    int2 = int4 | {"qa_lora": int4["qa_lora"] | {"quantization_bits": 2, "quantization_type": "int2"}}
    monkeypatch.setitem(small_methods.EXPERIMENTS, "int2", int2)
    asked = ("--format", "onnx", "--output", tmp_path / "model.onnx", "--activations", "int8")
    line = refused("export", run_of("int2"), *asked)
    assert "blocks.0.attn.qkv is in int2, and int8 takes codes of 3, 4 or 8 bits" in line


def test_without_images_nothing_is_calibrated(run_of, images, tmp_path, refused) -> None:
    run_dir, hidden = run_of("int4"), images.with_name("hidden")
    images.rename(hidden)
    try:
        asked = ("--format", "onnx", "--output", tmp_path / "model.onnx", "--activations", "int8")
        line = refused("export", run_dir, *asked)
    finally:
        hidden.rename(images)
    assert "calibrated on the run's training images, and they are not there" in line
    assert str(images) in line
