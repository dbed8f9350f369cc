"""Settings that the tests of QALoRATrainer share."""

from functools import partial
from typing import Any

import pytest

from peft_vit import QaLoraConfig

DEFAULT: dict[str, Any] = {
    "quantization_bits": 4,
    "quantization_type": "nf4",
    "quantization_schedule": "constant",
    "gradient_scaling_factor": 1.0,
    "use_group_quantization": True,
    "group_size": 16,
}
config = partial(QaLoraConfig, **DEFAULT)
SILENT = pytest.mark.filterwarnings("ignore::peft_vit.base.errors.SilentNoEffectWarning")
scheduled = partial(
    config,
    quantization_schedule="linear",
    quantization_warmup_steps=2,
    quantization_end_step=6,
    quantization_bits=8,
    quantization_type="int8",
)
