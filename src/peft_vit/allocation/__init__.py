"""Importance, strategies, budgets, and the controller that puts them together."""

from peft_vit.allocation.adalora_controller import AdaLoRAController
from peft_vit.allocation.budget import BudgetSchedule, bounds_for, costs_for, largest_ranks, rank_costs, schedule_for
from peft_vit.allocation.fisher import check_fisher
from peft_vit.allocation.importance import ImportanceTracker
from peft_vit.allocation.starting_ranks import CalibrationBatch, check_starting_ranks, choose_starting_ranks
from peft_vit.allocation.strategies import Bounds, allocate

__all__ = [
    "AdaLoRAController",
    "Bounds",
    "BudgetSchedule",
    "CalibrationBatch",
    "ImportanceTracker",
    "allocate",
    "bounds_for",
    "check_fisher",
    "check_starting_ranks",
    "choose_starting_ranks",
    "costs_for",
    "largest_ranks",
    "rank_costs",
    "schedule_for",
]
