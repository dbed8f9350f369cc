"""What methods hook into a run, what it lets them use, and where its seconds beside the steps are counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peft_vit.core.config import Precision
from peft_vit.core.training.images import Data


class Overhead(dict[str, float]):
    """Seconds that a run spends beside its steps' own work, by purpose, as its record holds them."""

    @contextmanager
    def of(self, purpose: str) -> Iterator[None]:
        """Count the seconds of the block."""
        started = time.perf_counter()
        yield
        self[purpose] = self.get(purpose, 0.0) + time.perf_counter() - started


@dataclass(frozen=True)
class RuntimeConfig:
    """Device, precision and normalization of a model."""

    device: torch.device
    precision: Precision
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Calibration:
    """The training images of a run, in an order of their own and without flips."""

    data: Data
    runtime: RuntimeConfig
    seed: int

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the first ones (count, C, H, W), at most all, and their labels (count,), on the device."""
        rows = self.data.train.order(self.seed, 0)[:count]  # epochs count from 1
        images, labels = next(
            self.data.train.chosen(rows).ordered_batches(len(rows), self.runtime.mean, self.runtime.std)
        )
        return images.to(self.runtime.device), labels.to(self.runtime.device)

    def images(self, count: int) -> Tensor:
        """Return the first ones without their labels."""
        return self.batch(count)[0]


@dataclass(frozen=True)
class HookContext:
    """What hooks may use before and after training; nothing comes from validation or test images.

    Attributes:
        calibration: returns the first training images (count, C, H, W) in an order of their own.
        float_weights: returns the backbone's weights by name, as they were before anything was quantized.
        overhead: takes the seconds of what hooks measure.
    """

    calibration: Callable[[int], Tensor]
    float_weights: Callable[[], Mapping[str, Tensor]] = dict
    overhead: Overhead = field(default_factory=Overhead)


class Hook:
    """What a method may do around a step, and what it adds to the record; a method overrides what it needs.

    The loop knows no method by name. A hook's seconds count under `name`, those of calls that `purposes` names
    ({"after_backward": "scoring"}) under what it says of them.
    """

    name: str
    purposes: ClassVar[Mapping[str, str]] = {}

    def begin(self, model: nn.Module, context: HookContext) -> None:
        """Change ranks or weights of a model whose head is the one that training starts from.

        Called once before the optimiser is built; not by a training that continues from a state.
        """

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Prepare for training, or raise UserError; called once, before the first step."""

    def penalties(self, model: nn.Module) -> dict[str, Tensor]:
        """Return terms to add to the loss, weighted, by name."""
        return {}

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Look at the gradients of the task loss; penalties are added later."""

    def before_step(self, model: nn.Module, step: int) -> None:
        """Look at, or scale, the whole gradient, penalties included; it is not clipped yet. Who scores comes first."""

    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        """Change ranks or weights once the optimiser has stepped."""

    def notes(self) -> dict[str, float]:
        """Return fields of the step's row in the record; called before the step."""
        return {}

    def deployable(self, step: int) -> bool:
        """Say whether the state after this step meets the method's budget, so that it may be chosen."""
        return True

    def start_deployable(self) -> bool:
        """Say whether the model without any update, as it is before the first step, may be chosen in the end."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the hook between two steps, beside model and optimiser; see `State`."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Continue from such a state. Model and adapters are as they were then; `attach` is called after this."""

    def features_depend_on(self) -> dict[str, Any]:
        """Return plain values that identify changes of the frozen backbone before training, for caches of features."""
        return {}

    def finish(self, model: nn.Module, context: HookContext) -> None:
        """Check and measure the trained model.

        Called once; the model is in the state that was chosen, and its adapter file is made.
        """

    def record(self, model: nn.Module) -> dict[str, Any]:
        """Return fields of the record; called after `finish`."""
        return {}


def call_each(hooks: Sequence[Hook], call: str, overhead: Overhead, *arguments: Any) -> list[Any]:
    """Call one method of each hook, in order, count the seconds under its purpose, and return the results."""
    results = []
    for hook in hooks:
        with overhead.of(hook.purposes.get(call, hook.name)):
            results.append(getattr(hook, call)(*arguments))
    return results
