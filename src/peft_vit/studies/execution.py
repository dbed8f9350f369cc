"""How plans are carried out: locks that are held meanwhile, an executor, and a view of what happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from peft_vit.config import ExecutorName
from peft_vit.safe_io import folder_below
from peft_vit.studies.lock import StudyLock, study_lock

if TYPE_CHECKING:
    from peft_vit.studies.plan import Plan
    from peft_vit.studies.time_limit import Limit


@dataclass(frozen=True)
class Execution:
    """How runs are carried out, beyond what the studies say; see `open_executor` and `drive`."""

    executor: ExecutorName = "local"
    ray_address: str | None = None
    oversubscribe: bool = False
    skip_failed: bool = False


@contextmanager
def hold_locks(results_dir: Path, names: list[str]) -> Iterator[list[StudyLock]]:
    """Hold all locks from before planning on: whoever comes too late leaves before torch is loaded."""
    with ExitStack() as stack:
        yield [stack.enter_context(study_lock(folder_below(results_dir, name))) for name in names]


def drive_plans(
    plans: list[Plan], locks: list[StudyLock], execution: Execution, limit: Limit | None = None
) -> dict[str, str]:
    """Do what plans say is pending, study by study, and return why runs have failed, by run id; see `drive`.

    With a limit what is not expected to end in it is not begun, and what then still runs writes a checkpoint.
    """
    from peft_vit.studies.executors import open_executor
    from peft_vit.studies.progress_view import Watch
    from peft_vit.studies.scheduler import drive
    from peft_vit.studies.time_limit import Deadline

    failed: dict[str, str] = {}
    for plan, lock in zip(plans, locks, strict=True):
        make_executor = partial(
            open_executor,
            execution.executor,
            plan,
            lock.folder.parent,
            oversubscribe=execution.oversubscribe,
            ray_address=execution.ray_address,
        )
        deadline = None if limit is None else Deadline(plan, lock.folder.parent, limit, execution.executor)
        with Watch(plan, until=None if limit is None else limit.over_at) as watch:
            failed |= drive(
                plan, lock, make_executor, watch.on_event, skip_failed=execution.skip_failed, deadline=deadline
            )
    return failed
