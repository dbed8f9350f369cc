"""Decoded images as batches, what `training.augmentation` does to them, and the test split, which is read once.

Images are changed each with draws of its own, and at last whole batches are mixed. Draws follow from the run's seed and
from epoch and image, or the step, alone: a run continues to the bit without keeping anything of them. Each entry of the
list has a stream of its own: adding one leaves the draws of the others as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from peft_vit.base.errors import UserError
from peft_vit.base.seeding import Purpose, numpy_generator, torch_generator
from peft_vit.core.config import Augmentation, ColorJitter, Cutmix, Flip, Mixup, RandomResizedCrop, Rotate90
from peft_vit.core.tasks import CLASSIFICATION, Task
from peft_vit.core.training.processes import own_rows

_Change = Callable[[Tensor, np.ndarray], Tensor]  # of images (B, C, S, S) uint8, by their rows (B,) in the training set


class LabelledImages:
    """N decoded images with labels.

    Args:
        pixels: (M, S, S, C) uint8, C = 1 (grey) or 3.
        labels: (N,) int64, or (N, K) as the task says.
        positions: in the data set, (N,) int64; None: these are all of it.
        places: in `pixels`, (N,) int64; None: these are all of it, in order.
    """

    def __init__(
        self,
        pixels: np.ndarray,
        labels: np.ndarray,
        positions: np.ndarray | None = None,
        places: np.ndarray | None = None,
    ) -> None:
        self.pixels = pixels
        self.labels = labels
        self.positions = np.arange(len(labels)) if positions is None else positions
        self._places = np.arange(len(labels)) if places is None else places

    def __len__(self) -> int:
        return len(self.labels)

    def chosen(self, rows: np.ndarray) -> LabelledImages:
        """Return some of them, by their rows here, (n,) int64; a row may stand several times. No pixel is copied."""
        return LabelledImages(self.pixels, self.labels[rows], self.positions[rows], self._places[rows])

    def ordered_batches(
        self, batch_size: int, mean: Sequence[float], std: Sequence[float]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images in their order; the last batch may be smaller.

        Args:
            batch_size: images a batch.
            mean: of each of the 3 channels, on a scale where white is 1.
            std: of each of the 3 channels.

        Yields:
            ((B, 3, S, S) float32 normalised, (B,) int64).
        """
        for start in range(0, len(self), batch_size):
            rows = np.arange(start, min(start + batch_size, len(self)))
            yield normalised(self._channels_first(rows), mean, std), torch.from_numpy(self.labels[rows])

    def shuffled_batches(
        self,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        augmentation: Sequence[Augmentation],
        seed: int,
        epoch: int,
        skip: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images once, in the order and with the changes that follow from (seed, epoch) alone.

        Of several processes each yields its images of every batch. One that has none yields the batch's first, which
        counts nothing there, see `own_share`.

        What happens to an image depends neither on the batch size nor on its place in the order. The last batch may be
        smaller.

        Args:
            batch_size: images a batch.
            mean: as in `ordered_batches`.
            std: as in `ordered_batches`.
            augmentation: what changes images, in its order; what mixes whole batches is left to `mixed`.
            seed: the run's seed.
            epoch: counted from 0 or 1, as the caller likes.
            skip: batches to leave out at the start, which an interrupted run has had.
        """
        size = self.pixels.shape[1]
        changes = [
            change for entry in augmentation for change in _changes(entry.settings, len(self), size, seed, epoch)
        ]
        order = self.order(seed, epoch)
        for start in range(skip * batch_size, len(self), batch_size):
            rows = order[start : start + batch_size]
            own = own_rows(len(rows), mirrored=any(entry.mixes for entry in augmentation))
            rows = rows[own] if len(own) else rows[:1]
            images = self._channels_first(rows)
            for change in changes:
                images = change(images, rows)
            yield normalised(images, mean, std), torch.from_numpy(self.labels[rows])

    def own_share(self, batch_size: int, batch: int, augmentation: Sequence[Augmentation]) -> float:
        """Return which share of a batch of `shuffled_batches`, counted from 0, is this process's."""
        images = min(batch_size, len(self) - batch * batch_size)
        return len(own_rows(images, mirrored=any(entry.mixes for entry in augmentation))) / images

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the data order of an epoch, (N,) int64."""
        return torch.randperm(len(self), generator=torch_generator(seed, "data_order", epoch)).numpy()

    def _channels_first(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.pixels[self._places[rows]]).permute(0, 3, 1, 2)  # (B, S, S, C) -> (B, C, S, S)


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return uint8 images (B, C, S, S) as the model takes them, (B, 3, S, S) float32; grey ones get three channels.

    Args:
        images: C = 1 (grey) or 3.
        mean: of each of the 3 channels, on a scale where white is 1.
        std: of each of the 3 channels.
    """
    shift = torch.tensor(mean, dtype=torch.float32)[:, None, None]  # (3, 1, 1)
    width = torch.tensor(std, dtype=torch.float32)[:, None, None]
    return ((images.float() / 255 - shift) / width).contiguous()  # (B, 1 or 3, S, S) -> (B, 3, S, S)


class HoldoutImages:
    """The test split: its size and class counts may be asked, its images are handed out once.

    Args:
        images: the test images.
        class_counts: of each class of the data set, (K,) int64.
    """

    def __init__(self, images: LabelledImages, class_counts: np.ndarray) -> None:
        self.__images: LabelledImages | None = images
        self.__size = len(images)
        self.__class_counts = class_counts

    def __len__(self) -> int:
        return self.__size

    def class_counts(self) -> np.ndarray:
        """Return the number of images of each class, (K,) int64."""
        return self.__class_counts.copy()

    def open(self) -> LabelledImages:
        """Return the images.

        Raises:
            RuntimeError: on a second call; whatever needs test results twice has to keep the predictions.
        """
        if self.__images is None:
            raise RuntimeError("the test split was opened before; it is read once, after validation has chosen")
        images, self.__images = self.__images, None
        return images

    def __reduce__(self) -> NoReturn:
        raise TypeError("the test split cannot be copied or pickled: a copy could be opened again")


# --- augmentation -----------------------------------------------------------------------------------------------------


def check_augmentation(augmentation: Sequence[Augmentation], channels: int) -> None:
    """Refuse color settings without effect on grey images.

    Raises:
        UserError: naming the entry, below the experiment.
    """
    for place, entry in enumerate(augmentation):
        jitter = entry.color_jitter
        if jitter is not None and channels == 1 and (jitter.saturation or jitter.hue):
            raise UserError(
                "saturation and hue have no effect on grey images; write "
                f"`color_jitter: {{brightness: {jitter.brightness:g}, contrast: {jitter.contrast:g}, saturation: 0}}`",
                field=f"training.augmentation[{place}].color_jitter",
            )


def _changes(settings: Any, images: int, size: int, seed: int, epoch: int) -> Iterator[_Change]:
    """Yield the changes of single images by an entry, for N images of side `size`; none if it mixes batches."""
    if isinstance(settings, Flip):
        coin = torch.rand((images, 2), generator=torch_generator(seed, "augmentation", epoch)) < 0.5
        yield lambda batch, rows: torch.where(coin[rows, 0, None, None, None], batch.flip(-1), batch)
        if settings.direction == "both":
            yield lambda batch, rows: torch.where(coin[rows, 1, None, None, None], batch.flip(-2), batch)
    elif isinstance(settings, Rotate90):
        turns = torch.randint(4, (images,), generator=torch_generator(seed, "rotate90", epoch))
        yield lambda batch, rows: torch.stack(
            [image.rot90(int(turn), (-2, -1)) for image, turn in zip(batch, turns[rows], strict=True)]
        )
    elif not isinstance(settings, Mixup | Cutmix):
        from torchvision.transforms import v2  # a second of the start of every command that does not train

        transform: Callable[[Tensor], Tensor]
        purpose: Purpose
        if isinstance(settings, RandomResizedCrop):  # bicubic with antialiasing, as images are when they are decoded
            bicubic = v2.InterpolationMode.BICUBIC
            transform = v2.RandomResizedCrop(size, settings.scale, settings.ratio, bicubic)
            purpose = "random_resized_crop"
        elif isinstance(settings, ColorJitter):
            transform, purpose = v2.ColorJitter(**settings.model_dump()), "color_jitter"
        else:
            transform, purpose = v2.RandAugment(settings.num_ops, settings.magnitude), "rand_augment"
        seeds = torch.randint(2**63 - 1, (images,), generator=torch_generator(seed, purpose, epoch))

        def transform_each(batch: Tensor, rows: np.ndarray) -> Tensor:
            changed = []
            with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's global generator, lent to it here
                for image, image_seed in zip(batch, seeds[rows].tolist(), strict=True):
                    torch.default_generator.manual_seed(image_seed)
                    changed.append(transform(image))
            return torch.stack(changed)

        yield transform_each


def mixed(
    images: Tensor,
    labels: Tensor,
    augmentation: Sequence[Augmentation],
    *,
    task: Task,
    width: int,
    seed: int,
    step: int,
) -> tuple[Tensor, Tensor]:
    """Mix each image of a batch with the one that stands as far from the batch's other end, as timm's Mixup does.

    mixup (arXiv 1710.09412): x = q x_i + (1 - q) x_j, y = q y_i + (1 - q) y_j, with q from Beta(alpha, alpha) once a
    batch. cutmix (arXiv 1905.04899): a rectangle of 1 - q of the area, cut off at the edges, comes from x_j, and q in y
    is the share that is left of x_i. Of both, one is drawn for each batch, with probability 1/2. The middle image of an
    odd number stays as it is.

    Args:
        images: (B, 3, S, S) float32.
        labels: of B images, as the task has them. What is not known of one of two images (NaN) is not of their mix.
        augmentation: as configured; without mixup and cutmix the batch is returned as it is.
        task: what is learned.
        width: of its head.
        seed: the run's seed.
        step: the optimiser step that the batch is for.

    Returns:
        images (B, 3, S, S), and mixed labels (B, K), see `Task.shares`; the labels as they are if nothing is mixed.
    """
    mixers = [entry.settings for entry in augmentation if entry.mixes]
    if not mixers:
        return images, labels
    generator = numpy_generator(seed, "mixing", step)
    mixer: Any = mixers[int(generator.random() < 0.5)] if len(mixers) == 2 else mixers[0]
    share = float(generator.beta(mixer.alpha, mixer.alpha))  # q
    if isinstance(mixer, Cutmix):
        side = images.shape[-1]
        cut = int(side * np.sqrt(1 - share))
        centres = generator.integers(0, side, size=2)  # a row and a column
        (top, left), (bottom, right) = (np.clip(centres + shift, 0, side) for shift in (-(cut // 2), (cut + 1) // 2))
        share = 1.0 - float((bottom - top) * (right - left)) / side**2
        result = images.clone()
        result[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    else:
        result = images * share + images.flip(0) * (1.0 - share)
    targets = task.shares(labels, width)  # (B, K)
    return result, targets * share + targets.flip(0) * (1.0 - share)


@dataclass(frozen=True)
class Data:
    """The images of a run, split."""

    class_names: tuple[str, ...]
    train: LabelledImages
    validation: LabelledImages
    test: HoldoutImages
    data_sha256: str
    split_sha256: str
    groups: np.ndarray  # equal numbers for copies among all images of the data set, (N,) int64
    test_files: list[str] | None = None  # names of somebody's own, relative to their folder
    task: Task = CLASSIFICATION
    warnings: tuple[str, ...] = ()  # what to know of the images before believing a number, see `image_warnings`
    left_out: Mapping[str, str] = field(default_factory=dict)  # why, by the names of files that an inspection left out
    notes: tuple[str, ...] = ()  # see `ImageIndex`
