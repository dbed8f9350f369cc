"""What `training.augmentation` does to images: to each one with draws of its own, and at last to whole batches.

Draws follow from the run's seed and from epoch and image, or the step, alone: a run goes on to the bit without keeping
anything of them. Each entry of the list has a stream of its own: adding one leaves the draws of the others as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from peft_vit.config import Augmentation, ColorJitter, Cutmix, Flip, Mixup, RandAugment, RandomResizedCrop, Rotate90
from peft_vit.errors import UserError
from peft_vit.seeding import Purpose, numpy_generator, torch_generator

Change = Callable[[Tensor, np.ndarray], Tensor]  # of images (B, C, S, S) uint8, by their rows (B,) in the training set
_LARGEST_SEED = 2**63 - 1


def check_augmentation(augmentation: Sequence[Augmentation], channels: int) -> None:
    """Refuse what would change nothing in images of so many channels.

    Raises:
        UserError: naming the entry, below the experiment.
    """
    for place, one in enumerate(augmentation):
        jitter = one.color_jitter
        if jitter is not None and channels == 1 and (jitter.saturation or jitter.hue):
            raise UserError(
                "saturation and hue have no effect on grey images; write "
                f"`color_jitter: {{brightness: {jitter.brightness:g}, contrast: {jitter.contrast:g}, saturation: 0}}`",
                field=f"training.augmentation[{place}].color_jitter",
            )


def changes_of(augmentation: Sequence[Augmentation], images: int, size: int, seed: int, epoch: int) -> list[Change]:
    """Return what happens to single images in an epoch, one after the other; what mixes batches is left out.

    Args:
        augmentation: as configured.
        images: N of the training set.
        size: side S of the images, in pixels.
        seed: the run's seed.
        epoch: of the training.
    """
    return [change for one in augmentation for change in _changes(one.settings, images, size, seed, epoch)]


def _changes(settings: Any, images: int, size: int, seed: int, epoch: int) -> Iterator[Change]:
    if isinstance(settings, Flip):
        coin = torch.rand((images, 2), generator=torch_generator(seed, "augmentation", epoch)) < 0.5
        yield lambda batch, rows: _flipped(batch, coin[rows, 0], axis=-1)
        if settings.direction == "both":
            yield lambda batch, rows: _flipped(batch, coin[rows, 1], axis=-2)
    elif isinstance(settings, Rotate90):
        turns = torch.randint(4, (images,), generator=torch_generator(seed, "rotate90", epoch))
        yield lambda batch, rows: _turned(batch, turns[rows])
    elif not isinstance(settings, Mixup | Cutmix):
        transform, purpose = _of_torchvision(settings, size)
        seeds = torch.randint(_LARGEST_SEED, (images,), generator=torch_generator(seed, purpose, epoch))
        yield lambda batch, rows: _each(transform, batch, seeds[rows])


def _of_torchvision(settings: Any, size: int) -> tuple[Callable[[Tensor], Tensor], Purpose]:
    """Return torchvision's transform, and what its draws are called.

    Parts are enlarged bicubically with antialiasing, as images are when they are decoded.
    """
    from torchvision.transforms import v2  # a second of the start of every command that does not train

    if isinstance(settings, RandomResizedCrop):
        bicubic = v2.InterpolationMode.BICUBIC
        return v2.RandomResizedCrop(size, settings.scale, settings.ratio, bicubic), "random_resized_crop"
    if isinstance(settings, ColorJitter):
        return v2.ColorJitter(**settings.model_dump()), "color_jitter"
    assert isinstance(settings, RandAugment)
    return v2.RandAugment(settings.num_ops, settings.magnitude), "rand_augment"


def _flipped(images: Tensor, chosen: Tensor, axis: int) -> Tensor:
    return torch.where(chosen[:, None, None, None], images.flip(axis), images)  # (B,) beside (B, C, S, S)


def _turned(images: Tensor, quarters: Tensor) -> Tensor:
    turned = images.clone()
    for quarter in (1, 2, 3):
        chosen = quarters == quarter  # (B,)
        turned[chosen] = images[chosen].rot90(quarter, (-2, -1))
    return turned


def _each(transform: Callable[[Tensor], Tensor], images: Tensor, seeds: Tensor) -> Tensor:
    """Change each image (B, C, S, S) by its own seed (B,).

    torchvision draws from torch's global generator, which is lent to it here and left as it was.
    """
    changed = []
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(images, seeds.tolist(), strict=True):
            torch.default_generator.manual_seed(seed)
            changed.append(transform(image))
    return torch.stack(changed)


def mixed(
    images: Tensor, labels: Tensor, augmentation: Sequence[Augmentation], *, classes: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Mix each image of a batch with the one that stands as far from the batch's other end, as timm's Mixup does.

    mixup (arXiv 1710.09412): x = q x_i + (1 - q) x_j, y = q y_i + (1 - q) y_j, with q from Beta(alpha, alpha) once a
    batch. cutmix (arXiv 1905.04899): a rectangle of 1 - q of the area, cut off at the edges, comes from x_j, and q in y
    is the share that is left of x_i. Of both, one is drawn for each batch, with probability 1/2. The middle image of an
    odd number stays as it is.

    Args:
        images: (B, 3, S, S) float32.
        labels: (B,) int64.
        augmentation: as configured; without mixup and cutmix the batch is returned as it is.
        classes: how many there are.
        seed: the run's seed.
        step: the optimiser step that the batch is for.

    Returns:
        images (B, 3, S, S), and shares of each class (B, classes) float32, or the labels if nothing is mixed.
    """
    mixers = [one.settings for one in augmentation if one.mixes]
    if not mixers:
        return images, labels
    generator = numpy_generator(seed, "mixing", step)
    mixer: Any = mixers[int(generator.random() < 0.5)] if len(mixers) == 2 else mixers[0]
    own = float(generator.beta(mixer.alpha, mixer.alpha))
    if isinstance(mixer, Cutmix):
        (top, bottom, left, right), own = _rectangle(images.shape[-1], own, generator)
        result = images.clone()
        result[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    else:
        result = images * own + images.flip(0) * (1.0 - own)
    one_hot = F.one_hot(labels, classes).float()  # (B,) -> (B, classes)
    return result, one_hot * own + one_hot.flip(0) * (1.0 - own)


def _rectangle(side: int, own: float, generator: np.random.Generator) -> tuple[tuple[int, int, int, int], float]:
    """Return top, bottom, left and right in pixels, and the share of the image's area outside."""
    cut = int(side * np.sqrt(1 - own))
    centres = generator.integers(0, side, size=2)  # a row and a column
    (top, left), (bottom, right) = (np.clip(centres + shift, 0, side) for shift in (-(cut // 2), (cut + 1) // 2))
    return (int(top), int(bottom), int(left), int(right)), 1.0 - float((bottom - top) * (right - left)) / side**2
