"""What a run will take, before it starts: from this machine's measured rate, or from finished runs of the same kind."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peft_vit.backbones import BackboneShape
from peft_vit.config import Precision
from peft_vit.records import RunRecord, RunSpec

# Read off finished runs of the quickstart on two cores; they only scale the estimates that a plan prints.
_TIME_OUTSIDE_PRODUCTS = 1.8  # time of a step over that of its large matrix products
_PROCESS_BYTES = 700e6  # interpreter, torch, timm, code and buffers of a run
_VALUES_KEPT_PER_TOKEN = 34  # activations kept for backward, per token, block and unit of width
# Time of a step by the PEFT library over that of ours, fp32, ViT-S/14 at 112 px, rank 8 on all six matrices, and
# AdaLoRA 12 -> 8 with its penalty and its allocation; PEFT 0.21.2, the allocator's defaults.
_TIME_OVER_OURS = {"peft_lora": 1.42 / 1.29, "peft_adalora": 1.81 / 1.29}
_START_S = 6.0  # loading weights and images


@dataclass(frozen=True)
class Estimate:
    """Seconds and peak bytes; `measured` says that they come from finished runs of the same experiment."""

    seconds: float
    peak_memory_bytes: int
    measured: bool


@dataclass(frozen=True)
class Workload:
    """What all runs of a study share."""

    shape: BackboneShape
    image_size: int
    device: torch.device
    precision: Precision
    threads: int
    train: int
    validation: int
    test: int

    @property
    def tokens(self) -> int:
        """Return the tokens of one image, class token included."""
        return (self.image_size // self.shape.patch_size) ** 2 + 1


def product_rate(workload: Workload) -> float:
    """Return multiply-adds per second of a product of the model's own shape, measured in about 0.2 s."""
    dtype = torch.bfloat16 if workload.precision == "bf16" else torch.float32
    before = torch.get_num_threads()
    torch.set_num_threads(workload.threads)
    x = torch.ones(32 * workload.tokens, workload.shape.width, dtype=dtype, device=workload.device)
    weight = torch.ones(4 * workload.shape.width, workload.shape.width, dtype=dtype, device=workload.device)
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - started < 0.2 and len(times) < 200):
        begin = time.perf_counter()
        float((x @ weight.T)[0, 0])
        times.append(time.perf_counter() - begin)
    torch.set_num_threads(before)
    return x.shape[0] * x.shape[1] * weight.shape[0] / statistics.median(times)


def estimate_runs(
    runs: Sequence[tuple[RunSpec, int]], workload: Workload, finished: Sequence[RunRecord]
) -> list[Estimate]:
    """Estimate each run.

    Args:
        runs: (spec, optimiser steps) of each run.
        workload: what they share.
        finished: records of this study; an experiment with one is estimated by it.
    """
    known: dict[str, list[RunRecord]] = {}
    for record in finished:
        known.setdefault(record.spec.experiment.name, []).append(record)
    rate = product_rate(workload) if any(spec.experiment.name not in known for spec, _ in runs) else 1.0
    return [
        _from_records(known[spec.experiment.name])
        if spec.experiment.name in known
        else _from_arithmetic(spec, steps, workload, rate)
        for spec, steps in runs
    ]


def _from_records(records: list[RunRecord]) -> Estimate:
    seconds = statistics.median(record.seconds for record in records)
    return Estimate(seconds, max(record.peak_memory_bytes or 0 for record in records), measured=True)


def _from_arithmetic(spec: RunSpec, steps: int, workload: Workload, rate: float) -> Estimate:
    experiment = spec.experiment
    products = {"linear": 1, "full": 3}.get(experiment.method, 2)  # forward, input gradient, weight gradient
    parameters = workload.shape.parameters
    trained_tokens = experiment.training.epochs * workload.train * workload.tokens
    read_tokens = (experiment.training.epochs * workload.validation + workload.test) * workload.tokens
    work = parameters * (products * trained_tokens + read_tokens)
    seconds = _START_S + _TIME_OUTSIDE_PRODUCTS * _TIME_OVER_OURS.get(experiment.method, 1.0) * work / rate
    value_bytes = 2 if workload.precision == "bf16" else 4
    batch = experiment.training.batch_size
    kept = 0 if experiment.method == "linear" else _VALUES_KEPT_PER_TOKEN
    activations = batch * workload.tokens * workload.shape.depth * workload.shape.width * kept * value_bytes
    copies = {"linear": 4, "full": 16}.get(experiment.method, 4 + value_bytes)  # bytes per frozen or trained value
    return Estimate(seconds, int(_PROCESS_BYTES + activations + parameters * copies), measured=False)
