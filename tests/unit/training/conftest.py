"""Images in memory for the loop."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from peft_vit.core.training import RuntimeConfig
from peft_vit.core.training.images import Data, HoldoutImages, LabelledImages


@pytest.fixture
def data() -> Callable[..., Data]:
    """Make images of 5 classes whose grey level tells the class; class 0 is twice as frequent."""

    def make(train: int = 18, validation: int = 12, test: int = 12) -> Data:
        rng = np.random.default_rng(0)

        def split(count: int) -> LabelledImages:
            labels = np.arange(count) % 6 % 5
            levels = 40 * labels[:, None, None, None] + rng.integers(0, 60, (count, 32, 32, 3))
            return LabelledImages(levels.astype(np.uint8), labels.astype(np.int64))

        names = tuple(f"class {k}" for k in range(5))
        return Data(
            names,
            split(train),
            split(validation),
            HoldoutImages(split(test), np.bincount(split(test).labels, minlength=5)),
            "d" * 64,
            "s" * 64,
            np.arange(train + validation + test),
        )

    return make


@pytest.fixture
def runtime() -> RuntimeConfig:
    return RuntimeConfig(torch.device("cpu"), "fp32", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
