"""How long a forward pass takes."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn

from peft_vit.backbones import evaluating
from peft_vit.config import Precision

WARMUP_PASSES = 5
TIMED_PASSES = 20


@torch.inference_mode()
def forward_s(model: nn.Module, images: Tensor, *, precision: Precision) -> float:
    """Return the median seconds of a forward pass over 20, after 5 that only warm up.

    A pass goes from images on the model's device to logits there, in evaluation mode, under autocast if the precision
    says so; reading, decoding, normalising and moving images is left out. Other work on the machine counts in.

    Args:
        model: left as it was.
        images: a batch (B, 3, S, S), normalised, where the model is.
        precision: of the forward pass.
    """
    seconds = []
    with evaluating(model):
        for _ in range(WARMUP_PASSES + TIMED_PASSES):
            started = time.perf_counter()
            with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
                model(images)
            if images.device.type != "cpu":  # it works on its own: a call returns before its result is there
                torch.accelerator.synchronize(images.device)
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARMUP_PASSES:])
