"""Images in memory for the loop."""

from collections.abc import Callable

import pytest
import torch
from trained_together import images_of

from peft_vit.core.training import RuntimeConfig
from peft_vit.core.training.images import Data


@pytest.fixture
def data() -> Callable[..., Data]:
    """Make images of 5 classes whose grey level tells the class; class 0 is twice as frequent."""

    return lambda train=18: images_of(train, validation=12)


@pytest.fixture
def runtime() -> RuntimeConfig:
    return RuntimeConfig(torch.device("cpu"), "fp32", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
