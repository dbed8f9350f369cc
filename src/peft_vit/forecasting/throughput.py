"""How fast this machine works through a model: by steps that were measured at one size or two, or by its products."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from peft_vit.backbones import BackboneShape
from peft_vit.config import ExperimentConfig, Precision
from peft_vit.forecasting.calibration import Costs
from peft_vit.methods import METHODS

# Read off finished runs of the quickstart on two cores; they only scale the estimates that nothing was measured for.
TIME_OUTSIDE_PRODUCTS = 1.8  # time of a step over that of its large matrix products
START_S = 6.0  # loading weights and images
PROCESS_S = 10.0  # until a worker process is ready


@dataclass(frozen=True)
class Line:
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
    step: Line
    image: Line
    process_s: float = PROCESS_S

    @classmethod
    def estimated(cls, rate: float) -> Self:
        """Return what follows from multiply-adds per second alone, see `product_rate`."""
        line = Line(0.0, TIME_OUTSIDE_PRODUCTS / rate)
        return cls(START_S, line, line)

    @classmethod
    def measured(cls, probes: Mapping[str, Sequence[Probe]], process_s: float = PROCESS_S) -> Self:
        """Return what follows from measured runs of some experiments, each at one size or more, the same one first.

        Steps lie on the line of an experiment that was measured at the most sizes, as far above it as the slowest.
        """
        every = [probe for own in probes.values() for probe in own]
        line = Line.through([(probe.step_products, probe.costs.step_s) for probe in max(probes.values(), key=len)])
        longer = max(own[0].costs.step_s / line.at(own[0].step_products) for own in probes.values())
        by_size: dict[int, list[float]] = {}
        for probe in every:
            by_size.setdefault(probe.image_products, []).append(probe.costs.image_s)
        return cls(
            max(statistics.median(probe.costs.start_s for probe in own) for own in probes.values()),
            Line(longer * line.fixed_s, longer * line.product_s),
            Line.through([(products, statistics.median(seconds)) for products, seconds in by_size.items()]),
            process_s,
        )

    def step_s(self, shape: BackboneShape, method: str, images: int, recomputed: int = 0) -> float:
        """Return the seconds of a training step, see `step_products`."""
        return self.step.at(step_products(shape, method, images, recomputed))

    def image_s(self, shape: BackboneShape) -> float:
        """Return the seconds of a forward pass for each of its images."""
        return self.image.at(shape.multiply_adds)


@dataclass(frozen=True)
class Probe:
    """What a run took whose steps, and whose images in a forward pass, have so many multiply-adds."""

    step_products: float
    image_products: int
    costs: Costs


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
    for module in shape.modules:
        work[module.tokens, module.in_features, module.out_features] += module.multiply_adds
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
