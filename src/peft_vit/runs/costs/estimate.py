"""What runs will take: as finished runs of their kind did, by steps that were measured, or by arithmetic."""

from __future__ import annotations

import statistics
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch

from peft_vit.core.backbones import BackboneShape
from peft_vit.core.config import Compute, ComputeSetting, ExperimentConfig, Precision
from peft_vit.core.methods import METHODS
from peft_vit.core.quantization.integers import Bits
from peft_vit.core.records import RunRecord, RunSpec
from peft_vit.core.training import FLIP_AXES
from peft_vit.core.training.metrics import GROUPS, TIMED_PASSES, WARMUP_PASSES
from peft_vit.runs.costs.calibration_run import MeasuredCosts, known_costs
from peft_vit.runs.costs.time_limit import PROCESS_S
from peft_vit.runs.this_machine import kept_products
from peft_vit.runs.this_machine.machine import cpu_count, processor_name

# Read off finished runs of the quickstart on two cores; they only scale the estimates that nothing was measured for.
TIME_OUTSIDE_PRODUCTS = 1.8  # time of a step over that of its large matrix products
START_S = 6.0  # loading weights and images
PROCESS_BYTES = 700e6  # interpreter, torch, timm, code and buffers of a run
_PRODUCTS_S = 0.2  # for which products are timed, about; three are in any case
# Activations kept for backward over what goes into and out of the matrices: of a plain block 34 a token and width.
VALUES_KEPT = 34 / 16


# --- how fast this machine works through a model ----------------------------------------------------------------------


@dataclass(frozen=True)
class CostLine:
    """Seconds by multiply-adds: a part that no size changes, and one in proportion to them."""

    fixed_s: float
    product_s: float

    @classmethod
    def through(cls, points: Collection[tuple[float, float]]) -> Self:
        """Return the line through the smallest and the largest point that does not fall, nor begin below 0."""
        (left, low), (right, high) = min(points), max(points)
        slope = max(0.0, (high - low) / (right - left)) if left < right else high / right
        return cls(high - slope * right, slope) if slope * right < high else cls(0.0, high / right)

    def at(self, products: float) -> float:
        """Return the seconds of so many multiply-adds."""
        return self.fixed_s + self.product_s * products


@dataclass(frozen=True)
class Throughput:
    """What the parts of a run take, by how much they multiply.

    Attributes:
        start_s: of all that a run does once.
        step: of a training step, by its multiply-adds, see `step_products`.
        image: of each image of a forward pass, by its multiply-adds.
        process_s: until a worker process is ready.
    """

    start_s: float
    step: CostLine
    image: CostLine
    process_s: float = PROCESS_S

    @classmethod
    def estimated(cls, rate: float) -> Self:
        """Return what follows from multiply-adds per second alone, see `product_rate`."""
        line = CostLine(0.0, TIME_OUTSIDE_PRODUCTS / rate)
        return cls(START_S, line, line)

    @classmethod
    def measured(cls, probes: Sequence[StepTiming], process_s: float) -> Self:
        """Return what follows from measured runs of an experiment, of one size or more."""
        return cls(
            statistics.median(probe.costs.start_s for probe in probes),
            CostLine.through([(probe.step_products, probe.costs.step_s) for probe in probes]),
            CostLine.through([(probe.image_products, probe.costs.image_s) for probe in probes]),
            process_s,
        )

    def step_s(self, shape: BackboneShape, method: str, images: int, recomputed: int = 0) -> float:
        """Return the seconds of a training step, see `step_products`."""
        return self.step.at(step_products(shape, method, images, recomputed))

    def image_s(self, shape: BackboneShape) -> float:
        """Return the seconds of a forward pass for each of its images."""
        return self.image.at(shape.multiply_adds)


@dataclass(frozen=True)
class StepTiming:
    """What a run took whose steps, and whose images in a forward pass, have so many multiply-adds."""

    step_products: float
    image_products: int
    costs: MeasuredCosts


