"""One named random generator per purpose, so that methods are paired: same initial head, same data order.

Streams are derived with numpy's SeedSequence (O'Neill's seed_seq construction, see numpy.random.SeedSequence):
different purposes of the same seed are independent, and adding a draw to one purpose moves no other.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import torch

Purpose = Literal[
    "head_init",
    "adapter_init",
    "data_order",
    "augmentation",  # flips; the others have streams by their names, below
    "train_subset",
    "split",
    "folds",
    "sealed",
    "tested",
    "held_out",
    "probe",
    "calibration",
    "removal",
    "rotate90",
    "random_resized_crop",
    "color_jitter",
    "rand_augment",
    "mixing",
    "features",
    "review",
]


def _entropy(seed: int, purpose: Purpose, index: int) -> np.random.SeedSequence:
    key = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "little")
    return np.random.SeedSequence([seed, key, index])


def torch_generator(seed: int, purpose: Purpose, index: int = 0) -> torch.Generator:
    """Return a CPU torch generator for one purpose.

    Args:
        seed: the run's seed.
        purpose: what the numbers are for.
        index: a counter such as the epoch, so that order follows from (seed, epoch) alone.
    """
    state = int(_entropy(seed, purpose, index).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state % 2**63)


def numpy_generator(seed: int, purpose: Purpose, index: int = 0) -> np.random.Generator:
    """Return a numpy generator for one purpose; arguments as in `torch_generator`."""
    return np.random.default_rng(_entropy(seed, purpose, index))
