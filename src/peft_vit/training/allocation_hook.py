"""Runs an AdaLoRAController inside the training loop: the controller decides, this applies."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_vit.adapters import SiteAdapter, site_adapters
from peft_vit.allocation import AdaLoRAController, check_fisher
from peft_vit.records import FisherCheck, ImportanceEntry, ProbeEntry, RankEntry, StepRow
from peft_vit.training.checkpoint import State
from peft_vit.training.hooks import AfterTraining, Hook

_FISHER_IMAGES = 32  # of the calibration batch


class AllocationHook(Hook):
    """The controller's part of a step: it scores, decides and resizes."""

    name = "allocation"
    purposes: ClassVar[Mapping[str, str]] = {
        "after_backward": "scoring",
        "before_step": "scoring",
        "after_step": "reallocation",
        "attach": "reallocation",
        "penalties": "penalty",
    }

    def __init__(self, controller: AdaLoRAController) -> None:
        self.controller = controller
        self._scores: dict[str, float] = {}
        self._own_s: dict[int, float] = defaultdict(float)  # by step
        self._fisher_check: FisherCheck | None = None
        self._with_penalty = controller.config.importance_gradient == "task_and_penalty"
        default = 0.1 if controller.config.parametrization == "svd" else 0.0  # 0.1: the official AdaLoRA code
        weight = controller.config.orthogonality_weight
        self.orthogonality_weight = default if weight is None else weight

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Let the controller refuse a model or an optimiser that can't follow a change of rank."""
        self.controller.attach(model, optimizer)

    def penalties(self, model: nn.Module) -> dict[str, Tensor]:
        """Return weight * mean of ||P^T P - I||_F and ||Q Q^T - I||_F over all matrices (AdaLoRA, eq. 4)."""
        if self.orthogonality_weight == 0:
            return {}
        present = [one for one in site_adapters(model).values() if isinstance(one, SiteAdapter) and one.rank]
        total = torch.stack([adapter.orthogonality() for adapter in present]).sum()
        return {"orthogonality": self.orthogonality_weight * total / (2 * len(present))}

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Score the sites from the task's gradients, unless the penalty's belong to them."""
        if not self._with_penalty:
            self._score(model, step)

    def before_step(self, model: nn.Module, step: int) -> None:
        """Score the sites from the gradients of task and penalty together, as the official AdaLoRA code does."""
        if self._with_penalty:
            self._score(model, step)

    def _score(self, model: nn.Module, step: int) -> None:
        started = time.perf_counter()
        self._scores = self.controller.update_importance_scores(model, step)
        self._own_s[step] += time.perf_counter() - started

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Decide the ranks and apply them."""
        started = time.perf_counter()
        ranks = self.controller.reallocate_ranks(self._scores, step)
        self.controller.apply_ranks(model, optimizer, ranks)
        self._own_s[step] += time.perf_counter() - started

    def probing_s(self, steps: Sequence[StepRow]) -> float | None:
        """Return an estimate of the seconds by which forward and backward pass took longer in steps with probes.

        That is, over the median of the steps without, and at least 0. Scoring, deciding and resizing are left out of
        all steps: they are counted as this hook's own time. None if no step was probed, or every step was, so that
        there is nothing to compare with.
        """
        probed = {entry["step"] for entry in self.controller.probe_history}
        seconds = {row.step: row.seconds - self._own_s.get(row.step, 0.0) for row in steps}
        plain = [value for step, value in seconds.items() if step not in probed]
        if not probed or not plain:
            return None
        usual = statistics.median(plain)
        return max(0.0, sum(value - usual for step, value in seconds.items() if step in probed))

    def finish(self, model: nn.Module, after: AfterTraining) -> None:
        """Compare the score `fisher` with the empirical Fisher, if ranks were decided by it."""
        probing_s = self.probing_s(after.steps)
        if probing_s is not None:
            after.overhead["probes"] = probing_s
        if self.controller.config.importance_metric == "fisher":
            with after.overhead.of("fisher_check"):
                images, labels = after.calibration_batch(_FISHER_IMAGES)
                self._fisher_check = check_fisher(model, images, labels, class_weights=after.class_weights)

    def record(self, model: nn.Module) -> dict[str, Any]:
        """Return ranks, scores and probes by step, and how the score `fisher` compares with the Fisher."""
        return {
            "rank_history": [RankEntry(**entry) for entry in self.controller.rank_history],
            "importance_history": [ImportanceEntry(**entry) for entry in self.controller.score_history],
            "probe_history": [ProbeEntry(**entry) for entry in self.controller.probe_history],
            "fisher_check": self._fisher_check,
        }

    def deployable(self, step: int) -> bool:
        """Say whether the last decision has been taken, so that the final budget is met."""
        return step >= self.controller.schedule.last_update

    def state(self) -> State:
        """Return the controller's state, and what its own part of each step has cost so far."""
        kept = self.controller.state_dict()
        own_s = {str(step): seconds for step, seconds in self._own_s.items()}
        return State(kept["tensors"], {"controller": kept["values"], "own_s": own_s})

    def load_state(self, model: nn.Module, state: State) -> None:
        """Go on from such a state."""
        self.controller.load_state_dict({"values": state.values["controller"], "tensors": state.tensors})
        self._own_s = defaultdict(float, {int(step): seconds for step, seconds in state.values["own_s"].items()})
