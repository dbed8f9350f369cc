"""AdaLoRAController: scores the sites of a Vision Transformer, decides their ranks under a budget, resizes them.

In anybody's own loop::

    controller = AdaLoRAController(model, config, total_steps=600)        # attaches the adapters
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    controller.attach(model, optimizer)                                   # refuses what can't follow a change of rank
    for step in range(1, 601):                                            # steps count from 1
        loss = cross_entropy(model(images), labels)
        loss.backward()
        scores = controller.update_importance_scores(model, step)
        optimizer.step()
        ranks = controller.reallocate_ranks(scores, step)
        controller.apply_ranks(model, optimizer, ranks)
        optimizer.zero_grad()
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peft_vit.adapters import attach_adapters, check_optimizer, resize_adapters, set_ranks, site_adapters
from peft_vit.allocation.budget import bounds_for, schedule_for
from peft_vit.allocation.importance import ImportanceTracker
from peft_vit.allocation.strategies import allocate
from peft_vit.backbones import find_sites
from peft_vit.config import AdaLoraConfig
from peft_vit.errors import SilentNoEffectWarning, UserError
from peft_vit.seeding import torch_generator


class AdaLoRAController:
    """Adaptive rank allocation on a timm VisionTransformer.

    Args:
        model: a timm VisionTransformer with a classification head. If it carries no adapters yet, they are attached
            with ranks that spread the initial budget evenly.
        config: the settings, see `config.AdaLoraConfig`.
        total_steps: optimiser steps of the whole run; the budget's course depends on it.
        seed: of the adapters' start and of the `random` metric.

    Raises:
        UserError: if the model is of another class, the schedule does not fit the steps, or the budget does not fit
            the sites.
    """

    def __init__(self, model: nn.Module, config: AdaLoraConfig, total_steps: int, *, seed: int = 0) -> None:
        self.config = config
        self.sites = find_sites(model, config.targets)
        if not site_adapters(model):
            attach_adapters(
                model, self.sites, dict.fromkeys((site.name for site in self.sites), 0),
                scale=config.scale, seed=seed, parametrization=config.parametrization,
            )  # fmt: skip
        adapters = site_adapters(model)
        self.names = tuple(site.name for site in self.sites)
        if set(adapters) != set(self.names):
            other = sorted(set(adapters) ^ set(self.names))[0]
            raise UserError(f"the model's adapters and adalora.targets differ at {other}", field="adalora.targets")
        self.bounds = bounds_for(config, [adapter.largest_rank for adapter in adapters.values()])
        self.schedule = schedule_for(config, total_steps, len(self.names), int(self.bounds.maximum.sum()))
        self.tracker = ImportanceTracker(
            config.importance_metric,
            sensitivity_beta=config.sensitivity_beta,
            uncertainty_beta=config.uncertainty_beta,
            generator=torch_generator(seed, "probe"),
        )
        self.rank_history: list[dict[str, Any]] = []
        self.score_history: list[dict[str, Any]] = []
        self._triplet_scores: dict[str, Tensor] = {}
        self._last_scores: dict[str, float] = {}  # of sites that had rank at some time
        self._scored = 0  # step of the latest scores
        self._decided = 0  # step of the latest decision
        self._optimizer: torch.optim.Optimizer | None = None  # as attached
        self._start(model)

    def _start(self, model: nn.Module) -> None:
        """Spread the initial budget evenly over sites that have no rank yet."""
        adapters = site_adapters(model)
        if not any(adapter.rank for adapter in adapters.values()):
            even = allocate("proportional", np.ones(len(self.names)), self.schedule.initial, self.bounds)
            ranks = dict(zip(self.names, (int(rank) for rank in even), strict=True))
            set_ranks(model, ranks)
        ranks = {name: adapter.rank for name, adapter in adapters.items()}
        if sum(ranks.values()) > self.schedule.initial:
            raise UserError(
                f"the model's adapters hold {sum(ranks.values())} ranks, the budget allows {self.schedule.initial}",
                field="adalora.total_rank_budget",
            )
        self.rank_history.append({"step": 0, "budget": self.schedule.initial, "ranks": ranks})

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Refuse what can't follow a change of rank; call once before the first step.

        In a loop that does not call it, the first `apply_ranks` does.

        Raises:
            UserError: if the optimiser's state can't be carried through a change of rank.
        """
        check_optimizer(optimizer)
        self._optimizer = optimizer

    @property
    def ranks(self) -> dict[str, int]:
        """Return the ranks as last applied, by site."""
        return dict(self.rank_history[-1]["ranks"])

    def update_importance_scores(self, model: nn.Module, step: int, *, loss_scale: float = 1.0) -> dict[str, float]:
        """Score every site; call after backward, on accumulated gradients, before zero_grad.

        Args:
            model: carries the adapters and their gradients.
            step: the optimiser step that these gradients belong to, from 1.
            loss_scale: factor on the loss; with `torch.amp.GradScaler` its `get_scale()`, or 1 after `unscale_`.

        Returns:
            The mean score per triplet of each site. A site without rank keeps its last score, so that it can come
            back when the others' scores fall below it; one that never had rank counts as an average site.

        Raises:
            UserError: if the step is not later than the last one, or a score is not finite.
        """
        if step <= self._scored:
            raise UserError(f"step {step} follows step {self._scored}; score once a step, counted from 1", field="step")
        self._triplet_scores = self.tracker.update(site_adapters(model), loss_scale)
        for name, values in self._triplet_scores.items():
            if len(values):
                self._last_scores[name] = float(values.mean())
        if not all(math.isfinite(score) for score in self._last_scores.values()):
            worst = next(name for name, score in self._last_scores.items() if not math.isfinite(score))
            raise UserError(f"its importance at step {step} is not finite; the training diverges", field=worst)
        self._scored = step
        average = float(np.mean(list(self._last_scores.values()))) if self._last_scores else 0.0
        return {name: self._last_scores.get(name, average) for name in self.names}

    def reallocate_ranks(self, importance_scores: dict[str, float], step: int) -> dict[str, int]:
        """Decide the ranks from now on; nothing is changed yet.

        Args:
            importance_scores: from `update_importance_scores` of this step.
            step: as above.

        Returns:
            The rank of each site; the present ranks if no decision is due. One that was due at a step that the
            caller left out is taken now.

        Raises:
            UserError: if a decision is due and this step's gradients were not scored.
        """
        if self.schedule.last_due(step) <= self._decided:
            return self.ranks
        if step != self._scored:
            raise UserError(f"step {step} was not scored; call update_importance_scores first", field="step")
        self._decided = step
        self.score_history.append({"step": step, "scores": dict(importance_scores)})
        self._warn_of_equal_scores(step, importance_scores)
        scores = np.array([importance_scores[name] for name in self.names], dtype=np.float64)
        ranks = allocate(
            self.config.allocation_strategy, scores, self.schedule.budget_at(step), self.bounds,
            threshold_tau=self.config.threshold_tau, top_k=self.config.top_k,
            triplet_scores=[self._triplet_scores[name].double().cpu().numpy() for name in self.names]
            if self.config.allocation_strategy == "global" else None,
        )  # fmt: skip
        return dict(zip(self.names, (int(rank) for rank in ranks), strict=True))

    def apply_ranks(self, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: dict[str, int]) -> None:
        """Resize the adapters and the optimiser's moments to the decided ranks, if they differ from the present ones.

        Call after the optimiser's step. A shrinking site loses its weakest triplets by their latest scores.
        """
        if optimizer is not self._optimizer:
            self.attach(model, optimizer)
        present = self.ranks
        if ranks == present and self._decided == self.rank_history[-1]["step"]:
            return
        budget = self.schedule.budget_at(self._decided)
        total = sum({**present, **ranks}.values())
        if total > budget:
            raise UserError(f"{total} ranks exceed the {budget} of step {self._decided}", field="ranks")
        if ranks != present:
            if not self._triplet_scores:
                raise UserError("no scores since the last change; call update_importance_scores first", field="ranks")
            kept = resize_adapters(model, optimizer, ranks, self._triplet_scores)
            self.tracker.follow(kept, ranks)
            self._triplet_scores = {}
        self.rank_history.append({"step": self._decided, "budget": budget, "ranks": {**present, **ranks}})

    def _warn_of_equal_scores(self, step: int, scores: dict[str, float]) -> None:
        if step >= self.schedule.last_update and len(set(scores.values())) == 1:
            warnings.warn(
                f"importance_metric {self.config.importance_metric} gave every site the same score; "
                "the allocation says nothing about the sites",
                SilentNoEffectWarning,
                stacklevel=3,
            )

    def get_layer_importance_summary(self) -> dict[str, dict[str, float]]:
        """Return mean, std, trend (slope per decision) of the scores, and the rank, over the decisions so far.

        Keys are the sites' names, then `blocks.<i>`, the matrix types and `overall`, each the mean over its sites
        (ranks are summed).
        """
        ranks = self.ranks
        groups: dict[str, list[str]] = {name: [name] for name in self.names}
        for site in self.sites:
            for key in (f"blocks.{site.block}", site.matrix, "overall"):
                groups.setdefault(key, []).append(site.name)
        summary = {}
        for key, members in groups.items():
            course = np.array([[entry["scores"][n] for n in members] for entry in self.score_history]).reshape(
                -1, len(members)
            )
            series = course.mean(1) if len(course) else np.zeros(0)
            slope = float(np.polyfit(np.arange(len(series)), series, 1)[0]) if len(series) > 1 else 0.0
            summary[key] = {
                "mean": float(series.mean()) if len(series) else 0.0,
                "std": float(series.std(ddof=1)) if len(series) > 1 else 0.0,
                "trend": slope,
                "rank": float(sum(ranks[name] for name in members)),
            }
        return summary

    def export_importance_data(self) -> dict[str, Any]:
        """Return everything that was scored and decided, as plain values ready for JSON."""
        return {
            "metric": self.config.importance_metric,
            "strategy": self.config.allocation_strategy,
            "sites": [site.info().model_dump() for site in self.sites],
            "scores": [dict(entry) for entry in self.score_history],
            "ranks": [dict(entry) for entry in self.rank_history],
        }
