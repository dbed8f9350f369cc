"""Decoded images as batches, and the test split under a seal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from peft_vit.config import Augmentation
from peft_vit.data.augmentation import changes_of, check_augmentation
from peft_vit.seeding import torch_generator


class LabelledImages:
    """N decoded images with labels.

    Args:
        pixels: (M, S, S, C) uint8, C = 1 (grey) or 3.
        labels: (N,) int64.
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
        """Return some of them, by their rows here, (n,) int64; a row may stand several times."""
        return LabelledImages(self.pixels[self._places[rows]], self.labels[rows], self.positions[rows])

    def ordered_batches(
        self, batch_size: int, mean: Sequence[float], std: Sequence[float]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images in their order; the last batch may be smaller.

        Args:
            batch_size: images a batch.
            mean: of each of the 3 channels, on a scale where white is 1.
            std: likewise.

        Yields:
            ((B, 3, S, S) float32 normalised, (B,) int64).
        """
        for start in range(0, len(self), batch_size):
            rows = np.arange(start, min(start + batch_size, len(self)))
            yield normalised(self._channels_first(rows), mean, std), self._labels(rows)

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

        What happens to an image depends neither on the batch size nor on its place in the order. The last batch may be
        smaller.

        Args:
            batch_size: images a batch.
            mean: as in `ordered_batches`.
            std: likewise.
            augmentation: what changes images, in its order; what mixes whole batches is left to `mixed`.
            seed: the run's seed.
            epoch: counted from 0 or 1, as the caller likes.
            skip: batches to leave out at the start, which an interrupted run has had.

        Raises:
            UserError: see `check_augmentation`.
        """
        *_, size, channels = self.pixels.shape
        check_augmentation(augmentation, channels)
        changes = changes_of(augmentation, len(self), size, seed, epoch)
        order = self.order(seed, epoch)
        for start in range(skip * batch_size, len(self), batch_size):
            rows = order[start : start + batch_size]
            images = self._channels_first(rows)
            for change in changes:
                images = change(images, rows)
            yield normalised(images, mean, std), self._labels(rows)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the data order of an epoch, (N,) int64."""
        return torch.randperm(len(self), generator=torch_generator(seed, "data_order", epoch)).numpy()

    def _channels_first(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.pixels[self._places[rows]]).permute(0, 3, 1, 2)  # (B, S, S, C) -> (B, C, S, S)

    def _labels(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.labels[rows])


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return uint8 images (B, C, S, S) as the model takes them, (B, 3, S, S) float32; grey ones get three channels.

    Args:
        images: C = 1 (grey) or 3.
        mean: of each of the 3 channels, on a scale where white is 1.
        std: likewise.
    """
    shift = torch.tensor(mean, dtype=torch.float32)[:, None, None]  # (3, 1, 1)
    width = torch.tensor(std, dtype=torch.float32)[:, None, None]
    return ((images.float() / 255 - shift) / width).contiguous()  # (B, 1 or 3, S, S) -> (B, 3, S, S)


class SealedImages:
    """The test split: its size and class counts may be asked, its images are handed out once.

    Args:
        images: the test images.
        class_count: number of classes K of the data set.
    """

    def __init__(self, images: LabelledImages, class_count: int) -> None:
        self.__images: LabelledImages | None = images
        self.__size = len(images)
        self.__class_counts = np.bincount(images.labels, minlength=class_count)

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
