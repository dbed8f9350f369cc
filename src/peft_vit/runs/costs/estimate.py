"""Forecasts of time and memory: from finished runs of the kind, from a timing run, or from arithmetic."""

from __future__ import annotations

import functools
import statistics
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch

from peft_vit.core.backbones import BackboneShape
from peft_vit.core.config import Compute, ComputeSetting, Precision
from peft_vit.core.methods import METHODS
from peft_vit.core.quantization.integers import Bits
from peft_vit.core.records import RunRecord, RunSpec
from peft_vit.core.training import FLIP_AXES
from peft_vit.core.training.metrics import GROUPS, TIMED_PASSES, WARMUP_PASSES
from peft_vit.runs.costs.time_limit import PROCESS_S
from peft_vit.runs.costs.timing_run import MeasuredCosts, cached_costs
from peft_vit.runs.this_machine import matmuls
from peft_vit.runs.this_machine.machine import cpu_count, processor_name, torch_threads

# Read off finished runs of the quickstart on two cores; they only scale the estimates that nothing was measured for.
TIME_OUTSIDE_PRODUCTS = 1.8  # time of a step over that of its large matrix products
_START_S = 6.0  # loading weights and images
PROCESS_BYTES = 700e6  # interpreter, torch, timm, code and buffers of a run
_PRODUCTS_S = 0.2  # for which products are timed, about; three are in any case
# Activations kept for backward over what goes into and out of the matrices: of a plain block 34 a token and width.
_VALUES_SAVED = 34 / 16


# --- how fast this machine works through a model ----------------------------------------------------------------------


@dataclass(frozen=True)
class Throughput:
    """What the parts of a run take, by how much they multiply.

    Attributes:
        start_s: of all that a run does once.
        step_product_s: of a training step, for each of its multiply-adds, see `step_s`.
        image_product_s: of a forward pass, for each of its multiply-adds.
        process_s: until a worker process is ready.
    """

    start_s: float
    step_product_s: float
    image_product_s: float
    process_s: float = PROCESS_S

    @classmethod
    def estimated(cls, multiply_adds_per_s: float) -> Self:
        """Return what follows from the throughput of products alone, see `product_throughput`."""
        product_s = TIME_OUTSIDE_PRODUCTS / multiply_adds_per_s
        return cls(_START_S, product_s, product_s)

    def step_s(self, shape: BackboneShape, method: str, images: int, recomputed: int = 0) -> float:
        """Return the seconds of a training step, whose backward pass counts as forward passes.

        Blocks that are computed again count once more: at ViT-B, 224 px, batch 8 all of them took 0.6 to 1 of a forward
        pass.

        Args:
            shape: of the backbone.
            method: of the experiment.
            images: of the batch.
            recomputed: blocks, from the first on, that the backward pass computes again.
        """
        values = shape.values_by_block
        passes = METHODS[method].forward_passes + sum(values[:recomputed]) / sum(values)
        return self.step_product_s * images * shape.multiply_adds * passes

    def image_s(self, shape: BackboneShape) -> float:
        """Return the seconds of a forward pass for each of its images."""
        return self.image_product_s * shape.multiply_adds