def step_products(shape: BackboneShape, method: str, images: int, recomputed: int = 0) -> float:
    """Return the multiply-adds of a step, as if forward and backward passes were forward passes alone.

    Blocks that are computed again count once more: at ViT-B, 224 px, batch 8 all of them took 0.6 to 1 of a forward
    pass.

    Args:
        shape: of the backbone.
        method: of the experiment.
        images: of the batch.
        recomputed: blocks, from the first on, that the backward pass computes again.
    """
    values = shape.values_by_block
    return images * shape.multiply_adds * (METHODS[method].forward_passes + sum(values[:recomputed]) / sum(values))


def experiment_products(experiment: ExperimentConfig, shape: BackboneShape, train_images: int) -> float:
    """Return the multiply-adds of an experiment's step; no batch is larger than the training set."""
    training = experiment.training
    recomputed = training.recomputed_of(len(shape.values_by_block))
    return step_products(shape, experiment.method, min(training.batch_size, train_images), recomputed)


def product_rate(
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
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    work: Counter[tuple[int, int, int]] = Counter()
    for module in shape.modules:
        work[module.tokens, module.in_features, module.out_features] += module.multiply_adds
    (tokens, inputs, outputs), _ = work.most_common(1)[0]
    x = torch.ones(32 * tokens, inputs, dtype=dtype, device=device)
    weight = torch.ones(outputs, inputs, dtype=dtype, device=device)
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - started < _PRODUCTS_S and len(times) < 200):
        begin = time.perf_counter()
        float((x @ weight.T)[0, 0])
        times.append(time.perf_counter() - begin)
    torch.set_num_threads(before)
    rate = x.shape[0] * x.shape[1] * weight.shape[0] / statistics.median(times)
    if compute == "float":
        return rate
    choice = kept_products.choose_product(device, precision, bits)
    return rate * choice.float_s / choice.seconds


def product_rates(
    asked: ComputeSetting, shape: BackboneShape, device: torch.device, precision: Precision, threads: int
) -> dict[Compute, float]:
    """Return multiply-adds per second of the way to compute that was asked for, see `product_rate`.

    For auto that is the one that `choose_product` has found to be faster; float's comes second where that is int8.

    Raises:
        UserError: if int8 was asked for, and the device has no such product, or a slow one.
    """
    ways: list[Compute] = ["float"] if asked == "auto" else [asked]
    if asked == "int8":
        kept_products.choose_product(device, precision).usable(device, "--compute")
    elif asked == "auto" and kept_products.choose_product(device, precision).is_faster:
        ways = ["int8", "float"]
    return {way: product_rate(shape, device, precision, threads, way) for way in ways}


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

    def throughput(self, compute: Compute = "float", bits: Bits | None = None) -> Throughput:
        """Return what runs take by arithmetic alone, see `product_rate`."""
        rate = product_rate(self.shape, self.device, self.precision, self.threads, compute, bits)
        return Throughput.estimated(rate)


