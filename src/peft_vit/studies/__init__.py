"""Many runs: plan a study, have its runs done by an executor, keep their records, go on after an interruption."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_vit.studies.events import Event, RunEnded, RunProgress, RunStarted
    from peft_vit.studies.plan import Plan, PlannedRun, plan_study
    from peft_vit.studies.scheduler import drive

__all__ = ["Event", "Plan", "PlannedRun", "RunEnded", "RunProgress", "RunStarted", "drive", "plan_study"]

_HOME = {
    "drive": "peft_vit.studies.scheduler",
    **dict.fromkeys(("Event", "RunEnded", "RunProgress", "RunStarted"), "peft_vit.studies.events"),
    **dict.fromkeys(("Plan", "PlannedRun", "plan_study"), "peft_vit.studies.plan"),
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that what only reads a study's state needs no torch."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'peft_vit.studies' has no attribute {name!r}")
