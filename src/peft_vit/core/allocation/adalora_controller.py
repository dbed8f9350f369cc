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

`importance_gradient` is read by `training.AllocationHook`, not here: in one's own loop, scores that are to include a
penalty's gradient are updated after its backward.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from peft_vit.base.errors import DivergedError, SilentNoEffectWarning, UserError
from peft_vit.base.seeding import torch_generator
from peft_vit.core.adapters import (
    SiteAdapter,
    attach_adapters,
    check_adapters_match,
    check_gradients,
    check_resizable,
    current_ranks,
    peft_sites,
    resize_adapters,
    set_ranks,
    site_adapters,
)
from peft_vit.core.allocation.importance import (
    ImportanceTracker,
    attach_probes,
    mean_per_triplet,
    probed_scores,
    take_probes,
    weight_scores,
)
from peft_vit.core.allocation.strategies import (
    allocate,
    bounds_for,
    costs_for,
    even_ranks,
    largest_ranks,
    reach_threshold,
    schedule_for,
)
from peft_vit.core.backbones import Site, find_sites
from peft_vit.core.config import METRICS, AdaLoraConfig
from peft_vit.core.records import ImportanceEntry, ProbeEntry, RankEntry, history_rows

_STREAMS = 1 << 16  # generators of one change; the start's have lower numbers
# What a resumed run needs beside model, optimiser and tracker.
_STATE = ("_scored", "_decided", "_last_scores", "rank_history", "score_history", "probe_history")


def _warn(message: str) -> None:
    warnings.warn(message, SilentNoEffectWarning, stacklevel=3)  # who called the controller