@dataclass(frozen=True)
class MeasuredCost:
    """What a finished run took; `here`: on this machine. Its record has every step, too much to hold for all runs."""

    seconds: float
    peak_memory_bytes: int
    here: bool
    weights_sha256: str | None = None

    @classmethod
    def of(cls, record: RunRecord) -> MeasuredCost:
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
        kind: its calibration run; runs of one kind cost the same a step.
        kind_sha256: of it, computed once for all seeds.
        taken: what it took, if it is done.
    """

    spec: RunSpec
    steps: int
    kind: RunSpec
    kind_sha256: str
    taken: MeasuredCost | None


MeasureSteps = Callable[
    [Mapping[str, RunSpec]], Mapping[str, MeasuredCosts]
]  # calibration runs by a name to show; some may fail


def estimate_runs(
    runs: Sequence[EstimateRequest], workload: Workload, measure: MeasureSteps | None = None
) -> list[RunCost]:
    """Estimate each run.

    Args:
        runs: of a study.
        workload: what they share.
        measure: measures what runs cost that are not done and of which nothing is known; None: arithmetic does.

    Returns:
        An estimate each.
    """
    records: dict[tuple[str, int], list[MeasuredCost]] = {}
    for run in runs:
        if run.taken is not None and run.taken.here:
            records.setdefault((run.kind_sha256, run.steps), []).append(run.taken)
    costs = {kind: known_costs(run.kind) for kind, run in {run.kind_sha256: run for run in reversed(runs)}.items()}
    if measure is not None:
        unknown = {
            run.kind_sha256: run
            for run in runs
            if run.taken is None
            and not run.spec.experiment.is_probe  # it takes no steps, and its features may be there already
            and (run.kind_sha256, run.steps) not in records
            and costs[run.kind_sha256] is None
        }
        measured = measure({run.spec.experiment.name: run.kind for run in unknown.values()}) if unknown else {}
        costs |= {kind: measured.get(run.spec.experiment.name) for kind, run in unknown.items()}
    trainings = [run.spec.experiment.training for run in runs if costs[run.kind_sha256] is None]
    computes = {training.decided_compute: training.integer_bits for training in trainings}
    estimated = {compute: workload.throughput(compute, bits) for compute, bits in computes.items()}
    estimates = []
    for run in runs:
        cost, alike = costs[run.kind_sha256], records.get((run.kind_sha256, run.steps))
        if alike is None:
            estimates.append(_estimate(run, workload, estimated, cost))
        else:
            seconds = statistics.median(taken.seconds for taken in alike)
            estimates.append(RunCost(seconds, max(taken.peak_memory_bytes for taken in alike), "records"))
    return estimates


def _estimate(
    run: EstimateRequest, workload: Workload, estimated: Mapping[Compute, Throughput], costs: MeasuredCosts | None
) -> RunCost:
    """Put a run's steps and the images that it evaluates together, at what its kind costs or is estimated to."""
    experiment, shape = run.spec.experiment, workload.shape
    images: float
    steps, images = run.steps, experiment.validations(workload.train) * workload.validation + workload.test
    if costs is not None:
        start_s, step_s, image_s = costs.start_s, costs.step_s, costs.image_s
        more_images = workload.train + workload.validation + workload.test - costs.images
        pixels = more_images * workload.image_size**2 * workload.channels  # mapped into memory as they are read
        peak_bytes = costs.peak_memory_bytes + max(0, pixels)
    else:
        throughput, peak_bytes = estimated[experiment.training.decided_compute], estimated_bytes(run.spec, workload)
        start_s, image_s = throughput.start_s, throughput.image_s(shape)
        step_s = throughput.step.at(experiment_products(experiment, shape, workload.train))
        if experiment.is_probe:  # each image once, in every way in which training shows it
            ways = len(FLIP_AXES[experiment.training.flips])
            steps, images = 0, ways * workload.train + workload.validation + workload.test
        images += measured_images(run.spec, workload)
    seconds = start_s + steps * step_s + images * image_s
    after_s = 0.0 if experiment.is_probe else (workload.test + measured_images(run.spec, workload)) * image_s
    return RunCost(seconds, peak_bytes, "estimate" if costs is None else "calibration", min(seconds, after_s))


def kept_values(shape: BackboneShape, recomputed: int = 0) -> float:
    """Return the values that a step keeps of one image for its backward pass.

    Of the first blocks, which are computed again: what goes into each, 1 a token and width. Of the others all, or as
    much as the largest of those that are computed again, whose turn comes when nothing is left of the others.
    """
    first, others = shape.values_by_block[:recomputed], shape.values_by_block[recomputed:]
    return sum(first) / 16 + VALUES_KEPT * max(sum(others), *first, 0)


def estimated_bytes(spec: RunSpec, workload: Workload) -> int:
    """Return the resident memory of a run: of the process, of what a step keeps, and of the weights."""
    experiment, shape = spec.experiment, workload.shape
    value_bytes = 2 if workload.precision == "bf16" else 4
    recomputed = experiment.training.recomputed_of(len(shape.values_by_block))
    stored = 0.0 if experiment.is_probe else kept_values(shape, recomputed)
    activations = experiment.training.images_at_once * stored * value_bytes
    weights = shape.parameters * (METHODS[experiment.method].bytes_per_weight or 4 + value_bytes)
    return int(PROCESS_BYTES + activations + weights)


def measured_images(spec: RunSpec, workload: Workload) -> float:
    """Return the images that pass through the whole model for what the study's `measures` ask for.

    Leaving the update of a site out takes what comes from its block on; there is a pass with all updates, and one
    without those of each group. See `evaluation.measure_ablation`.
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
