"""What a run will take, before it starts: from finished runs of its kind, from a calibration, or from arithmetic."""

from __future__ import annotations

import statistics
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from peft_vit.backbones import BackboneShape
from peft_vit.config import ExperimentConfig, Precision
from peft_vit.costs.cache import Costs, known_costs
from peft_vit.evaluation.metrics import GROUPS, TIMED_PASSES, WARMUP_PASSES
from peft_vit.methods import METHODS
from peft_vit.records import RunRecord, RunSpec
from peft_vit.runs.machine import cpu_count, processor_name
from peft_vit.training import FLIP_AXES

# Read off finished runs of the quickstart on two cores; they only scale the estimates that nothing was measured for.
TIME_OUTSIDE_PRODUCTS = 1.8  # time of a step over that of its large matrix products
PROCESS_BYTES = 700e6  # interpreter, torch, timm, code and buffers of a run
# Activations kept for backward over what goes into and out of the matrices: of a plain block 34 a token and width.
VALUES_KEPT = 34 / 16
START_S = 6.0  # loading weights and images

Basis = Literal["records", "calibration", "estimate"]  # estimate: arithmetic, nothing was measured


@dataclass(frozen=True)
class Estimate:
    """What a run will take, and what that is known from."""

    seconds: float
    peak_memory_bytes: int
    basis: Basis


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

    def product_rate(self, *, budget_s: float = 0.2) -> float:
        """Return multiply-adds per second, see `product_rate`."""
        return product_rate(self.shape, self.device, self.precision, self.threads, budget_s=budget_s)


@dataclass(frozen=True)
class MeasuredCost:
    """What a finished run took; `here`: on this machine. Its record has every step, too much to hold for all runs."""

    seconds: float
    peak_memory_bytes: int
    here: bool

    @classmethod
    def of(cls, record: RunRecord) -> MeasuredCost:
        """Read it off a record."""
        made = record.provenance
        here = made is None or (made.processor, made.cpu_count) == (processor_name(), cpu_count())
        return cls(record.seconds, record.peak_memory_bytes or 0, here)


@dataclass(frozen=True)
class EstimateRequest:
    """A run that is to be estimated.

    Attributes:
        spec: of the run.
        steps: optimiser steps.
        kind: its miniature; runs of one kind cost the same a step.
        kind_sha256: of the miniature, computed once for all seeds.
        taken: what it took, if it is done.
    """

    spec: RunSpec
    steps: int
    kind: RunSpec
    kind_sha256: str
    taken: MeasuredCost | None


Measure = Callable[[Mapping[str, RunSpec]], Mapping[str, Costs]]  # miniatures by a name to show; some may fail


def estimate_runs(
    runs: Sequence[EstimateRequest], workload: Workload, measure: Measure | None = None
) -> list[Estimate]:
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
    first = {run.kind_sha256: run for run in reversed(runs)}
    costs = {kind: known_costs(run.kind) for kind, run in first.items()}
    if measure is not None:
        unknown = {
            run.kind_sha256: run
            for run in runs
            if run.taken is None
            and not run.spec.experiment.is_probe  # it takes no steps, and its features may be there already
            and (run.kind_sha256, run.steps) not in records
            and costs[run.kind_sha256] is None
        }
        found = measure({run.spec.experiment.name: run.kind for run in unknown.values()}) if unknown else {}
        costs |= {kind: found.get(run.spec.experiment.name) for kind, run in unknown.items()}
    rate = workload.product_rate() if None in costs.values() else 1.0
    estimates = []
    for run in runs:
        cost, alike = costs[run.kind_sha256], records.get((run.kind_sha256, run.steps))
        if alike is not None:
            seconds = statistics.median(one.seconds for one in alike)
            estimates.append(Estimate(seconds, max(one.peak_memory_bytes for one in alike), "records"))
        elif cost is not None:
            estimates.append(_from_costs(run, workload, cost))
        else:
            estimates.append(_from_arithmetic(run, workload, rate))
    return estimates


