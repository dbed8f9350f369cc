"""The hooks that give adapters their ranks: by a rule once, by our controller, or by the PEFT library's AdaLoRA."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import SiteAdapter, check_gradients, set_ranks, site_adapters
from peft_vit.core.adapters.peft_layers import ADAPTER, peft_layers, peft_ranks
from peft_vit.core.adapters.peft_tuner import attach_peft_adalora
from peft_vit.core.allocation import AdaLoRAController, choose_starting_ranks
from peft_vit.core.allocation.starting_ranks import PLAIN, Adapters
from peft_vit.core.backbones import Site
from peft_vit.core.config import PeftAdaLoraConfig, StartingRanksConfig
from peft_vit.core.records import ImportanceEntry, ProbeEntry, RankEntry
from peft_vit.core.training.hooks import Hook, HookContext

_PEFT_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of PEFT's RankAllocator, by parameter


class StartingRanks(Hook):
    """The choice of a LoRA's ranks, once, between the fit of the head and the first step.

    Args:
        config: the rule and its budget.
        sites: that carry adapters, which have no rank yet.
        adapters: what a rank of them costs.
    """

    name = "starting_ranks"

    def __init__(self, config: StartingRanksConfig, sites: Sequence[Site], adapters: Adapters = PLAIN) -> None:
        self._config, self._sites, self._adapters = config, sites, adapters
        self._ranks: dict[str, int] = {}
        self._scores: dict[str, float] = {}

    def begin(self, model: nn.Module, context: HookContext) -> None:
        """Choose, and see to it that every adapter that has got a rank acts."""
        with context.overhead.of(self.name):
            self._ranks, self._scores = choose_starting_ranks(model, self._sites, self._config, self._adapters)
        set_ranks(model, self._ranks)
        check_gradients(model)

    def state_dict(self) -> dict[str, Any]:
        """Return the chosen ranks and their scores."""
        return {"ranks": self._ranks, "scores": self._scores}

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Load the chosen ranks and their scores."""
        self._ranks, self._scores = dict(state["ranks"]), dict(state["scores"])

    def record(self, model: nn.Module) -> dict[str, Any]:
        """Return the ranks, and the score of each site if the rule scores."""
        costs = self._adapters.costs(self._config.unit, self._sites)
        cost = int(costs @ [self._ranks[site.name] for site in self._sites])
        entry = RankEntry(step=0, budget=self._config.budget, ranks=self._ranks, unit=self._config.unit, cost=cost)
        scores = [ImportanceEntry(step=0, scores=self._scores)] if self._scores else []
        return {"rank_history": [entry], "importance_history": scores}


