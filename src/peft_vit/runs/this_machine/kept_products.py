"""Which product of 8-bit integers runs take on this machine: measured once, and kept in the user's cache."""

from __future__ import annotations

import functools
import math

import torch
from pydantic import BaseModel, ConfigDict, Field

from peft_vit.core.adapters.products import MatmulTimes, time_matmuls
from peft_vit.core.config import Precision
from peft_vit.core.quantization.integers import Bits, Int8Kernel, Int8Matmul
from peft_vit.runs.this_machine.kept import keep, kept_file, read_kept
from peft_vit.runs.this_machine.machine import instruction_limits, processor_name


class _Kept(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: Int8Kernel
    bits: Bits
    seconds: float = Field(gt=0)
    float_s: float = Field(gt=0)

    def choice(self) -> MatmulTimes:
        """Return it as it was found."""
        return MatmulTimes(Int8Matmul(self.name, self.bits), self.seconds, self.float_s)


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
    file = kept_file("products", place)
    if (known := read_kept(file, _Kept)) is not None:
        return known.choice()
    choice = time_matmuls(device, torch.bfloat16 if precision == "bf16" else torch.float32, bits)
    if choice.matmul is not None and math.isfinite(choice.seconds):
        kept = _Kept(name=choice.matmul.name, bits=choice.matmul.bits, seconds=choice.seconds, float_s=choice.float_s)
        keep(file, kept.model_dump_json().encode() + b"\n")
    return choice
