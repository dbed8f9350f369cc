"""Logits of a model over batches, without gradients, what they predict, and how long a forward pass takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peft_vit.backbones import evaluating
from peft_vit.config import Precision
from peft_vit.evaluation.metrics import log_softmax
from peft_vit.records import Predictions

WARMUP_PASSES = 5
TIMED_PASSES = 20
# (N, classes) and (N,)
LogitsAndLabels: TypeAlias = tuple[NDArray[np.float32], NDArray[np.int64]]


@torch.inference_mode()
def predict(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, device: torch.device, precision: Precision
) -> LogitsAndLabels:
    """Return logits (N, classes) and labels (N,) over all batches, in their order."""
    logits, labels = [], []
    with evaluating(model):
        for images, targets in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                output = model(images.to(device))  # (B, 3, S, S) -> (B, classes)
            logits.append(output.float().cpu().numpy())
            labels.append(targets.numpy())
    return np.concatenate(logits), np.concatenate(labels)  # (N, classes), (N,)


def predictions(
    logits: NDArray[np.float32], labels: NDArray[np.int64], positions: NDArray[np.int64], *, keep_logits: bool = False
) -> Predictions:
    """Return the most probable class of each image and its probability; of equal ones the first.

    Args:
        logits: (N, classes), finite.
        labels: (N,).
        positions: (N,) in the data set.
        keep_logits: with them.
    """
    log_probability = log_softmax(logits.astype(np.float64))
    predicted = log_probability.argmax(1)  # (N,)
    return Predictions(
        images=positions.tolist(),
        labels=labels.tolist(),
        predicted=predicted.tolist(),
        probability=np.exp(log_probability.max(1)).tolist(),
        logits=[[float(str(z)) for z in row] for row in logits] if keep_logits else None,  # as short as float32 is
    )


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
