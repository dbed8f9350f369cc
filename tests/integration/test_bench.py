"""`peft-vit bench`: a row a model, batch size and number of threads, ratios of medians over float32, and bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_files import packed_model
from tiny_models import CARD, random_model

from peft_vit.base.errors import UserError
from peft_vit.core.quantization import QuantizationFormat
from peft_vit.core.records import BenchRow
from peft_vit.deploy import export_onnx, export_openvino, save_low_bit
from peft_vit.deploy.formats.runtimes import SETTINGS
from peft_vit.deploy.measures import bench as benching
from peft_vit.deploy.measures import timing
from peft_vit.deploy.measures.timing import Calls
from peft_vit.runs.records.storage import read_bench

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("cache")

SECONDS = {"float.xml": 2.0, "float.onnx": 4.0, "int4.onnx": 3.0, "int4.safetensors": 9.0}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = tmp_path_factory.mktemp("exported"), random_model("shallow_vit").eval()
    card = CARD.model_copy(update={"model": "shallow_vit"})
    for write, name in ((export_onnx, "float.onnx"), (export_openvino, "float.xml")):
        write(model, folder / name, card)
    formats = [QuantizationFormat("int4", 32, True, torch.float16)]
    export_onnx(packed_model(formats, model), folder / "int4.onnx", card)
    save_low_bit(packed_model(formats), folder / "int4.safetensors", CARD)  # which another process builds
    return folder


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Let each file take known seconds, times threads and batch, with one slow call; return what was asked for."""
    requests: list[tuple[Any, ...]] = []

    def known(file: Path, batches: Any, *, threads: int, rounds: int) -> dict[int, Calls]:
        requests.append((file.name, tuple(batches), threads, rounds))
        usual = SECONDS.get(file.name, 6.0)
        each = {batch: [usual * batch / threads] * (rounds - 1) + [1000.0] for batch in batches}
        return {batch: Calls(tuple(values), tuple(values)) for batch, values in each.items()}

    monkeypatch.setattr(benching, "time_alone", known)
    monkeypatch.setattr(benching, "cpu_count", lambda: 4)
    return requests


def rows_of(file: Path) -> dict[tuple[str, int, int], BenchRow]:
    return {(Path(row.file).name, row.batch, row.threads): row for row in read_bench(file)}


def test_real_processes_give_a_row_a_model_and_batch_size(exported, run_of, tmp_path, command) -> None:
    models = [exported / name for name in ("int4.onnx", "float.xml", "int4.safetensors")]
    output = tmp_path / "bench.json"
    printed = command(
        "bench", *models, "--batch-size", "2,1", "--threads", 1, "--rounds", 3, "--repeats", 1, "--output", output
    )
    rows = rows_of(output)
    assert list(rows) == [(model.name, batch, 1) for batch in (1, 2) for model in models]
    for (name, batch, _), row in rows.items():
        base = rows["float.xml", batch, 1]
        assert row.ratio == row.median_s / base.median_s
        assert row.images_per_s == batch / row.median_s
        assert row.low_s <= row.median_s <= row.high_s
        assert (row.calls, row.over) == (3, str(exported / "float.xml"))
        assert row.run == CARD.run
        assert name in printed.out
    sizes = {name: row.bytes for (name, _, _), row in rows.items()}
    assert sizes["float.xml"] == sum((exported / f"float.{ending}").stat().st_size for ending in ("xml", "bin"))
    assert sizes["int4.onnx"] == models[0].stat().st_size
    assert [row.runtime.split()[0] for row in rows.values()][:3] == ["onnxruntime", "openvino", "torch"]


def test_ratios_are_over_the_fastest_float32_model_at_each_setting(exported, planted, tmp_path, command) -> None:
    names, output = [*SECONDS], tmp_path / "bench.json"
    models = [exported / name for name in names]
    options = ("--batch-size", 1, "--batch-size", "8, 8", "--threads", "1,2", "--rounds", 5, "--repeats", 2)
    printed = command("bench", *models, *options, "--output", output)
    assert planted == [(name, (1, 8), threads, 5) for _ in range(2) for threads in (1, 2) for name in names]
    rows = rows_of(output)
    assert list(rows) == [(name, batch, threads) for threads in (1, 2) for batch in (1, 8) for name in names]
    for (name, batch, threads), row in rows.items():
        assert row.median_s == SECONDS[name] * batch / threads
        assert (row.calls, row.ratio, row.over) == (10, SECONDS[name] / 2, str(exported / "float.xml"))
    line = next(line for line in printed.out.splitlines() if "int4.safetensors" in line)
    assert line.split()[-2:] == ["4.500", "0.1"]


