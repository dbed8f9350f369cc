"""The seconds of one model's calls, measured in a process of its own.

Several runtimes in one process disturb each other's thread pools, and ratios come out up to twice as large. The process
runs this file as a script, which imports nothing of the package for an .onnx or .xml file: torch is not in there.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from peft_vit.core.backbones import Architecture
    from peft_vit.deploy import ExportMetadata

_WARM_UP = 3  # calls that are not counted
_ROUNDS = 10  # of a model with random weights, that are


class Calls(NamedTuple):
    """What each call of a model took."""

    seconds: tuple[float, ...]
    processor_s: tuple[float, ...]  # of all threads; on a busy machine it says more, if there is one thread


def time_alone(file: Path, batches: Sequence[int], *, threads: int, rounds: int) -> dict[int, Calls]:
    """Start a process, open a model there, and time its calls on random images, a batch size after the other.

    Args:
        file: what `open_exported` takes. It is trusted: open it once before, which checks its hash.
        batches: numbers of images a call.
        threads: that the runtime may use.
        rounds: calls that are timed, of each batch size.

    Returns:
        the calls by batch size.

    Raises:
        UserError: if the process fails, which a runtime or the lack of memory can bring about.
    """
    from peft_vit.base.errors import UserError
    from peft_vit.deploy.formats.runtimes import SETTINGS

    job = {"file": str(file), "batches": list(batches), "threads": threads, "rounds": rounds}
    # -P: what lies beside this file is not found as modules of its own
    command = [sys.executable, "-P", __file__, json.dumps(job | {"openvino": SETTINGS})]
    done = subprocess.run(command, capture_output=True, encoding="locale", check=False, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"])[-1]
        raise UserError(f"can't be timed with {threads} threads ({reason})", file=file)
    timings = json.loads(done.stdout.splitlines()[-1])
    return {int(batch): Calls(tuple(wall), tuple(processor)) for batch, wall, processor in timings}


def export_random(card: ExportMetadata, file: Path) -> None:
    """Write a model with random weights as ONNX: they take the same time as trained ones."""
    from peft_vit.core.backbones.catalog import create_model
    from peft_vit.deploy import export_onnx

    export_onnx(create_model(card.architecture, card.image_size, len(card.class_names)).eval(), file, card)


def time_random(architecture: Architecture, image_size: int, class_names: Sequence[str], threads: int) -> float:
    """Return the median seconds of one image, of an ONNX export with random weights."""
    from peft_vit.deploy.measures.check import card_of_random

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export_random(card_of_random(architecture, image_size, class_names, "timed"), file)
        calls = time_alone(file, [1], threads=threads, rounds=_ROUNDS)
    return statistics.median(calls[1].seconds)


def _measure(job: dict[str, Any]) -> list[tuple[int, list[float], list[float]]]:
    openers = {".onnx": _open_onnx, ".xml": _open_openvino}
    call, side = openers.get(Path(job["file"]).suffix, _open_torch)(job)
    timings = []
    for batch in job["batches"]:
        images = np.random.default_rng(0).standard_normal((batch, 3, side, side), dtype=np.float32)
        wall, processor = [], []
        for _ in range(_WARM_UP + job["rounds"]):
            started, worked = time.perf_counter(), time.process_time()
            call(images)
            wall.append(time.perf_counter() - started)
            processor.append(time.process_time() - worked)
        timings.append((batch, wall[_WARM_UP:], processor[_WARM_UP:]))
    return timings


_Opened = tuple[Callable[[np.ndarray], Any], int]  # images (B, 3, S, S) -> logits; S


def _open_onnx(job: dict[str, Any]) -> _Opened:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    session = onnxruntime.InferenceSession(job["file"], options, providers=["CPUExecutionProvider"])
    images_input = session.get_inputs()[0]
    return lambda images: session.run(None, {images_input.name: images}), images_input.shape[-1]


def _open_openvino(job: dict[str, Any]) -> _Opened:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as `extras.load_openvino`
    import openvino

    settings = job["openvino"] | {"INFERENCE_NUM_THREADS": job["threads"]}
    compiled = openvino.Core().compile_model(job["file"], "CPU", settings)
    return compiled, compiled.input(0).partial_shape[-1].get_length()


def _open_torch(job: dict[str, Any]) -> _Opened:
    import torch

    from peft_vit.deploy import open_exported

    torch.set_num_threads(job["threads"])
    classifier = open_exported(Path(job["file"]))
    return classifier.logits, classifier.card.image_size


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