class AllocationHook(Hook):
    """An AdaLoRAController's part of a step: it scores and decides, this applies."""

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
        self._with_penalty = controller.config.importance_gradient == "task_and_penalty"

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Let the controller refuse a model or an optimiser that can't follow a change of rank."""
        self.controller.attach(model, optimizer)

    def penalties(self, model: nn.Module) -> dict[str, Tensor]:
        """Return weight * mean of ||P^T P - I||_F and ||Q Q^T - I||_F over all matrices (AdaLoRA, eq. 4)."""
        weight = self.controller.config.penalty_weight
        if weight == 0:
            return {}
        adapters = [a for a in site_adapters(model).values() if isinstance(a, SiteAdapter) and a.rank]
        total = torch.stack([adapter.orthogonality() for adapter in adapters]).sum()  # (sites,) -> ()
        return {"orthogonality": weight * total / (2 * len(adapters))}

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Score the sites from the task's gradients, unless the penalty's belong to them."""
        if not self._with_penalty:
            self._score(model, step)

    def before_step(self, model: nn.Module, step: int) -> None:
        """Score the sites from the gradients of task and penalty together, as the official AdaLoRA code does."""
        if self._with_penalty:
            self._score(model, step)

    def _score(self, model: nn.Module, step: int) -> None:
        self._scores = self.controller.update_importance_scores(model, step)

    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        """Decide the ranks and apply them."""
        self.controller.apply_ranks(model, optimizer, self.controller.reallocate_ranks(self._scores, step))

    def deployable(self, step: int) -> bool:
        """Say whether the last decision has been taken, so that the final budget is met."""
        return step >= self.controller.schedule.last_update

    def state_dict(self) -> dict[str, Any]:
        """Return the controller's state."""
        return self.controller.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Continue from such a state."""
        self.controller.load_state_dict(dict(state))

    def record(self, model: nn.Module) -> dict[str, Any]:
        """Return ranks, scores and gradient probes by step."""
        return {
            "rank_history": [RankEntry(**entry) for entry in self.controller.rank_history],
            "importance_history": [ImportanceEntry(**entry) for entry in self.controller.score_history],
            "probe_history": [ProbeEntry(**entry) for entry in self.controller.probe_history],
        }


def last_update(config: PeftAdaLoraConfig, total_steps: int) -> int:
    """Return the step after which PEFT masks for the last time and exactly once: T - tfinal."""
    last = total_steps - (total_steps // 4 if config.final_steps is None else config.final_steps)
    first = (config.warmup_steps // config.update_frequency + 1) * config.update_frequency
    if config.warmup_steps >= last:
        raise UserError(
            f"warmup_steps {config.warmup_steps} plus final_steps {total_steps - last} leave no step for a decision "
            f"in {total_steps} steps; shorten them or train longer",
            field="peft_adalora.warmup_steps",
        )
    if first >= last:
        raise UserError(
            f"no multiple of {config.update_frequency} lies between warmup_steps {config.warmup_steps} and the last "
            f"decision at step {last}, and PEFT decides at multiples only; lower it",
            field="peft_adalora.update_frequency",
        )
    return last


class PeftAdaLoraHook(Hook):
    """PEFT's part of a step, in the order that PEFT documents: its scores see the penalty and the clipping.

    PEFT's adapters are attached to the model, which is to have none; the penalty, which PEFT leaves out on plain
    models, is added here.
    """

    name = "allocation"  # PEFT scores and masks in one call
    purposes: ClassVar[Mapping[str, str]] = {"penalties": "penalty"}

    def __init__(self, model: nn.Module, config: PeftAdaLoraConfig, total_steps: int, *, seed: int) -> None:
        self.last_update = last_update(config, total_steps)
        self.weight = config.orthogonality_weight
        self.tuner = attach_peft_adalora(
            model, config, final_steps=total_steps - self.last_update, total_steps=total_steps, seed=seed
        )
        budget = config.initial_rank * len(peft_layers(model))
        self.rank_history: list[dict[str, Any]] = [{"step": 0, "budget": budget, "ranks": peft_ranks(model)}]

    def penalties(self, model: nn.Module) -> dict[str, Tensor]:
        """Return weight * mean over all A and B of ||A A^T - I||_F and ||B^T B - I||_F.

        The term of PEFT's AdaLoraModel.forward (tuners/adalora/model.py), which adds it only where the model returns
        an object with `.loss`.
        """
        if self.weight == 0:
            return {}
        grams = []
        for layer in peft_layers(model).values():
            right, left = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]  # (r0, in), (out, r0)
            grams += [right @ right.T, left.T @ left]  # (r0, r0) each
        eye = torch.eye(len(grams[0]), device=grams[0].device)
        norms = torch.linalg.matrix_norm(torch.stack(grams) - eye)  # (2 L, r0, r0) -> (2 L,) of L layers
        return {"orthogonality": self.weight * norms.mean()}  # (2 L,) -> ()

    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        """Let PEFT score, mask and finalize; its mask of this step, if it made one, goes into the history."""
        budget, due = self.tuner.rankallocator.budget_schedule(step)
        self.tuner.update_and_allocate(step)
        if step == self.last_update or (due and step < self.last_update):
            self.rank_history.append({"step": step, "budget": budget, "ranks": peft_ranks(model)})
        if step == self.last_update and not any(self.rank_history[-1]["ranks"].values()):
            # It masks ties with the weakest: where all scores are equal, all.
            raise RuntimeError(f"PEFT's final mask at step {step} left 0 triplets of {budget}")

    def deployable(self, step: int) -> bool:
        """Say whether the final mask has been applied; from then on PEFT applies it after every step."""
        return step >= self.last_update

    def state_dict(self) -> dict[str, Any]:
        """Return PEFT's smoothed scores and its latest mask."""
        return {
            "mask": self.tuner.peft_config[ADAPTER].rank_pattern,
            "rank_history": copy.deepcopy(self.rank_history),
            "scores": {name: dict(getattr(self.tuner.rankallocator, name)) for name in _PEFT_SCORES},
        }

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Continue from such a state."""
        device = next(model.parameters()).device
        for name in _PEFT_SCORES:
            scores = {key: tensor.to(device) for key, tensor in state["scores"][name].items()}
            setattr(self.tuner.rankallocator, name, scores)
        self.tuner.peft_config[ADAPTER].rank_pattern = copy.deepcopy(state["mask"])
        self.rank_history = copy.deepcopy(state["rank_history"])

    def record(self, model: nn.Module) -> dict[str, Any]:
        """Return the ranks by step."""
        return {"rank_history": [RankEntry(**entry) for entry in self.rank_history]}