def product_throughput(
    shape: BackboneShape,
    device: torch.device,
    precision: Precision,
    threads: int,
    compute: Compute = "float",
    bits: Bits | None = None,
) -> float:
    """Return multiply-adds per second of the product that the model spends the most on.

    Args:
        shape: of the model.
        device: on which it computes.
        precision: in which it computes.
        threads: of a run.
        compute: int8 for products of 8-bit integers, which are as much faster as they were found to be.
        bits: of these, as a study was begun with.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    work: Counter[tuple[int, int, int]] = Counter()
    for module in shape.modules:
        work[module.tokens, module.in_features, module.out_features] += module.multiply_adds
    (tokens, inputs, outputs), _ = work.most_common(1)[0]
    x = torch.ones(32 * tokens, inputs, dtype=dtype, device=device)
    weight = torch.ones(outputs, inputs, dtype=dtype, device=device)
    times: list[float] = []
    with torch_threads(threads):
        started = time.perf_counter()
        while len(times) < 3 or (time.perf_counter() - started < _PRODUCTS_S and len(times) < 200):
            begin = time.perf_counter()
            float((x @ weight.T)[0, 0])
            times.append(time.perf_counter() - begin)
    throughput = x.shape[0] * x.shape[1] * weight.shape[0] / statistics.median(times)
    if compute == "float":
        return throughput
    choice = matmuls.choose_product(device, precision, bits)
    return throughput * choice.float_s / choice.seconds


def product_throughputs(
    requested: ComputeSetting, shape: BackboneShape, device: torch.device, precision: Precision, threads: int
) -> dict[Compute, float]:
    """Return multiply-adds per second of the way to compute that was asked for, see `product_throughput`.

    For auto that is the one that `choose_product` has found to be faster; float's comes second where that is int8.

    Raises:
        UserError: if int8 was asked for, and the device has no such product, or a slow one.
    """
    ways: list[Compute] = ["float"] if requested == "auto" else [requested]
    if requested == "int8":
        matmuls.choose_product(device, precision).usable(device, "--compute")
    elif requested == "auto" and matmuls.choose_product(device, precision).is_faster:
        ways = ["int8", "float"]
    return {way: product_throughput(shape, device, precision, threads, way) for way in ways}


# --- what the runs of a study will take -------------------------------------------------------------------------------

Basis = Literal["records", "calibration", "estimate"]  # estimate: arithmetic, nothing was measured


@dataclass(frozen=True)
class RunCost:
    """What a run will take, what that is known from, and what of its time comes after the last step, if known."""

    seconds: float
    peak_memory_bytes: int
    basis: Basis
    after_s: float = 0.0


@dataclass(frozen=True)
class Workload:
    """What all runs of a study share."""

    shape: BackboneShape
    image_size: int
    channels: int
    device: torch.device
    precision: Precision
    threads: int
    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class FinishedCost:
    """What a finished run took; `here`: on this machine. Its record has every step, too much to hold for all runs."""

    seconds: float
    peak_memory_bytes: int
    here: bool
    weights_sha256: str | None = None

    @classmethod
    def of(cls, record: RunRecord) -> FinishedCost:
        """Read it off a record."""
        made = record.provenance
        here = made is None or (made.processor, made.cpu_count) == (processor_name(), cpu_count())
        weights_sha256 = None if made is None else made.weights_sha256
        return cls(record.seconds, record.peak_memory_bytes or 0, here, weights_sha256)


@dataclass(frozen=True)
class EstimateRequest:
    """A run that is to be estimated.

    Attributes:
        spec: of the run.
        steps: optimiser steps.
        kind: its timing run; runs of one kind cost the same a step.
        kind_sha256: digest of `kind`, computed once for all seeds.
        finished: what it took, if it is done.
    """

    spec: RunSpec
    steps: int
    kind: RunSpec
    kind_sha256: str
    finished: FinishedCost | None


# Does timing runs, by a name to show; some may fail.
MeasureSteps = Callable[[Mapping[str, RunSpec]], Mapping[str, MeasuredCosts]]


def estimate_runs(
    runs: Sequence[EstimateRequest], workload: Workload, measure: MeasureSteps | None = None
) -> list[RunCost]:
    """Return what each run will take.

    Args:
        runs: of a study.
        workload: what they share.
        measure: does the timing runs of kinds of which nothing is known; None: arithmetic estimates them.
    """
    finished: dict[tuple[str, int], list[FinishedCost]] = {}
    for run in runs:
        if run.finished is not None and run.finished.here:
            finished.setdefault((run.kind_sha256, run.steps), []).append(run.finished)
    measured = {run.kind_sha256: cached_costs(run.kind) for run in runs}
    if measure is not None:
        unknown = {
            run.kind_sha256: run
            for run in runs
            if run.finished is None
            and not run.spec.experiment.is_probe  # it takes no steps, and its features may be there already
            and (run.kind_sha256, run.steps) not in finished
            and measured[run.kind_sha256] is None
        }
        by_name = measure({run.spec.experiment.name: run.kind for run in unknown.values()}) if unknown else {}
        measured |= {kind: by_name.get(run.spec.experiment.name) for kind, run in unknown.items()}
    multiply_adds_per_s = functools.cache(
        functools.partial(product_throughput, workload.shape, workload.device, workload.precision, workload.threads)
    )
    costs = []
    for run in runs:
        experiment, training = run.spec.experiment, run.spec.experiment.training
        if alike := finished.get((run.kind_sha256, run.steps)):
            seconds = statistics.median(cost.seconds for cost in alike)
            costs.append(RunCost(seconds, max(cost.peak_memory_bytes for cost in alike), "records"))
            continue
        after: float = workload.test + measured_images(run.spec, workload)
        steps, images = run.steps, experiment.validations(workload.train) * workload.validation + after
        if timing := measured[run.kind_sha256]:
            start_s, step_s, image_s = timing.start_s, timing.step_s, timing.image_s
            pixels = workload.image_size**2 * workload.channels  # mapped into memory as they are read
            more_images = max(0, workload.train + workload.validation + workload.test - timing.images)
            peak_bytes = timing.peak_memory_bytes + more_images * pixels
            # The timing run has done what the study's `measures` ask for, before its first step.
            images += workload.test - after
        else:
            speed = Throughput.estimated(multiply_adds_per_s(training.decided_compute, training.integer_bits))
            recomputed = training.recomputed_of(len(workload.shape.values_by_block))
            batch_size = min(training.batch_size, workload.train)
            step_s = speed.step_s(workload.shape, experiment.method, batch_size, recomputed)
            start_s, image_s = speed.start_s, speed.image_s(workload.shape)
            peak_bytes = estimated_bytes(run.spec, workload)
        if experiment.is_probe:  # each image once, in every way in which training shows it
            images = len(FLIP_AXES[training.flips]) * workload.train + workload.validation + after
            steps = after = 0
        seconds = start_s + steps * step_s + images * image_s
        basis: Basis = "estimate" if timing is None else "calibration"
        costs.append(RunCost(seconds, peak_bytes, basis, min(seconds, after * image_s)))
    return costs


def activation_values(shape: BackboneShape, recomputed: int = 0) -> float:
    """Return the values that a step saves of one image for its backward pass.

    Of the first blocks, which are computed again: what goes into each, 1 a token and width. Of the others all, or as
    much as the largest of those that are computed again, whose turn comes when nothing is left of the others.
    """
    first, others = shape.values_by_block[:recomputed], shape.values_by_block[recomputed:]
    return sum(first) / 16 + _VALUES_SAVED * max(sum(others), *first, 0)


def estimated_bytes(spec: RunSpec, workload: Workload) -> int:
    """Return the resident memory of a run: of the process, of what a step keeps, and of the weights."""
    experiment, shape = spec.experiment, workload.shape
    value_bytes = 2 if workload.precision == "bf16" else 4
    recomputed = experiment.training.recomputed_of(len(shape.values_by_block))
    stored = 0.0 if experiment.is_probe else activation_values(shape, recomputed)
    activations = experiment.training.images_at_once * stored * value_bytes
    weights = shape.parameters * (METHODS[experiment.method].bytes_per_weight or 4 + value_bytes)
    return int(PROCESS_BYTES + activations + weights)


def measured_images(spec: RunSpec, workload: Workload) -> float:
    """Return the images that pass through the whole model for what the study's `measures` ask for.

    Leaving the update of a site out takes what comes from its block on; there is a pass with all updates, and one
    without those of each group. See `core.training.metrics.measure_ablation`.
    """
    measures = spec.measures
    images: float = (WARMUP_PASSES + TIMED_PASSES) * sum(measures.latency_batches)
    if measures.removal_images is not None and spec.experiment.has_adapters:
        sites = workload.shape.sites
        layers = sorted(site.layer for site in sites)
        repeated = sum(site.multiply_adds * bisect_right(layers, site.layer) for site in sites)
        passes = repeated / sum(site.multiply_adds for site in sites) + 1 + len(GROUPS)
        images += passes * min(measures.removal_images, workload.validation)
    return images
