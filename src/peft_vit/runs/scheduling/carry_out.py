"""Have the pending runs of a plan done, within a limit of time, and show how far they are."""

from __future__ import annotations

from functools import partial

from peft_vit.base.errors import NothingDoneError
from peft_vit.runs.costs.time_limit import Limit
from peft_vit.runs.executors import ExecutorName, open_executor
from peft_vit.runs.planned import Plan
from peft_vit.runs.records.progress import StudyLock, study_status
from peft_vit.runs.scheduling.deadline import Deadline
from peft_vit.runs.scheduling.scheduler import drive


def carry_out(
    plan: Plan,
    lock: StudyLock,
    limit: Limit | None = None,
    *,
    executor: ExecutorName = "local",
    ray_address: str | None = None,
    skip_failed: bool = False,
) -> dict[str, str]:
    """Do what a plan says is pending, show it, and return why runs have failed, by run id; see `drive`.

    Args:
        plan: of a study.
        lock: on its folder.
        limit: what is not expected to end in it is not begun, and what then still runs writes a checkpoint.
        executor: what does the runs.
        ray_address: of a cluster.
        skip_failed: leave out what failed in an earlier call.

    Raises:
        UserError, KeyboardInterrupt: see `drive`.
        NothingDoneError: if the limit is over, and no run of the study is done.
    """
    # Loaded with the locks held: whoever comes too late leaves before torch.
    from peft_vit.runs.scheduling.display import StudyProgress

    results_dir = lock.folder.parent
    make_executor = partial(open_executor, executor, plan, results_dir, ray_address)
    deadline = None if limit is None else Deadline(plan, results_dir, limit, executor)
    with StudyProgress(plan, results_dir, until=None if limit is None else limit.over_at) as watch:
        failed = drive(plan, lock, make_executor, watch.on_event, skip_failed=skip_failed, deadline=deadline)
    if deadline is not None and not failed and all(run.state != "done" for run in study_status(lock.folder).runs):
        reason = f"no run was done in {deadline.limit.minutes:g} minutes: {deadline.shortest()}"
        remedy = "give more --minutes, with which the same command continues, fewer images, or a smaller image_size"
        raise NothingDoneError(f"{reason}; {remedy}", file=plan.file)
    return failed
