"""How long a forward pass takes."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn

from peft_vit.config import Precision

WARMUP_PASSES = 5
TIMED_PASSES = 20


@torch.inference_mode()
def forward_s(model: nn.Module, images: Tensor, *, precision: Precision) -> float:
    """Return the median seconds of a forward pass over 20, after 5 that only warm up.

    A pass goes from images on the model's device to logits there, in evaluation mode, under autocast if the precision
    says so; reading, decoding, normalising and moving images is left out. Other work on the machine counts in.

    Args:
        model: left in the mode that it was in.
        images: a batch (B, 3, S, S), normalised, where the model is.
        precision: of the forward pass.
    """
    was_training = model.training
    model.eval()
    seconds = []
    for _ in range(WARMUP_PASSES + TIMED_PASSES):
        started = time.perf_counter()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            model(images)
        _wait(images.device)
        seconds.append(time.perf_counter() - started)
    model.train(was_training)
    return statistics.median(seconds[WARMUP_PASSES:])


def _wait(device: torch.device) -> None:
    """Wait for a device that works on its own: a call returns before its result is there."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