class AdaLoRAController:
    """Adaptive rank allocation on a Vision Transformer of timm.

    Args:
        model: a Vision Transformer of timm with a classification head. If it carries no adapters yet, they are attached
            with equal ranks within the initial budget. Or one that `peft.get_peft_model` has wrapped with LoRA.
        config: the settings, see `config.AdaLoraConfig`.
        total_steps: optimiser steps of the whole run; the budget's course depends on it.
        seed: of the adapters' start, of triplets that grow, of probes and of the `random` metric.
        pool: inputs per group on which an update is constant, for weights that `QALoRATrainer` quantizes in groups. A
            target module then has at most in / pool ranks, and a rank costs less.
        check: refuse adapters without effect; for False where `QALoRATrainer` follows, which checks on packed weights.

    Raises:
        UserError: if the model is of another class, the schedule does not fit the steps, the budget does not fit
            the target modules, or an adapter has no effect.
    """

    def __init__(
        self,
        model: nn.Module,
        config: AdaLoraConfig,
        total_steps: int,
        *,
        seed: int = 0,
        pool: int = 1,
        check: bool = True,
    ) -> None:
        self.config = config
        self.total_steps = total_steps
        self.seed = seed
        sites = _attach_or_check(model, config, seed=seed, pool=pool)
        self.sites = tuple(site.info() for site in sites)
        self.names = tuple(site.name for site in sites)
        self.costs = costs_for(config, sites, pool)
        self.bounds = bounds_for(config, largest_ranks(sites, pool), self.costs)
        self.schedule = schedule_for(config, total_steps, self.bounds, self.costs)
        self.tracker = ImportanceTracker(
            config.importance_metric,
            sensitivity_beta=config.sensitivity_beta,
            uncertainty_beta=config.uncertainty_beta,
            generator=torch_generator(seed, "probe"),
            of_sites=weight_scores(model, config.importance_metric),
        )
        self.rank_history: list[dict[str, Any]] = []
        self.score_history: list[dict[str, Any]] = []
        self.probe_history: list[dict[str, Any]] = []  # step, sites scored by a probe, temporary values held
        self._triplet_scores: dict[str, Tensor] = {}
        self._last_scores = dict(self.tracker.of_sites)  # and of sites that had rank at some time
        self._scored = 0  # step of the latest scores
        self._decided = 0  # step of the latest decision
        self._optimizer: Optimizer | None = None  # as attached
        self._start(model)
        if check:
            check_gradients(model)
        self._bar_too_high = False  # at some decision, and said
        # Only removals are decided: the global ranking grows sites only by what its budget has left.
        unit, total, _ = config.budget
        held, ranks = self._cost(self.ranks), np.array(list(self.ranks.values()))
        grows = (ranks < self.bounds.maximum) & (self.costs <= total - held)
        if config.allocation_strategy == "global" and held <= total and not grows.any():
            _warn(
                f"allocation_strategy: global has no effect: the adapters start with {held} {unit}, the final budget "
                "holds them all"
            )

    def _start(self, model: nn.Module) -> None:
        """Give sites that have no rank yet equal ranks within the initial budget."""
        adapters = site_adapters(model)
        if not any(adapter.rank for adapter in adapters.values()):
            for adapter in adapters.values():  # PEFT's have rank
                assert isinstance(adapter, SiteAdapter)
                adapter.reference_rank = self.config.budget.total / float(self.costs.sum())  # if all ended equal
            even = even_ranks(self.schedule.initial, self.bounds, self.costs)
            set_ranks(model, dict(zip(self.names, map(int, even), strict=True)))
        ranks = {name: adapter.rank for name, adapter in adapters.items()}
        (unit, _, field), cost = self.config.budget, self._cost(ranks)
        if cost > self.schedule.initial:
            raise UserError(
                f"the model's adapters hold {cost} {unit}, the budget allows {self.schedule.initial} at the start; "
                "raise it, or start with fewer",
                field="adalora.initial_budget" if self.config.budget_schedule == "cubic" else f"adalora.{field}",
            )
        self._record(0, ranks)

    def _cost(self, ranks: dict[str, int]) -> int:
        """Return the total cost of ranks in the unit of the budget."""
        return int(self.costs @ [ranks[name] for name in self.names])

    def _record(self, step: int, ranks: dict[str, int]) -> None:
        self.rank_history.append(
            {
                "step": step,
                "budget": self.schedule.budget_at(step),
                "ranks": ranks,
                "unit": self.config.budget.unit,
                "cost": self._cost(ranks),
            }
        )

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Refuse what can't follow a change of rank; call once before the first step.

        In a loop that does not call it, the first `apply_ranks` does; only a decision after the very first step then
        goes without probes.

        Raises:
            UserError: if the optimiser's state can't be carried through a change of rank, if the model is distributed,
                sharded or compiled, or if its adapters have other ranks than this controller gave them.
        """
        self._take_on(model, optimizer)
        self._probe_next_step(model)

    def _take_on(self, model: nn.Module, optimizer: Optimizer) -> None:
        check_resizable(model, optimizer)
        attached, ranks = current_ranks(model), self.ranks
        for name in self.names:
            if attached.get(name) != ranks[name]:
                message = f"has rank {attached.get(name)} where the controller has {ranks[name]}; load the adapters "
                raise UserError(f"{message}that belong to its state", field=name)
        self.tracker.move_to(next(model.parameters()).device)
        self._optimizer = optimizer

    @property
    def ranks(self) -> dict[str, int]:
        """Return the ranks as last applied, by target module."""
        return dict(self.rank_history[-1]["ranks"])

    def update_importance_scores(self, model: nn.Module, step: int, *, loss_scale: float = 1.0) -> dict[str, float]:
        """Score every target module; call after backward, on accumulated gradients, before zero_grad.

        Args:
            model: carries the adapters and their gradients.
            step: the optimiser step that these gradients belong to, from 1.
            loss_scale: factor on the loss; with `torch.amp.GradScaler` its `get_scale()`, or 1 after `unscale_`.

        Returns:
            The mean score per triplet of each target module. A target module without rank keeps its last score, or gets
            one from its probe where a decision is due (see `probes`); one that was never scored counts as an average
            target module.

        Raises:
            UserError: if the step is not later than the last one.
            DivergedError: if a score is not finite.
        """
        if step <= self._scored:
            raise UserError(f"step {step} follows step {self._scored}; score once a step, counted from 1", field="step")
        adapters = site_adapters(model)
        self._triplet_scores = self.tracker.update(adapters, loss_scale)
        measured = mean_per_triplet(self._triplet_scores)
        self._last_scores |= measured
        gradients, values = take_probes(adapters)
        if gradients:
            rankless = [name for name, rank in self.ranks.items() if rank == 0]
            probed = probed_scores(self.config.importance_metric, gradients, measured, rankless)
            self._last_scores |= probed
            self.probe_history.append({"step": step, "sites": list(probed), "values": values})
        if diverged := [name for name, score in self._last_scores.items() if not math.isfinite(score)]:
            message = f"its importance at step {step} is not finite; lower the learning rate"
            raise DivergedError(message, field=diverged[0])
        self._scored = step
        average = float(np.mean(list(self._last_scores.values()))) if self._last_scores else 0.0
        return {name: self._last_scores.get(name, average) for name in self.names}

    def reallocate_ranks(self, importance_scores: dict[str, float], step: int) -> dict[str, int]:
        """Decide the ranks from now on; nothing is changed yet.

        Args:
            importance_scores: from `update_importance_scores` of this step.
            step: as above.

        Returns:
            The rank of each target module; the present ranks if no decision is due. One that was due at a step that the
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
        scores = np.array([importance_scores[name] for name in self.names], dtype=np.float64)
        if step >= self.schedule.last_update and len(set(importance_scores.values())) == 1:
            _warn(
                f"importance_metric {self.config.importance_metric} gave every module the same score; "
                "the allocation says nothing about the modules"
            )
        tau = self.config.threshold_tau
        if self.config.allocation_strategy == "threshold" and not self._bar_too_high:
            self._bar_too_high = not reach_threshold(scores, self.costs, tau)
            if self._bar_too_high:
                _warn(
                    f"threshold_tau {tau} has no effect: no module's score is so many times the mean, and all share "
                    "the budget in proportion; lower it"
                )
        is_global = self.config.allocation_strategy == "global"
        of_triplets = [self._triplet_scores[name].cpu().double().numpy() for name in self.names] if is_global else None
        ranks = allocate(
            self.config.allocation_strategy,
            scores,
            self.schedule.budget_at(step),
            self.bounds,
            costs=self.costs,
            threshold_tau=tau,
            top_k=self.config.top_k,
            triplet_scores=of_triplets,
        )
        return dict(zip(self.names, map(int, ranks), strict=True))

    def apply_ranks(self, model: nn.Module, optimizer: Optimizer, ranks: dict[str, int]) -> None:
        """Resize the adapters and the optimiser's moments to the decided ranks, if they differ from the present ones.

        Call after the optimiser's step. A shrinking target module loses its weakest triplets by their latest scores. If
        the next step leads to a decision, the target modules are probed in it.
        """
        if optimizer is not self._optimizer:
            self._take_on(model, optimizer)
        present, ranks = self.ranks, self.ranks | ranks
        budget, cost = self.schedule.budget_at(self._decided), self._cost(ranks)
        if cost > budget:
            unit = self.config.budget.unit
            raise UserError(f"{cost} {unit} exceed the {budget} of step {self._decided}", field="ranks")
        if ranks != present:
            if not self._triplet_scores:
                raise UserError("no scores since the last change; call update_importance_scores first", field="ranks")
            # What grows follows from seed, site and number of the change: a resumed run grows the same.
            first = len(self.rank_history) * _STREAMS
            generators = {
                name: torch_generator(self.seed, "adapter_init", first + index) for index, name in enumerate(self.names)
            }
            kept = resize_adapters(model, optimizer, ranks, self._triplet_scores, generators=generators)
            self.tracker.follow(kept, ranks)
            self._triplet_scores = {}
        if ranks != present or self._decided > self.rank_history[-1]["step"]:
            self._record(self._decided, ranks)
        self._probe_next_step(model)

    def _probe_next_step(self, model: nn.Module) -> None:
        """Probe the sites in the next step, if its scores lead to a decision in which a site without rank can win."""
        step = self._scored + 1
        is_due = self.schedule.last_due(step) > self._decided
        can_grow = self.config.allocation_strategy != "global"
        is_probed = METRICS[self.config.importance_metric].probe_power is not None
        if is_due and can_grow and is_probed and 0 in self.ranks.values():
            attach_probes(site_adapters(model), seed=self.seed, step=step)

    def get_layer_importance_summary(self) -> dict[str, dict[str, float]]:
        """Return mean, std, trend (slope per decision) of the scores, and the rank, over the decisions so far.

        Returns:
            By target module, then by `blocks.<i>`, matrix type and `overall`: of the mean score over the group's target
            modules, each target module counted once whatever its rank; ranks are summed.
        """
        groups = {site.name: [place] for place, site in enumerate(self.sites)}
        for place, site in enumerate(self.sites):
            for key in (f"blocks.{site.block}", site.matrix, "overall"):
                groups.setdefault(key, []).append(place)
        ranks = np.array(list(self.ranks.values()))  # (sites,)
        scores = np.array([[entry["scores"][name] for name in self.names] for entry in self.score_history])
        summary = {}
        for key, members in groups.items():
            means = scores.reshape(-1, len(ranks))[:, members].mean(1)  # (decisions, sites) -> (decisions,)
            several = len(means) > 1
            summary[key] = {
                "mean": float(means.mean()) if len(means) else 0.0,
                "std": float(means.std(ddof=1)) if several else 0.0,
                "trend": float(np.polyfit(np.arange(len(means)), means, 1)[0]) if several else 0.0,
                "rank": float(ranks[members].sum()),
            }
        return summary

    def history_rows(self) -> list[dict[str, Any]]:
        """Return scores and decisions as a tidy table, see `records.history_rows`."""
        ranks = [RankEntry(**entry) for entry in self.rank_history]
        scores = [ImportanceEntry(**entry) for entry in self.score_history]
        return history_rows(self.sites, ranks, scores, [ProbeEntry(**entry) for entry in self.probe_history])

    def export_importance_data(self) -> dict[str, Any]:
        """Return everything that was scored and decided, as plain values ready for JSON."""
        exported = {
            "metric": self.config.importance_metric,
            "strategy": self.config.allocation_strategy,
            "sites": [site.model_dump() for site in self.sites],
            "scores": self.score_history,
            "ranks": self.rank_history,
            "probes": self.probe_history,
        }
        return copy.deepcopy(exported)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return the controller's state between two steps, beside model and optimiser.

        Returns:
            "values": plain values, ready for JSON; "tensors": tensors by name, ready for safetensors.
        """
        values = {name.removeprefix("_"): copy.deepcopy(getattr(self, name)) for name in _STATE}
        return {"values": {"made_with": self._made_with(), **values}, "tensors": self.tracker.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Continue from where `state_dict` was taken; then build the optimiser, load its state, and call `attach`.

        The model must carry the adapters of that moment (`load_trained`, or `set_ranks` and their values).

        Raises:
            UserError: if the state belongs to another configuration, length of run, seed or set of target modules.
        """
        values = copy.deepcopy(state["values"])
        for key, expected in self._made_with().items():
            if values["made_with"].get(key) != expected:
                raise UserError(f"the state was made with another one; expected {expected}", field=key)
        for name in _STATE:
            setattr(self, name, values[name.removeprefix("_")])
        self._triplet_scores, self._optimizer = {}, None
        self.tracker.load_state_dict(state["tensors"])

    def _made_with(self) -> dict[str, Any]:
        config = self.config.model_dump(mode="json")
        return {"config": config, "total_steps": self.total_steps, "seed": self.seed, "sites": list(self.names)}


def _attach_or_check(model: nn.Module, config: AdaLoraConfig, *, seed: int, pool: int) -> tuple[Site, ...]:
    """Return the sites that carry adapters, block by block; on a plain model they are put there first, at rank 0.

    Raises:
        UserError: if the model is of another class, carries adapters of ours, or such of PEFT that don't fit the
            settings.
    """
    sites = peft_sites(model)
    if sites:
        # LoRA of PEFT can't follow every setting, and has decided others.
        if pool != 1:
            raise UserError("PEFT's LoRA does not pool its inputs; leave it out", field="pool")
        if config.minimum_rank < 1:
            raise UserError("PEFT has no layer of rank 0; set minimum_rank to 1 or more", field="adalora.minimum_rank")
        if config.parametrization != "product":
            raise UserError("PEFT's LoRA is the plain product; set product", field="adalora.parametrization")
        check_adapters_match(model, config, "adalora")
        return sites
    sites = find_sites(model, config.targets)
    attach_adapters(
        model,
        sites,
        0,
        scale=config.scale,
        seed=seed,
        parametrization=config.parametrization,
        factor_start=config.factor_start,
        lambda_gain=config.lambda_gain,
        pool=pool,
        check=False,  # the ranks come later, and the check after them
    )
    return sites
