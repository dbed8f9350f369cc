"""What `training.memory_limit` makes of an experiment: images that pass at a time, and blocks that are computed again.

Both have a price in time. Of what was measured, the fastest that keeps within the limit is taken. Few are measured:
in between, memory is taken as affine in the images and in what their blocks keep, time as affine in the passes of a
step, and longer by what is computed again; what these name as the fastest is measured before it is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from peft_vit.base.errors import UserError
from peft_vit.core.config import ExperimentConfig, TrainingConfig, bytes_of
from peft_vit.core.records import RunSpec
from peft_vit.data import ImageIndex, Splits
from peft_vit.runs.costs.estimate import Workload
from peft_vit.runs.costs.timing_run import timing_run

_MOST_MEASURED = 10
_AGAIN = 0.3  # of a step: all blocks computed again, as far as no measurement tells
_INPUT_SHARE = 1 / 34  # of a plain block's inputs in all that it keeps
_NEARLY_FITS = 1.01  # of the limit: what is expected there is measured, too
_WORTH_MEASURING = 0.98  # of the fastest that was measured: a smaller gain is within what times scatter
_STEPS = 3  # that are measured; the first one also allocates what the others find
_FIELD = "training.memory_limit"


@dataclass(frozen=True)
class Setting:
    """How a step is done: images that pass at a time, and blocks, from the first on, that are computed again."""

    images: int
    recomputed: int

    def in_words(self, blocks: int) -> str:
        """Return it in words, of a model of so many blocks."""
        images = "1 image" if self.images == 1 else f"{self.images} images"
        again = f"{self.recomputed} of {blocks} blocks" if self.recomputed else "no block"
        return f"{images} at a time, {again} computed again"


@dataclass(frozen=True)
class StepCost:
    """What a run with a setting took in a process of its own.

    Attributes:
        step_s: of its fastest step.
        peak_bytes: the largest resident memory of the process, whatever it is made of.
        model_bytes: of that, the model as it is kept, packed or not.
    """

    step_s: float
    peak_bytes: int
    model_bytes: int = 0


@dataclass(frozen=True)
class MemoryChoice:
    """What was chosen.

    Attributes:
        setting: the fastest that keeps within the limit; if none does, the one that takes the least.
        cost: of it.
        free: what would be done without a limit: all images at a time, and nothing computed again.
        free_cost: of it; None: there was not enough memory to do it.
        fits: whether it keeps within the limit.
    """

    setting: Setting
    cost: StepCost
    free: Setting
    free_cost: StepCost | None
    fits: bool

    def line(self, experiment: ExperimentConfig, blocks: int) -> str:
        """Return what was chosen for an experiment, and its price."""
        taken = (
            f"{experiment.name}, memory_limit {experiment.training.memory_limit}: {self.setting.in_words(blocks)}. "
            f"Measured: {_mb(self.cost.peak_bytes)} in all, {self.cost.step_s:.2f} s a step"
        )
        if self.setting == self.free:
            return f"{taken}; the limit is not reached."
        without = self.free.in_words(blocks)
        if self.free_cost is None:
            return f"{taken}; for {without}, there is not enough memory here."
        ratio, free_bytes = self.cost.step_s / self.free_cost.step_s, _mb(self.free_cost.peak_bytes)
        return f"{taken}, {ratio:.2f} of that with {without}, which takes {free_bytes}."


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


# --- the fastest setting within a limit -------------------------------------------------------------------------------


def choose_memory(
    limit_bytes: int,
    batch_size: int,
    block_values: Sequence[int],
    measure: Callable[[Setting], StepCost | None],
    *,
    images: int | None = None,
) -> MemoryChoice | None:
    """Return the fastest setting that keeps within a limit, measured; of equally fast ones that of the most images.

    The whole batch with nothing computed again is taken if it fits: a limit that is not reached changes nothing.

    Args:
        limit_bytes: of the resident memory of a process.
        batch_size: images of a step.
        block_values: what each block keeps for its backward pass, in any unit, in the order of a forward pass.
        measure: does a run of a few steps in a process of its own; None: there was not enough memory to do it.
        images: that pass at a time, if that is decided already.

    Returns:
        None if there was not even enough memory to measure the one that takes the least.
    """
    sizes = [images] if images is not None else [n for n in range(batch_size, 0, -1) if batch_size % n == 0]
    search = _Search(limit_bytes, batch_size, np.asarray(block_values, dtype=np.float64), measure)
    free, deepest = Setting(sizes[0], 0), len(block_values) - 1  # computing the last block again saves nothing
    search.take(free)
    if not search.fitting:
        search.take(Setting(sizes[-1], deepest))
        search.take(Setting(sizes[0], deepest))
        if not search.known:
            return None
        for size in sizes[1:] if search.fitting else ():
            if all(setting.recomputed for setting in search.known):  # what the blocks keep has to be seen once
                search.take(Setting(size, 0))
        settings = [Setting(size, recomputed) for size in sizes for recomputed in range(deepest + 1)]
        while len(search.costs) < _MOST_MEASURED and (better := search.may_be_faster(settings)):
            search.take(better)
    if fitting := search.fitting:
        chosen = min(fitting, key=lambda setting: (fitting[setting].step_s, -setting.images, setting.recomputed))
    else:
        chosen = min(search.known, key=lambda setting: search.known[setting].peak_bytes)
    return MemoryChoice(chosen, search.known[chosen], free, search.costs[free], fits=bool(fitting))


@dataclass
class _Search:
    limit_bytes: int
    batch_size: int
    block_values: NDArray[np.float64]
    measure: Callable[[Setting], StepCost | None]
    costs: dict[Setting, StepCost | None] = field(default_factory=dict)  # None: there was not enough memory

    def take(self, setting: Setting) -> None:
        """Measure a setting, unless it was."""
        if setting not in self.costs:
            self.costs[setting] = self.measure(setting)

    @property
    def known(self) -> dict[Setting, StepCost]:
        return {setting: cost for setting, cost in self.costs.items() if cost is not None}

    @property
    def fitting(self) -> dict[Setting, StepCost]:
        return {setting: cost for setting, cost in self.known.items() if cost.peak_bytes <= self.limit_bytes}

    def may_be_faster(self, settings: Iterable[Setting]) -> Setting | None:
        """Return what is not measured yet, should fit, and should be the fastest; None: the fastest was measured.

        Least squares through what was measured predict memory and time of the others.
        """
        known, left = self.known, [setting for setting in settings if setting not in self.costs]
        if not left or not self.fitting:
            return None

        def predicted(terms: Callable[[Setting], list[float]], measured: list[float]) -> NDArray[np.float64]:
            weights, *_ = np.linalg.lstsq(np.array([terms(setting) for setting in known]), measured, rcond=None)
            return np.array([terms(setting) for setting in left]) @ weights

        peaks = predicted(self._memory_terms, [cost.peak_bytes for cost in known.values()])
        times = predicted(self._time_terms, [cost.step_s for cost in known.values()])
        at_most_s = _WORTH_MEASURING * min(cost.step_s for cost in self.fitting.values())
        faster = [
            (round(step_s / at_most_s, 2), -setting.images, step_s, setting)
            for setting, peak, step_s in zip(left, peaks, times, strict=True)
            if peak <= _NEARLY_FITS * self.limit_bytes and step_s < at_most_s
        ]
        return min(faster, key=lambda option: option[:3])[-1] if faster else None

    def _memory_terms(self, setting: Setting) -> list[float]:
        """Return 1, the images, and what the blocks keep of them at the moment when they keep the most."""
        again, others = np.split(self.block_values, [setting.recomputed])
        inputs = _INPUT_SHARE * np.cumsum([0.0, *again])  # of the blocks before each, and of all
        share = max(inputs[-1] + others.sum(), (inputs[:-1] + again).max(initial=0.0)) / self.block_values.sum()
        return [1.0, setting.images, setting.images * share]

    def _time_terms(self, setting: Setting) -> list[float]:
        """Return 1 and the passes of a step, longer by what is computed again, and its share, which corrects that."""
        share = self.block_values[: setting.recomputed].sum() / self.block_values.sum()
        longer = 1 + _AGAIN * share
        return [longer, longer * self.batch_size / setting.images, share]


# --- a run with a limit -----------------------------------------------------------------------------------------------

MeasureStep = Callable[[RunSpec], StepCost | None]  # of a run of a few steps; None: there was not enough memory


def decide_memory(
    spec: RunSpec, total_steps: int, workload: Workload, index: ImageIndex, splits: Splits, measure_step: MeasureStep
) -> tuple[TrainingConfig, MemoryChoice]:
    """Return an experiment's training with the fastest setting that keeps within its limit, and what that costs.

    The limit counts all resident memory of the process that does a run, Python and its libraries included.

    Args:
        spec: of a run that is still undecided.
        total_steps: of the run.
        workload: of its study.
        index: its images.
        splits: of the images.
        measure_step: does a few steps of a run in a process of its own.

    Raises:
        UserError: if nothing fits, with the least that would.
    """
    training, shape = spec.experiment.training, workload.shape
    assert training.memory_limit is not None
    limit, blocks = bytes_of(training.memory_limit), len(shape.values_by_block)
    if workload.device.type != "cpu":
        raise UserError(
            f"is measured on the CPU alone, and runs go to {workload.device.type} here; use the CPU, or remove it "
            "and set micro_batch_size and activation_checkpointing",
            field=_FIELD,
        )

    def measure(setting: Setting) -> StepCost | None:
        """Measure a run of a few steps that takes as much memory as the whole run would with a setting.

        The head starts as it does in the run: its probe's batches are of a size of their own.
        """
        decided = training.decided(setting.images, setting.recomputed)
        run = spec.model_copy(update={"experiment": spec.experiment.model_copy(update={"training": decided})})
        few = max(2 * len(index.class_names), setting.images, spec.measures.removal_images or 0)
        return measure_step(
            timing_run(
                run, total_steps, shape, index, splits, at_most=_STEPS, evaluated=few, head_start=training.head_start
            )
        )

    choice = choose_memory(limit, training.batch_size, shape.values_by_block, measure, images=training.micro_batch_size)
    if choice is None:
        raise UserError(
            f"{training.memory_limit}: not even a step of {Setting(1, 0).in_words(blocks)} could be measured in the "
            "memory that is free here",
            field=_FIELD,
        )
    if not choice.fits:
        raise UserError(
            f"{training.memory_limit} is too little; the least that fits is "
            f"{math.ceil(choice.cost.peak_bytes / 1e6)}MB, with {choice.setting.in_words(blocks)}: "
            f"{_mb(choice.cost.model_bytes)} of it is the model",
            field=_FIELD,
        )
    return training.decided(choice.setting.images, choice.setting.recomputed), choice
