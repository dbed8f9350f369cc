"""Runs the PEFT library's AdaLoRA inside the training loop, with the penalty that PEFT leaves out on plain models."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_vit.adapters import by_layer
from peft_vit.adapters.peft_layers import ADAPTER, peft_layers, peft_ranks
from peft_vit.adapters.peft_tuner import attach_peft_adalora
from peft_vit.config import PeftAdaLoraConfig
from peft_vit.errors import UserError
from peft_vit.records import RankEntry
from peft_vit.training.checkpoint import State
from peft_vit.training.hooks import AfterTraining, Hook

_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of PEFT's RankAllocator, by parameter


def last_update(config: PeftAdaLoraConfig, total_steps: int) -> int:
    """Return the step after which PEFT masks for the last time and exactly once: T - tfinal.

    Raises:
        UserError: if PEFT would take no decision before it.
    """
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

    PEFT's adapters are attached to the model, which is to have none.
    """

    name = "allocation"  # PEFT scores and masks in one call
    purposes: ClassVar[Mapping[str, str]] = {"penalties": "penalty"}

    def __init__(self, model: nn.Module, config: PeftAdaLoraConfig, total_steps: int, *, seed: int) -> None:
        self.last_update = last_update(config, total_steps)
        self.weight = config.orthogonality_weight
        self._finalized = False
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
        return {"orthogonality": self.weight * norms.mean()}

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Let PEFT score, mask and finalize; its mask of this step, if it made one, goes into the history."""
        budget, due = self.tuner.rankallocator.budget_schedule(step)
        self.tuner.update_and_allocate(step)
        if step > self.last_update or not (due or step == self.last_update):
            return
        ranks = peft_ranks(model)
        self.rank_history.append({"step": step, "budget": budget, "ranks": ranks})
        if step == self.last_update:
            self._check_mask(model, budget)
            self._finalized = True

    def _check_mask(self, model: nn.Module, budget: int) -> None:
        """Refuse a final mask that is not there, or that took everything: PEFT masks ties with the weakest."""
        ranks = peft_ranks(model)
        live = {name: int((layer.lora_E[ADAPTER] != 0).sum()) for name, layer in peft_layers(model).items()}
        if not 0 < sum(ranks.values()) <= budget or sum(live.values()) > budget:
            raise RuntimeError(
                f"PEFT's final mask left {sum(ranks.values())} triplets, {sum(live.values())} of them in use, "
                f"of {budget} at step {self.last_update}"
            )

    def finish(self, model: nn.Module, after: AfterTraining) -> None:
        """Make sure that the model stands under the final mask.

        Raises:
            RuntimeError: if PEFT never finalized, or a masked triplet is in use again.
        """
        if not self._finalized:
            raise RuntimeError(f"PEFT's AdaLoRA was not finalized: step {self.last_update} did not come")
        self._check_mask(model, self.rank_history[-1]["budget"])

    def record(self, model: nn.Module) -> dict[str, Any]:
        """Return the ranks by step."""
        return {"rank_history": [RankEntry(**entry) for entry in self.rank_history]}

    def deployable(self, step: int) -> bool:
        """Say whether the final mask has been applied; from then on PEFT applies it after every step."""
        return self._finalized and step >= self.last_update

    def state(self) -> State:
        """Return PEFT's smoothed scores and its latest mask."""
        allocator = self.tuner.rankallocator
        values = {
            "mask": self.tuner.peft_config[ADAPTER].rank_pattern,
            "rank_history": copy.deepcopy(self.rank_history),
            "finalized": self._finalized,
        }
        tensors = {f"{name}/{key}": one for name in _SCORES for key, one in getattr(allocator, name).items()}
        return State(tensors, values)

    def load_state(self, model: nn.Module, state: State) -> None:
        """Go on from such a state."""
        scores, device = by_layer(state.tensors), next(model.parameters()).device
        for name in _SCORES:
            kept = {key: tensor.to(device) for key, tensor in scores.get(name, {}).items()}
            setattr(self.tuner.rankallocator, name, kept)
        self.tuner.peft_config[ADAPTER].rank_pattern = copy.deepcopy(state.values["mask"])
        self.rank_history = copy.deepcopy(state.values["rank_history"])
        self._finalized = state.values["finalized"]
