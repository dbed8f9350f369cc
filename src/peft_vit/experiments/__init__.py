"""Plan a study, do its runs, keep their records: the only place where configuration becomes objects."""

from peft_vit.experiments.executor import Event, RunEnded, RunProgress, RunStarted, execute
from peft_vit.experiments.plan import Plan, PlannedRun, plan_study
from peft_vit.experiments.run import run_one

__all__ = ["Event", "Plan", "PlannedRun", "RunEnded", "RunProgress", "RunStarted", "execute", "plan_study", "run_one"]
