"""Plan a study, do its runs, keep their records: the only place where configuration becomes objects."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_vit.experiments.driver import drive
    from peft_vit.experiments.events import Event, RunEnded, RunProgress, RunStarted
    from peft_vit.experiments.plan import Plan, PlannedRun, plan_study
    from peft_vit.experiments.run import run_one

__all__ = ["Event", "Plan", "PlannedRun", "RunEnded", "RunProgress", "RunStarted", "drive", "plan_study", "run_one"]

_HOME = {
    "drive": "peft_vit.experiments.driver",
    **dict.fromkeys(("Event", "RunEnded", "RunProgress", "RunStarted"), "peft_vit.experiments.events"),
    **dict.fromkeys(("Plan", "PlannedRun", "plan_study"), "peft_vit.experiments.plan"),
    "run_one": "peft_vit.experiments.run",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that what only reads a study's state needs no torch."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'peft_vit.experiments' has no attribute {name!r}")
