"""How far finished runs can be believed: temperature from all or few validation images, and what they call unlike.

    .venv/bin/python -m experiments.few_labels.scripts.reliability RUN_FOLDER... [--icons FOLDER]

Runs of kept studies have no features, so everything is computed anew from the restored model; a row a run is printed
and put into results/reliability.csv. ECE is of ten bins of equal counts. `--icons`: a folder of images in classes, as a
further set of other images.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image

from experiments.scripts.evidence import merge
from peft_vit.base.files import write_atomically
from peft_vit.base.statistics import Neighbours, conformal_quantile, fit_temperature, probabilities
from peft_vit.base.statistics.reliability import ReliabilityBin, equal_count_bins
from peft_vit.core.config import DataConfig
from peft_vit.core.training.images import LabelledImages, normalised
from peft_vit.core.training.metrics import predict_with_middle
from peft_vit.data import open_index, to_pixels
from peft_vit.deploy.restore import RestoredRun, restore_run
from peft_vit.runs.measures.held_out import PRIOR, UNLIKE_COVERAGE, reference_images

ROWS = Path(__file__).resolve().parents[1] / "results" / "reliability.csv"
FEW, OTHERS = 24, 60  # validation images; images of each other set
SETS = ("elpv", "digits", "fashion-mnist")
CPU = torch.device("cpu")


def quality(logits: NDArray[np.float64], labels: NDArray[np.int64], temperature: float) -> dict[str, float]:
    """Return temperature, NLL and ECE."""
    p = probabilities(logits, temperature)
    nll = float(-np.log(p[np.arange(len(p)), labels].clip(1e-300)).mean())
    ece = calibration_error(equal_count_bins(p.max(1), p.argmax(1) == labels, 10))
    return {"temperature": round(temperature, 3), "nll": round(nll, 4), "ece": round(ece, 4)}


def calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Return the expected calibration error over bins: ``sum_m n_m / n |accuracy_m - confidence_m|``.

    It is biased upwards where bins hold few predictions, as their accuracy then strays by chance. Source: Naeini,
    Cooper & Hauskrecht, AAAI 2015; Guo et al. 2017, arXiv 1706.04599.
    """
    return math.fsum(b.count * abs(b.accuracy - b.confidence) for b in bins) / sum(b.count for b in bins)


def others(run: RestoredRun, icons: Path | None) -> dict[str, list[NDArray[np.uint8]]]:
    """Return noise of single pixels and of patches, and images of other sets, as the run's model would see them."""
    card, rng = run.card, np.random.default_rng(0)

    def seen(image: Image.Image) -> NDArray[np.uint8]:
        return to_pixels(image, card.image_size, card.channels, card.interpolation)

    def noise(side: int) -> list[NDArray[np.uint8]]:
        return [seen(Image.fromarray(rng.integers(0, 256, (side, side, 3)).astype(np.uint8))) for _ in range(OTHERS)]

    images = {"noise": noise(card.image_size), "coarse_noise": noise(card.image_size // 8)}
    configs = {name: {"dataset": name} for name in SETS if name != run.record.spec.data.dataset}
    if icons is not None:
        configs["icons"] = {"dataset": "image-folder", "path": str(icons)}
    for name, config in configs.items():
        index = open_index(DataConfig(image_size=card.image_size, validation_images=2, test_images=2, **config))
        rows = rng.choice(len(index.labels), OTHERS, replace=False)
        images[name] = [seen(index.read(int(row))) for row in rows]
    return images


def row(folder: Path, icons: Path | None) -> dict[str, object]:
    """Return what is measured of a run."""
    run = restore_run(folder)
    data, card, spec = run.load_data(), run.card, run.record.spec

    def outputs(images: LabelledImages) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float32]]:
        batches = images.ordered_batches(32, card.mean, card.std)
        logits, labels, middle = predict_with_middle(run.model, batches, precision=spec.precision)
        return logits.astype(np.float64), labels, middle

    def middle(pixels: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
        images = normalised(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), card.mean, card.std)
        batches = ((part, torch.zeros(len(part))) for part in images.split(32))
        return predict_with_middle(run.model, batches, precision=spec.precision)[2]

    held, held_labels, held_middle = outputs(data.validation)
    tested, labels, test_middle = outputs(data.test.open())
    few = np.random.default_rng(0).permutation(len(held))[:FEW]
    fits = {
        "raw": 1.0,
        "all": fit_temperature(held, held_labels, PRIOR),
        "few": fit_temperature(held[few], held_labels[few], PRIOR),
        "few_alone": fit_temperature(held[few], held_labels[few]),
        "test": fit_temperature(tested, labels),
    }
    known = Neighbours.of(outputs(reference_images(data, spec.seed))[2])
    threshold = conformal_quantile(known.distances(held_middle), UNLIKE_COVERAGE)

    def flagged(features: NDArray[np.float32]) -> float:
        return round(float((known.distances(features) > threshold).mean()), 4)

    return {
        "experiment": f"{spec.study}_{spec.experiment.name}",
        "seed": spec.seed,
        "train": len(data.train),
        "validation": len(held),
        "accuracy": round(float((tested.argmax(1) == labels).mean()), 4),
        **{f"{name}_{key}": value for name, t in fits.items() for key, value in quality(tested, labels, t).items()},
        "flagged_test": flagged(test_middle),
        **{f"flagged_{name}": flagged(middle(pixels)) for name, pixels in others(run, icons).items()},
    }


def main() -> None:
    """Measure runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--icons", type=Path)
    asked = parser.parse_args()
    for folder in asked.folders:
        measured = row(folder, asked.icons)
        print(measured, flush=True)
        present = ROWS.read_text(encoding="utf-8") if ROWS.exists() else None
        write_atomically(ROWS, merge(present, pd.DataFrame([measured])).encode())


if __name__ == "__main__":
    main()
