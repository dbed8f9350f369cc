"""One model's calls are timed in a process of its own, by the runtime that its file is for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import CARD, SHALLOW_CARD, random_model

from peft_vit.base.errors import UserError
from peft_vit.deploy import export_onnx, export_openvino, save_low_bit
from peft_vit.deploy.formats.runtimes import SETTINGS
from peft_vit.deploy.measures import timing

pytest.importorskip("onnxscript")
WRITERS = {"onnx": export_onnx, "xml": export_openvino, "safetensors": save_low_bit}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    folder = tmp_path_factory.mktemp("timed")
    for ending, write in WRITERS.items():  # another process builds test_vit, which timm knows
        model, card = ("test_vit", CARD) if ending == "safetensors" else ("shallow_vit", SHALLOW_CARD)
        write(random_model(model).eval(), folder / f"model.{ending}", card)
    return {ending: folder / f"model.{ending}" for ending in WRITERS}


def test_torch_is_not_where_other_runtimes_are_timed(files) -> None:
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
    jobs = json.dumps([{"file": str(file), **shared} for file in files.values()])
    command = [sys.executable, "-P", "-c", program, timing.__file__, jobs]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == ["onnx False False", "xml False False", "safetensors True True"]


def test_openvino_is_asked_for_the_threads_and_for_products_in_float32(files) -> None:
    compiled, side = timing._open_openvino({"file": str(files["xml"]), "threads": 1, "openvino": SETTINGS})
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert compiled.get_property("EXECUTION_MODE_HINT").name == "ACCURACY"
    assert side == CARD.image_size


def test_a_process_that_fails_is_one_line(tmp_path) -> None:
    file = tmp_path / "broken.onnx"
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"broken\.onnx: can't be timed with 1 threads \(.*Protobuf"):
        timing.time_alone(file, [1], threads=1, rounds=1)
