"""Gives a LoRA its ranks by a rule, once, between the fit of the head and the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peft_vit.adapters import check_acting, set_ranks
from peft_vit.allocation import CalibrationBatch, choose_starting_ranks, rank_costs
from peft_vit.backbones import Site
from peft_vit.config import StartingRanksConfig
from peft_vit.records import ImportanceEntry, RankEntry
from peft_vit.training.checkpoint import State
from peft_vit.training.hooks import BeforeTraining, Hook


class StartingRanks(Hook):
    """The choice of a LoRA's ranks.

    Args:
        config: the rule and its budget.
        sites: that carry adapters, which have no rank yet.
        seed: of the run.
    """

    name = "starting_ranks"

    def __init__(self, config: StartingRanksConfig, sites: Sequence[Site], *, seed: int) -> None:
        self._config, self._sites, self._seed = config, sites, seed
        self._ranks: dict[str, int] = {}
        self._scores: dict[str, float] = {}

    def begin(self, model: nn.Module, before: BeforeTraining) -> None:
        """Choose, and see to it that every adapter that has got a rank acts.

        Raises:
            UserError: as `choose_starting_ranks`, or if an adapter has no effect.
        """
        batch = None
        with before.overhead.of("starting_ranks"):
            if self._config.reads_images:
                images, labels = before.calibration_batch(self._config.calibration_images)
                batch = CalibrationBatch(images, labels, before.loss)
            self._ranks, self._scores = choose_starting_ranks(
                model, self._sites, self._config, seed=self._seed, batch=batch
            )
        set_ranks(model, self._ranks)
        check_acting(model)

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Refuse a training that has not called `begin`: no site would have a rank."""
        if not self._ranks:
            raise RuntimeError("ranks were not chosen; call begin before the optimizer is built")

    def state(self) -> State:
        """Return what was chosen."""
        return State({}, {"ranks": self._ranks, "scores": self._scores})

    def load_state(self, model: nn.Module, state: State) -> None:
        """Go on with what was chosen."""
        self._ranks, self._scores = dict(state.values["ranks"]), dict(state.values["scores"])

    def record(self, model: nn.Module) -> dict[str, Any]:
        """Return the ranks, and the score of each site's first rank if the rule scores."""
        costs = rank_costs(self._config.unit, self._sites)
        cost = int(costs @ [self._ranks[site.name] for site in self._sites])
        entry = RankEntry(step=0, budget=self._config.budget, ranks=self._ranks, unit=self._config.unit, cost=cost)
        scores = [ImportanceEntry(step=0, scores=self._scores)] if self._scores else []
        return {"rank_history": [entry], "importance_history": scores}
