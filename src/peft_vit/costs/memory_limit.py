"""How many images pass at a time, and how many blocks are computed again, so that a run keeps within its memory.

Both have a price in time. Of what was measured, the fastest that keeps within the limit is taken. Few are measured:
in between, memory is taken as affine in the images and in what their blocks keep, time as affine in the passes of a
step, and longer by what is computed again; what these name as the fastest is measured before it is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_MOST_MEASURED = 10
_AGAIN = 0.3  # of a step: all blocks computed again, where none were measured without
_INPUT_SHARE = 1 / 34  # of a plain block's inputs in all that it keeps
_NEARLY_FITS = 1.01  # of the limit: what is expected there is measured, too
_WORTH_MEASURING = 0.98  # of the fastest that was measured: a smaller gain is within what times scatter


@dataclass(frozen=True)
class Setting:
    """How a step is done: images that pass at a time, and blocks, from the first on, that are computed again."""

    images: int
    recomputed: int


@dataclass(frozen=True)
class StepCost:
    """What a run with a setting took in a process of its own.

    Attributes:
        step_s: of its fastest step.
        peak_bytes: the largest resident memory of the process, whatever it is made of.
        own_bytes: of that, what training added to Python and its libraries, the model included; None: not known.
        model_bytes: of that, the model as it is kept, packed or not.
    """

    step_s: float
    peak_bytes: int
    own_bytes: int | None = None
    model_bytes: int = 0


Measure = Callable[[Setting], StepCost | None]  # None: there was not enough memory to do it


@dataclass(frozen=True)
class Choice:
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


def choose(
    limit_bytes: int, batch_size: int, block_values: Sequence[int], measure: Measure, *, images: int | None = None
) -> Choice | None:
    """Return the fastest setting that keeps within a limit, measured; of equally fast ones that of the most images.

    The whole batch with nothing computed again is taken if it fits: a limit that is not reached changes nothing.

    Args:
        limit_bytes: of the resident memory of a process.
        batch_size: images of a step.
        block_values: what each block keeps for its backward pass, in any unit, in the order of a forward pass.
        measure: does a run of a few steps in a process of its own.
        images: that pass at a time, if that is decided already.

    Returns:
        None if there was not even enough memory to measure the one that takes the least.
    """
    sizes = [images] if images is not None else [n for n in range(batch_size, 0, -1) if batch_size % n == 0]
    search = _Search(limit_bytes, batch_size, np.asarray(block_values, dtype=np.float64), measure)
    free = Setting(sizes[0], 0)
    cost = search.take(free)
    if cost is not None and cost.peak_bytes <= limit_bytes:
        return Choice(free, cost, free, cost, fits=True)
    deepest = len(block_values) - 1  # computing the last block again saves nothing
    for setting in (Setting(sizes[-1], deepest), Setting(sizes[0], deepest)):
        search.take(setting)
    if not search.known():
        return None
    if not search.fitting():
        least = min(search.known(), key=lambda one: search.known()[one].peak_bytes)
        return Choice(least, search.known()[least], free, cost, fits=False)
    for size in sizes[1:]:  # what the blocks keep has to be seen once
        if search.knows_what_blocks_keep or search.take(Setting(size, 0)) is not None:
            break
    every = [Setting(size, recomputed) for size in sizes for recomputed in range(deepest + 1)]
    while len(search.measured) < _MOST_MEASURED and (better := search.may_be_faster(every)) is not None:
        search.take(better)
    fitting = search.fitting()
    fastest = min(fitting, key=lambda one: (fitting[one].step_s, -one.images, one.recomputed))
    return Choice(fastest, fitting[fastest], free, cost, fits=True)


@dataclass
class _Search:
    limit_bytes: int
    batch_size: int
    block_values: NDArray[np.float64]
    measure: Measure
    measured: dict[Setting, StepCost | None] = field(default_factory=dict)

    def take(self, setting: Setting) -> StepCost | None:
        if setting not in self.measured:
            self.measured[setting] = self.measure(setting)
        return self.measured[setting]

    def known(self) -> dict[Setting, StepCost]:
        return {setting: cost for setting, cost in self.measured.items() if cost is not None}

    def fitting(self) -> dict[Setting, StepCost]:
        return {setting: cost for setting, cost in self.known().items() if cost.peak_bytes <= self.limit_bytes}

    @property
    def knows_what_blocks_keep(self) -> bool:
        return any(setting.recomputed == 0 for setting in self.known())

    def may_be_faster(self, settings: Sequence[Setting]) -> Setting | None:
        """Return what is not measured yet, should fit, and should be the fastest; None: the fastest was measured."""
        known = self.known()
        depths = None if self.knows_what_blocks_keep else {setting.recomputed for setting in known}
        left = [
            one
            for one in settings
            if one not in self.measured and not self._ruled_out(one) and (depths is None or one.recomputed in depths)
        ]
        if not left:
            return None
        peaks = self._fitted([cost.peak_bytes for cost in known.values()], self._of_memory, left)
        times = self._fitted([cost.step_s for cost in known.values()], self._of_time, left)
        at_most_s = _WORTH_MEASURING * min(cost.step_s for cost in self.fitting().values())
        faster = [
            (round(step_s / at_most_s, 2), -one.images, step_s, place)
            for place, (one, peak, step_s) in enumerate(zip(left, peaks, times, strict=True))
            if peak <= _NEARLY_FITS * self.limit_bytes and step_s < at_most_s
        ]
        return left[min(faster)[-1]] if faster else None

    def _ruled_out(self, setting: Setting) -> bool:
        """Tell whether one that takes no more did not fit; in parts, gradients lie beside activations."""
        return any(
            (cost is None or cost.peak_bytes > self.limit_bytes)
            and one.images <= setting.images
            and one.recomputed >= setting.recomputed
            and (one.images == self.batch_size) == (setting.images == self.batch_size)
            for one, cost in self.measured.items()
        )

    def _fitted(
        self, values: Sequence[float], terms: Callable[[Setting], list[float]], settings: Sequence[Setting]
    ) -> NDArray[np.float64]:
        """Return what least squares through all that was measured says of other settings."""
        rows = np.array([terms(setting) for setting in self.known()])  # (measured, terms)
        weights, *_ = np.linalg.lstsq(rows, np.asarray(values, dtype=np.float64), rcond=None)
        return np.array([terms(setting) for setting in settings]) @ weights

    def _of_memory(self, setting: Setting) -> list[float]:
        """Return 1, the images, and what the blocks keep of them at the moment when they keep the most."""
        again, others = np.split(self.block_values, [setting.recomputed])
        inputs = _INPUT_SHARE * np.cumsum([0.0, *again])  # of the blocks before each, and of all
        kept = max(inputs[-1] + others.sum(), (inputs[:-1] + again).max(initial=0.0)) / self.block_values.sum()
        return [1.0, setting.images, setting.images * kept]

    def _of_time(self, setting: Setting) -> list[float]:
        """Return 1 and the passes of a step, both longer by what is computed again."""
        longer = 1 + self._again() * self._share(setting)
        return [longer, longer * self.batch_size / setting.images]

    def _share(self, setting: Setting) -> float:
        """Return the share of a forward pass that is done again."""
        return float(self.block_values[: setting.recomputed].sum() / self.block_values.sum())

    def _again(self) -> float:
        """Return how much longer a step is with all of a forward pass done again, by the first two that tell."""
        pairs = itertools.combinations(self.known().items(), 2)
        for (one, cost), (other, more) in pairs:
            if one.images == other.images and one.recomputed < other.recomputed:
                shares = self._share(one), self._share(other)
                slope = (more.step_s - cost.step_s) / (shares[1] - shares[0])
                at_none = cost.step_s - slope * shares[0]
                return max(0.0, slope / at_none)
        return _AGAIN
