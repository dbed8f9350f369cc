"""How many training images GPTQ needs to round a LoRA's weights to nf4: what is lost, and how long it takes.

    .venv/bin/python -m experiments.calibration.scripts.rounding_images RUN_DIR...

merges each float run, rounds it to nearest and by GPTQ on 16, 32 and 128 training images (or all that there are), and
adds a row each to results/rounding_images.csv: points of accuracy on the run's test images that rounding changed, the
mean Kullback-Leibler divergence of its predictions from the float model's (nats), and seconds of one
processor. `--table` prints means, with half of a 95 % interval over runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import log_softmax

from benchmarks.common import append_row
from peft_vit.base.statistics import mean_interval
from peft_vit.core.training import Calibration, RuntimeConfig
from peft_vit.core.training.images import LabelledImages
from peft_vit.core.training.metrics import predict
from peft_vit.deploy import ExportMetadata
from peft_vit.deploy.export import merge_float, round_weights
from peft_vit.deploy.restore import restore_run

RESULTS = Path(__file__).parents[1] / "results" / "rounding_images.csv"
_COUNTS = (0, 16, 32, 128)
_CPU = torch.device("cpu")


def rows_of(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each number of images."""
    run = restore_run(folder)
    merged, data = merge_float(run).model.eval(), run.load_data()
    images = Calibration(data, RuntimeConfig(_CPU, "fp32", run.card.mean, run.card.std), run.record.spec.seed)
    tested = data.test.open()
    exact = _logits(merged, tested, run.card)  # (N, classes)
    for count in _COUNTS:
        began = time.process_time()
        rounded = round_weights(merged, "nf4", images.images(count) if count else None)
        seconds = time.process_time() - began
        logits = _logits(rounded, tested, run.card)
        right, as_float = (own.argmax(1) == tested.labels for own in (logits, exact))
        own, floats = log_softmax(logits, 1), log_softmax(exact, 1)
        yield {
            "set": run.record.spec.data.dataset,
            "seed": run.record.spec.seed,
            "train_images": len(data.train),
            "images": min(count, len(data.train)),
            "points": 100 * float(right.mean() - as_float.mean()),
            "divergence": float((np.exp(floats) * (floats - own)).sum(1).mean()),
            "seconds": seconds,
        }


def _logits(model: torch.nn.Module, images: LabelledImages, card: ExportMetadata) -> np.ndarray[Any, Any]:
    batches = images.ordered_batches(32, card.mean, card.std)
    return predict(model, batches, precision="fp32")[0].astype(np.float64)


def table() -> Iterator[str]:
    """Yield a line for each set and number of images."""
    yield "| images | rounded by | runs | points | divergence | seconds |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for (name, count), own in pd.read_csv(RESULTS).groupby(["set", "images"]):
        points = mean_interval(own.points)
        half = ((points.high or 0.0) - (points.low or 0.0)) / 2
        means = own[["divergence", "seconds"]].mean()
        how = f"{count:.0f}" if count else "to nearest"
        yield (
            f"| {name} | {how} | {len(own)} | {points.estimate:+.2f} ± {half:.2f} | {means.divergence:.4f} | "
            f"{means.seconds:.1f} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for run_dir in options.runs:
        for row in rows_of(run_dir):
            append_row(RESULTS, list(row), row)
            print(row, flush=True)
    if options.table:
        print(*table(), sep="\n")