def test_of_runs_the_merged_model_is_timed_and_float32_is_made(run_of, planted, tmp_path, command) -> None:
    output = tmp_path / "bench.json"
    command("bench", run_of("int4"), "--threads", 2, "--output", output)
    assert [name for name, *_ in planted] == ["float32.onnx", "0.safetensors"] * 3
    made, packed = read_bench(output)
    assert (made.file, made.format, made.run, made.ratio) == (benching.RANDOM_FLOAT32, "onnx", None, 1.0)
    assert (packed.file, packed.format, packed.run) == (str(run_of("int4")), "safetensors", "tiny/int4/seed_0")
    assert packed.over == benching.RANDOM_FLOAT32
    assert packed.bytes < made.bytes / 2


def test_a_run_with_float_weights_is_float32_itself_and_a_peft_folder_is_none(
    run_of, planted, tmp_path, command, refused
) -> None:
    command("export", run_of("lora", "shallow_vit"), "--format", "peft", "--output", tmp_path / "adapter")
    command("bench", run_of("lora", "shallow_vit"), "--output", tmp_path / "bench.json")
    assert planted[:1] == [("0.safetensors", (1,), 4, 20)]
    assert [row.ratio for row in read_bench(tmp_path / "bench.json")] == [1.0]
    assert "adapter: is an adapter without its base" in refused("bench", tmp_path / "adapter")


def test_what_can_not_be_timed_is_one_line_before_anything_is(exported, planted, tmp_path, refused, without) -> None:
    model, unknown, changed = exported / "float.onnx", tmp_path / "model.txt", tmp_path / "changed.xml"
    unknown.write_text("no model")
    there = tmp_path / "there.csv"
    there.touch()
    shutil.copy(exported / "float.bin", changed.with_suffix(".bin"))
    changed.write_bytes((exported / "float.xml").read_bytes().replace(b"shallow_vit", b"shallow_vat"))
    for arguments, stated in (
        ((model, unknown), "model.txt: "),
        ((tmp_path / "no.onnx",), "no.onnx: "),
        ((model, "--batch-size", "1,0"), "--batch-size: "),
        ((model, "--threads", 5), "--threads: "),
        ((model, "--output", tmp_path / "bench.txt"), "bench.txt: --output: "),
        ((model, "--output", there), "there.csv: --output: "),
        ((model, changed), "changed.xml: "),
    ):
        assert stated in refused("bench", *arguments)
    without("onnxruntime")
    line = refused("bench", exported / "int4.safetensors")
    assert "no float32 model is named, and none can be made: ONNX export needs" in line
    assert not planted


@pytest.mark.parametrize("content", ["[{}]", "{", "[1]", None])
def test_a_file_of_times_is_checked(tmp_path, content) -> None:
    file = tmp_path / "bench.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError) as refused:
        read_bench(file)
    assert refused.value.file == str(file)
    file.write_text("[]")
    assert read_bench(file) == ()


# --- the process in which one is timed ---


def test_torch_is_not_where_other_runtimes_are_timed(exported) -> None:
    timed = [exported / name for name in ("float.onnx", "float.xml", "int4.safetensors")]
    program = (
        "import importlib.util, json, sys\n"
        "spec = importlib.util.spec_from_file_location('timing', sys.argv[1])\n"
        "timing = sys.modules['timing'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(timing)\n"
        "for job in json.loads(sys.argv[2]):\n"
        "    ((batch, wall, processor),) = timing._measure(job)\n"
        "    assert (batch, len(wall), len(processor)) == (2, 1, 1)\n"
        "    loaded = job['file'].rpartition('.')[2], 'torch' in sys.modules, 'peft_vit' in sys.modules\n"
        "    print(*loaded)\n"
    )
    shared = {"batches": [2], "threads": 1, "rounds": 1, "weights": None, "openvino": SETTINGS}
    jobs = json.dumps([{"file": str(file), **shared} for file in timed])
    command = [sys.executable, "-P", "-c", program, timing.__file__, jobs]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == ["onnx False False", "xml False False", "safetensors True True"]


def test_openvino_is_asked_for_the_threads_and_for_products_in_float32(exported) -> None:
    compiled, side = timing._open_openvino({"file": str(exported / "float.xml"), "threads": 1, "openvino": SETTINGS})
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert compiled.get_property("EXECUTION_MODE_HINT").name == "ACCURACY"
    assert side == CARD.image_size


def test_a_process_that_fails_is_one_line(tmp_path) -> None:
    file = tmp_path / "broken.onnx"
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"broken\.onnx: can't be timed with 1 threads \(.*Protobuf"):
        timing.time_alone(file, [1], threads=1, rounds=1)