def _from_costs(run: EstimateRequest, workload: Workload, costs: Costs) -> Estimate:
    evaluated = run.spec.experiment.validations(workload.train) * workload.validation + workload.test
    seconds = costs.start_s + run.steps * costs.step_s + evaluated * costs.image_s
    more_images = workload.train + workload.validation + workload.test - costs.images
    pixels = more_images * workload.image_size**2 * workload.channels  # mapped into memory as they are read
    return Estimate(seconds, costs.peak_memory_bytes + max(0, pixels), "calibration")


def kept_values(shape: BackboneShape, recomputed: int = 0) -> float:
    """Return the values that a step keeps of one image for its backward pass.

    Of the first blocks, which are computed again: what goes into each, 1 a token and width. Of the others all, or as
    much as the largest of those that are computed again, whose turn comes when nothing is left of the others.
    """
    first, others = shape.values_by_block[:recomputed], shape.values_by_block[recomputed:]
    return sum(first) / 16 + VALUES_KEPT * max(sum(others), *first, 0)


def recomputed_passes(shape: BackboneShape, recomputed: int) -> float:
    """Return how much of a forward pass more a step takes that computes its first blocks again.

    At ViT-B, 224 px, batch 8 all blocks took 0.6 to 1 of a forward pass.
    """
    return sum(shape.values_by_block[:recomputed]) / sum(shape.values_by_block)


def step_passes(experiment: ExperimentConfig, shape: BackboneShape) -> float:
    """Return how many forward passes a step takes as long as."""
    recomputed = experiment.training.recomputed_of(len(shape.values_by_block))
    return METHODS[experiment.method].forward_passes + recomputed_passes(shape, recomputed)


def _from_arithmetic(run: EstimateRequest, workload: Workload, rate: float) -> Estimate:
    experiment = run.spec.experiment
    value_bytes = 2 if workload.precision == "bf16" else 4
    recomputed = experiment.training.recomputed_of(len(workload.shape.values_by_block))
    kept = 0.0 if experiment.is_probe else kept_values(workload.shape, recomputed)
    activations = experiment.training.images_at_once * kept * value_bytes
    weights = workload.shape.parameters * (METHODS[experiment.method].bytes_per_weight or 4 + value_bytes)
    images = workload.test + _measured_images(run.spec, workload)
    if experiment.is_probe:  # each image once, in every way in which training shows it
        images += len(FLIP_AXES[experiment.training.flips]) * workload.train + workload.validation
    else:
        batch_size = min(experiment.training.batch_size, workload.train)
        images += step_passes(experiment, workload.shape) * run.steps * batch_size
        images += experiment.validations(workload.train) * workload.validation
    seconds = START_S + TIME_OUTSIDE_PRODUCTS * workload.shape.multiply_adds * images / rate
    return Estimate(seconds, int(PROCESS_BYTES + activations + weights), "estimate")


def _measured_images(spec: RunSpec, workload: Workload) -> float:
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


def bf16_factor(workload: Workload) -> float:
    """Return the time of a matrix product in bf16 over that in fp32, measured in about 0.2 s."""
    fp32, bf16 = (replace(workload, precision=one).product_rate(budget_s=0.1) for one in get_args(Precision))
    return fp32 / bf16


def product_rate(
    shape: BackboneShape, device: torch.device, precision: Precision, threads: int, *, budget_s: float = 0.2
) -> float:
    """Return multiply-adds per second of the product that the model spends the most on.

    Args:
        shape: of the model.
        device: on which it computes.
        precision: in which it computes.
        threads: of a run.
        budget_s: for how long products are timed, about; three are in any case.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    work: Counter[tuple[int, int, int]] = Counter()
    for one in shape.modules:
        work[one.tokens, one.in_features, one.out_features] += one.multiply_adds
    (tokens, inputs, outputs), _ = work.most_common(1)[0]
    x = torch.ones(32 * tokens, inputs, dtype=dtype, device=device)
    weight = torch.ones(outputs, inputs, dtype=dtype, device=device)
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - started < budget_s and len(times) < 200):
        begin = time.perf_counter()
        float((x @ weight.T)[0, 0])
        times.append(time.perf_counter() - begin)
    torch.set_num_threads(before)
    return x.shape[0] * x.shape[1] * weight.shape[0] / statistics.median(times)
