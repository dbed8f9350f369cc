"""Runs whose head reads the class tokens of four blocks train, resume, return, and leave as files that say the same."""

import base64
import gzip
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny_models  # noqa: F401  registers four_blocks
import torch
from exported_files import logits_of
from written_runs import TRAINING, plan_of, run_and_write, stopped_and_continued, tiny_study

from peft_vit import Bundle
from peft_vit.deploy import open_exported
from peft_vit.deploy.bundle import export_bundle
from peft_vit.deploy.restore import restore_run
from peft_vit.runs.records.run_rows import outcome_digest
from peft_vit.runs.records.storage import read_record

pytestmark = pytest.mark.usefixtures("cache")
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NAMES = ("linear", "lora", "int4")


@pytest.fixture(scope="module")
def done(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a finished run of a method with such a head, which begins as a probe."""
    backbone = {"model": "four_blocks", "weights": "random", "head_blocks": 4}

    @cache
    def one(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        mapping = tiny_study(name, images=images, backbone=backbone, measures={"features": True})
        if name != "linear":
            mapping["experiments"][0]["training"] = {**TRAINING, "head_start": "probe"}
        (planned,) = plan_of(mapping, folder).runs
        record = run_and_write(planned.spec, folder)
        assert record.status == "done", record.traceback
        return folder / planned.spec.run_id

    return one


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(IMAGES)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_has_such_a_head_and_comes_back_with_it(done, name) -> None:
    run = restore_run(done(name))
    assert run.record.parameters.head == 3 * (4 * 64 + 1)
    assert run.model.head.weight.shape == (3, 256)
    assert run.record.test.accuracy > 0.5  # of three classes
    assert run.card.head_blocks == 4


@pytest.mark.parametrize("name", ["lora", "int4"])
def test_a_stopped_run_comes_to_the_same_end(done, tmp_path, name) -> None:
    whole = read_record(done(name) / "record.json")
    again = stopped_and_continued(whole.spec, tmp_path)
    assert again.error is None
    assert outcome_digest(again) == outcome_digest(whole)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "safetensors") for name in NAMES),
        ("lora", "onnx"),
        ("int4", "openvino"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("int4", "onnx"), ("linear", "onnx"))),
        *(pytest.param(name, "openvino", marks=pytest.mark.slow) for name in ("linear", "lora")),
    ],
)
def test_an_exported_file_computes_the_same(done, tmp_path, command, name, kind) -> None:
    for package in {"onnx": ("onnxscript", "onnxruntime"), "openvino": ("openvino", "onnxscript")}.get(kind, ()):
        pytest.importorskip(package)
    file = tmp_path / f"model.{'xml' if kind == 'openvino' else kind}"
    printed = command("export", done(name), "--format", kind, "--output", file).out
    assert "100.00 % of predictions equal" in printed
    run = restore_run(done(name))
    assert open_exported(file).card == run.card
    expected = logits(run.model)
    tolerance = 1e-5 if name != "int4" else 2e-2  # of offsets, which are rounded to float16
    torch.testing.assert_close(logits_of(file, IMAGES), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.slow
def test_packed_after_training_it_is_the_page_s_model(done, tmp_path, command) -> None:
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    command("export", done("lora"), "--format", "web", "--output", tmp_path / "page")
    (encoded,) = re.findall(r"[A-Za-z0-9+/=]{10000,}", (tmp_path / "page" / "model.js").read_text())
    (tmp_path / "model.onnx").write_bytes(gzip.decompress(base64.b64decode(encoded)))
    expected = logits(restore_run(done("lora")).model)
    torch.testing.assert_close(logits_of(tmp_path / "model.onnx", IMAGES), expected, rtol=0, atol=1e-4)
    command("export", done("lora"), "--bits", "4", "--output", tmp_path / "packed.onnx")
    assert open_exported(tmp_path / "packed.onnx").card.head_blocks == 4


def test_a_bundle_says_the_same(done, tmp_path) -> None:
    runs = [done("lora").rename(tmp_path / "lora"), done("linear").rename(tmp_path / "linear")]
    try:
        export_bundle(runs, tmp_path / "bundle", bits=32)
    finally:
        for run, name in zip(runs, ("lora", "linear"), strict=True):
            run.rename(done(name))
    bundle = Bundle.load(tmp_path / "bundle")
    for name in ("lora", "linear"):
        expected = logits(restore_run(done(name)).model)
        stored = torch.from_numpy(np.stack(bundle.logits(IMAGES.numpy(), name)))
        torch.testing.assert_close(stored, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("pretrained", "--format: can't hold this model's head, which reads several blocks (backbone.head_blocks)"),
        ("peft", "PEFT can't load a head that reads several blocks (backbone.head_blocks)"),
    ],
)
def test_what_has_no_place_for_the_head_is_refused(done, tmp_path, refused, kind, reason) -> None:
    assert reason in refused("export", done("lora"), "--format", kind, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
