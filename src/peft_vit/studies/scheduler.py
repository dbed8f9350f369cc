"""The driver of a study: decides what is attempted, alone writes what came out, and can be killed at any moment."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from peft_vit.errors import UserError
from peft_vit.records import Failure
from peft_vit.studies.events import (
    Event,
    Executor,
    Notice,
    RunEnded,
    RunInterrupted,
    RunRetried,
    RunStarted,
    StudyEvent,
    lost,
)
from peft_vit.studies.lock import StudyLock
from peft_vit.studies.store import StudyStore
from peft_vit.studies.study_file import go_on, study_file, write_study_file

if TYPE_CHECKING:  # it runs without torch, which only executors need
    from peft_vit.studies.deadline import Deadline
    from peft_vit.studies.plan import Plan, PlannedRun

TRANSIENT: frozenset[Failure | None] = frozenset({"killed", "out_of_memory", "io"})  # another attempt may end otherwise
_POLL_S = 0.2
_TIME_IS_OVER = "the time is over: what still runs writes a checkpoint, with which a later call goes on"
_STOPPING = "stopping: what runs writes a checkpoint first; Ctrl-C again ends at once"


def drive(
    plan: Plan,
    lock: StudyLock,
    make_executor: Callable[[], Executor],
    on_event: Callable[[StudyEvent], None],
    *,
    skip_failed: bool = False,
    deadline: Deadline | None = None,
) -> dict[str, str]:
    """Do what a plan says is pending, and return when every run has ended, or the time that there is.

    Args:
        plan: made while the lock was held.
        lock: of the study's folder.
        make_executor: called once, if there is something to do; nothing is written if it refuses.
        on_event: told what happens; whether it can write is of no importance.
        skip_failed: leave runs alone that an earlier call has seen fail.
        deadline: what is started, and until when; None: everything, however long it takes.

    Returns:
        The reason by run id of those that have failed, now or before.

    Raises:
        UserError: if the folder holds another study, if something in it is damaged, or if there is no room for a
            result; nothing that was written is lost.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when what ran has been stopped; at once after the second.
    """

    def tell(event: StudyEvent) -> None:
        """Tell it a watcher who may be unable to write: a terminal is gone, nobody reads a pipe, a disk is full."""
        with suppress(OSError, SystemExit):  # to exit is rich's answer to a broken pipe
            on_event(event)

    names = {run.spec.name for run in plan.runs}
    asked = study_file(plan.study, names, smoke=plan.runs[0].spec.smoke, data_sha256=plan.data_sha256)
    content = go_on(lock.folder, plan.before, asked, source=plan.file, part=plan.part)
    executor = make_executor() if plan.pending else None  # may refuse, and then nothing was begun
    try:
        if content != plan.before:
            write_study_file(lock.folder, content)
        store = StudyStore(lock, content.runs)
        for text in store.notices:
            tell(Notice(text))
        waiting = [run for run in plan.pending if not skip_failed or store.known(run.spec.name).failure is None]
        if executor is not None:
            _carry_out(_Attempts(waiting, executor, store, tell, plan.study.execution.retries), deadline)
        failures = {run.spec.run_id: store.known(run.spec.name).failure for run in plan.runs}
        return {run_id: reason for run_id, reason in failures.items() if reason is not None}
    finally:
        if executor is not None:
            executor.close()


def _carry_out(attempts: _Attempts, deadline: Deadline | None) -> None:
    executor = attempts.executor
    with _signals() as signals:
        if deadline is None:
            for run in attempts.runs:
                executor.submit(run)
        while attempts.waiting:
            if signals and not attempts.stopping:
                attempts.stop(_STOPPING)
            if deadline is not None:
                if not attempts.stopping:
                    if not deadline.over:
                        for run in deadline.to_start(attempts.waiting):
                            executor.submit(run)
                    elif deadline.under_way:
                        attempts.stop(_TIME_IS_OVER)
                if deadline.past if attempts.stopping else not deadline.under_way:
                    break
            event = executor.next_event(_POLL_S)
            if event is not None:
                attempts.take(event)
                if deadline is not None:
                    deadline.hear(event, attempts.waiting)
            elif attempts.stopping and not attempts.running:
                break
        if signals and attempts.waiting:
            raise KeyboardInterrupt


class _Attempts:
    """What of a call is not over yet, and what each event means for it."""

    def __init__(
        self,
        runs: list[PlannedRun],
        executor: Executor,
        store: StudyStore,
        on_event: Callable[[StudyEvent], None],
        retries: int,
    ) -> None:
        self.runs = runs
        self.executor = executor
        self.waiting = {run.spec.name for run in runs}
        self.running: set[str] = set()
        self.stopping = False
        self._store = store
        self._on_event = on_event
        self._retries = retries
        self._failures: Counter[str] = Counter()
        self._reached: Counter[str] = Counter()  # step of the last interruption that nobody asked for

    def stop(self, why: str) -> None:
        """Have what runs stopped, and start nothing more."""
        self._on_event(Notice(why))
        self.stopping = True
        self.executor.stop()

    def take(self, event: Event) -> None:
        """Enter what happened, and tell it."""
        run = event.run.spec.name
        if run not in self.waiting:  # a late word, say of a node that was thought dead
            return
        if isinstance(event, RunInterrupted) and not self.stopping and event.step <= self._reached[run]:
            # It must not repeat for ever.
            event = lost(event.run, f"it was interrupted at step {event.step} without a step since the last time")
        if isinstance(event, RunEnded):
            self._ended(event, run)
            return
        if isinstance(event, RunStarted):
            self._store.started(run, event.worker, event.run.total_steps)
            self.running.add(run)
        elif isinstance(event, RunInterrupted):
            self._store.interrupted(run)
            self._reached[run] = event.step
            self.running.discard(run)
            if not self.stopping:
                self.executor.submit(event.run)
        self._on_event(event)

    def _ended(self, event: RunEnded, run: str) -> None:
        record = event.record
        self.running.discard(run)
        if record.failure == "disk_full":
            problem = f"no room for what it writes ({record.error}); make room, and the same command goes on"
            raise UserError(problem, file=self._store.folder / run)
        again = record.status == "failed" and record.failure in TRANSIENT
        if again and not self.stopping:  # what a stop or Ctrl-C has killed counts as no failure
            self._failures[run] += 1
            again = self._failures[run] <= self._retries
        if again:
            record = self._store.ended(record, retried=True)
            if self.stopping:
                self._on_event(Notice(f"{record.spec.run_id}: {record.error}"))
            else:
                self._on_event(RunRetried(event.run, record))
                self.executor.submit(event.run)
            return
        record = self._store.ended(record, event.adapter)
        self.waiting.discard(run)
        self._on_event(RunEnded(event.run, record, event.adapter))


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Note Ctrl-C and SIGTERM: the first one asks, the second one ends at once, wherever it meets this process."""
    noted: list[int] = []

    def handler(number: int, _: FrameType | None) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) == usual:  # somebody who ignores or handles it had a reason
                before[number] = signal.signal(number, handler)
    try:
        yield noted
    finally:
        for stopped, previous in before.items():
            signal.signal(stopped, previous)
