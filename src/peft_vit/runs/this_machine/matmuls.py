"""Which product of 8-bit integers runs take on this machine: measured once, and kept in the user's cache."""

from __future__ import annotations

import functools
import math

import torch

from peft_vit.core.adapters.matmuls import MatmulTimes, time_matmuls
from peft_vit.core.config import Precision
from peft_vit.core.quantization.integers import Bits
from peft_vit.runs.this_machine.cache import cache_file, read_cached, write_cached
from peft_vit.runs.this_machine.machine import instruction_limits, processor_name


@functools.cache
def choose_product(device: torch.device, precision: Precision, bits: Bits | None = None) -> MatmulTimes:
    """Return the fastest exact product of a device, beside one in float.

    Args:
        device: of the runs.
        precision: of the float product.
        bits: of weights, as a study was begun with; None: as many as are exact.
    """
    if bits is not None:
        found = choose_product(device, precision)  # not another measurement of the same
        if found.matmul is not None and found.matmul.bits == bits:
            return found
    place = {
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "instructions": instruction_limits(),
        "onednn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "torch": torch.__version__,
        "device": device.type,
        "precision": precision,
        "bits": bits,
    }
    file = cache_file("matmul_times", place)
    if (known := read_cached(file, MatmulTimes)) is not None:
        return known
    choice = time_matmuls(device, torch.bfloat16 if precision == "bf16" else torch.float32, bits)
    if choice.matmul is not None and math.isfinite(choice.seconds):
        write_cached(file, choice)
    return choice
