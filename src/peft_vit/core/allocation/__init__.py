"""Importance, strategies, budgets, and the controller that puts them together."""

from peft_vit.core.allocation.adalora_controller import AdaLoRAController
from peft_vit.core.allocation.importance import ImportanceTracker
from peft_vit.core.allocation.starting_ranks import check_starting_ranks, choose_starting_ranks
from peft_vit.core.allocation.strategies import (
    Bounds,
    BudgetSchedule,
    allocate,
    bounds_for,
    costs_for,
    largest_ranks,
    rank_costs,
    schedule_for,
)
