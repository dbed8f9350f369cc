"""Batches: normalised values, order and flips from (seed, epoch), and a test split that opens once."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torchvision.transforms.v2.functional import normalize

from peft_vit.core.config import AUGMENTATION_OF_FLIPS
from peft_vit.core.training.images import HoldoutImages, LabelledImages

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


def make(n=21, channels=3, size=4):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, size, size, channels), dtype=np.uint8)
    return LabelledImages(pixels, np.arange(n, dtype=np.int64))


def gathered(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def shuffled(images, flips="none", **settings):
    return gathered(
        images.shuffled_batches(
            **{"batch_size": 8, "mean": MEAN, "std": STD, "seed": 0, "epoch": 1, **settings},
            augmentation=AUGMENTATION_OF_FLIPS[flips],
        )
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_ordered_batches_are_normalised_as_by_torchvision(channels):
    images = make(channels=channels)
    batches = list(images.ordered_batches(8, MEAN, STD))
    assert [len(labels) for _, labels in batches] == [8, 8, 5]
    got, labels = gathered(batches)
    assert (got.dtype, labels.dtype, got.shape) == (torch.float32, torch.int64, (21, 3, 4, 4))
    assert batches[0][0].is_contiguous()
    assert labels.tolist() == list(range(21))
    coloured = torch.from_numpy(images.pixels).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)  # (N, 3, S, S)
    torch.testing.assert_close(got, normalize(coloured / 255, list(MEAN), list(STD)), rtol=0, atol=1e-6)


def test_shuffled_batches_visit_every_image_once_in_the_stated_order():
    images = make()
    got, labels = shuffled(images)
    assert labels.tolist() == images.order(0, 1).tolist()
    assert sorted(labels.tolist()) == list(range(21))
    ordered, _ = gathered(images.ordered_batches(8, MEAN, STD))
    assert torch.equal(got, ordered[labels])
    torch.manual_seed(1)
    orders = {(seed, epoch): tuple(images.order(seed, epoch)) for seed in (0, 1) for epoch in (1, 2)}
    assert len(set(orders.values())) == 4
    assert tuple(images.order(0, 1)) == orders[0, 1] == tuple(labels.tolist())


def holdout():
    return HoldoutImages(LabelledImages(np.zeros((3, 2, 2, 1), np.uint8), np.array([0, 2, 2])), np.array([1, 0, 2, 0]))


def test_holdout_opens_once_and_tells_size_and_class_counts_before_and_after():
    test = holdout()
    test.class_counts()[:] = 0  # a copy: nothing is changed
    assert (len(test), test.class_counts().tolist()) == (3, [1, 0, 2, 0])
    assert len(test.open()) == 3
    assert (len(test), test.class_counts().tolist()) == (3, [1, 0, 2, 0])
    with pytest.raises(RuntimeError, match="opened before"):
        test.open()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_holdout_cannot_be_copied(duplicate):
    with pytest.raises(TypeError, match="cannot be copied"):
        duplicate(holdout())
