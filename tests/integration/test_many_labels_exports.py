"""Models of several labels, and of numbers, in every form that export writes: they say what the run's model says."""

import json
import re
from functools import cache
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import tiny_models  # noqa: F401 - which registers shallow_vit

from peft_vit import train
from peft_vit.runs.records.storage import RECORD_FILE, read_record, single_run

pytestmark = [pytest.mark.part("runner"), pytest.mark.usefixtures("cache", "in_this_process")]
SMALL = {
    "model": "shallow_vit",
    "weights": "random",
    "image_size": 32,
    "threads": 1,
    "precision": "fp32",
    "device": "cpu",
}
TABLES = ["labels", "numbers"]
WORDS = {"labels": "mean average precision", "numbers": "mean absolute error"}


@pytest.fixture(scope="module")
def run_on(images, _session_cache, tmp_path_factory):
    """Return the folder of a model that learned a table of 48 images of three colours; each is trained once."""
    root = tmp_path_factory.mktemp("tables")
    files = sorted(images.rglob("*.png"))
    rng = np.random.default_rng(0)
    classes = [int(file.parent.name[-1]) for file in files]
    cells = {
        "labels": ("warm,cold", [f"{int(k < 2)},{int(k > 0)}" for k in classes]),
        "numbers": ("heat", [round(10 * k + rng.normal(), 2) for k in classes]),
    }

    @cache
    def done(table: str, method: str = "lora") -> Path:
        columns, rows = cells[table]
        lines = [f"path,{columns}", *(f"{file},{row}" for file, row in zip(files, rows, strict=True))]
        (root / f"{table}.csv").write_text("\n".join(lines) + "\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PEFT_VIT_CACHE", _session_cache)
            patch.setattr("peft_vit.fit.fit.FEWEST_VALIDATION", 0)
            length = {} if method.endswith("linear") else {"steps": 8}
            asked = {"test_images": 3, "output": root / f"{table}_{method}", **length, **SMALL}  # so that 9 validate
            return train(root / f"{table}.csv", method, **asked).path

    return done


def said(command, model, images) -> list[dict]:
    words = ["predict", model, images / "class_0/00.png", images / "class_2/01.png", "--coverage", "80"]
    rows = json.loads(command(*words, "--format", "json").out)
    return [{key: value for key, value in row.items() if key != "file"} for row in rows]


def same(rows, others, within: float) -> None:
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            assert other[key] == (pytest.approx(value, abs=within) if isinstance(value, float) else value), key


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    "output",
    [
        "a.safetensors",
        "peft",
        "--bundle",
        *(pytest.param(slow, marks=pytest.mark.slow) for slow in ("a.onnx", "a.xml", "pretrained")),
    ],
)
def test_every_exported_form_tells_labels_and_numbers_alike(command, run_on, images, tmp_path, table, output) -> None:
    if output == "a.xml":
        pytest.importorskip("openvino")
    folder, model = run_on(table), tmp_path / output.removeprefix("--")
    form = ["--format", output] if output in ("pretrained", "peft") else []
    words = ["--bundle", model] if output == "--bundle" else [*form, "--output", model]
    told = command("export", folder, *words).out
    if output != "peft":
        assert f"{WORDS[table]} " in told
    rows = said(command, folder, images)
    if table == "labels":
        assert rows[0]["labels"] == ["warm"]
        assert "warm" in rows[0]["set"]
    else:
        assert rows[0]["heat_low"] < rows[0]["heat"] < rows[0]["heat_high"]
    if output == "--bundle":  # which keeps no features of training images
        rows = [{key: value for key, value in row.items() if key != "unlike"} for row in rows]
    same(rows, said(command, model, images), 1e-2 if output == "--bundle" else 1e-3)  # its updates have 16 bits


ROUNDED = {"bits": "--bits 4 --output m.safetensors", "int8": "--activations int8 --accept-loss 100 --output m.onnx"}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("how", ["bits", pytest.param("int8", marks=pytest.mark.slow)])
def test_what_rounding_loses_is_told_in_what_decides(
    command, run_on, images, tmp_path, monkeypatch, table, how
) -> None:
    monkeypatch.chdir(tmp_path)
    told = command("export", run_on(table), *ROUNDED[how].split()).out
    value = r"[\d.]+ %" if table == "labels" else r"[\d.]+"
    assert re.search(rf"{WORDS[table]} {value} before and {value} after", told)
    unit = "points of" if table == "labels" else "hundredths of a standard deviation in"
    assert re.search(rf"It (lost|gained) [\d.]+ {unit} {WORDS[table]} on 9 validation images", told)
    rows = said(command, Path(ROUNDED[how].split()[-1]), images)
    same(rows, said(command, run_on(table), images), 0.3 if table == "labels" else 6)


@pytest.mark.parametrize("table", TABLES)
def test_a_page_for_a_browser_knows_thresholds_and_units(command, run_on, tmp_path, table) -> None:
    command("export", run_on(table), "--output", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    (found,) = re.findall(r'<script type="application/json" id="facts">(.*?)</script>', text)
    facts, decision = json.loads(found), read_record(single_run(run_on(table)) / RECORD_FILE).decision
    assert facts["kind"] == table
    if table == "labels":
        assert facts["thresholds"] == [*decision.thresholds]
        assert facts["set"]["threshold"] == decision.threshold(0.9)[0]
        assert "which of 2 labels it has: warm, cold" in text
        assert "The set at 90 % holds about 90 % of an image's labels on average" in unescape(text)
    else:
        assert (facts["center"], facts["spread"]) == ([*decision.center], [*decision.spread])
        assert facts["set"]["scale"] == [[*own] for own in decision.scale]
        assert "it says a number: heat" in text


@pytest.mark.parametrize("table", TABLES)
def test_a_probe_on_packed_weights_is_told_and_exported(command, run_on, images, tmp_path, table) -> None:
    folder = run_on(table, "qa_linear")
    command("export", folder, "--output", tmp_path / "p.safetensors")
    same(said(command, folder, images), said(command, tmp_path / "p.safetensors", images), 1e-3)
