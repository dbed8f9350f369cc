"""The driver of a study: decides what is attempted, alone writes what came out, and can be killed at any moment."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from peft_vit.errors import UserError
from peft_vit.records import Failure, RunRecord
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
    from peft_vit.studies.plan import Plan, PlannedRun
    from peft_vit.studies.time_limit import Deadline

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
    on_event = _undisturbed(on_event)
    names = {run.spec.name for run in plan.runs}
    asked = study_file(plan.study, names, smoke=plan.runs[0].spec.smoke, data_sha256=plan.data_sha256)
    content = go_on(lock.folder, plan.before, asked, source=plan.file, part=plan.part)
    executor = make_executor() if plan.pending else None  # may refuse, and then nothing was begun
    try:
        if content != plan.before:
            write_study_file(lock.folder, content)
        store = StudyStore(lock, content.runs)
        for text in store.notices:
            on_event(Notice(text))
        waiting = [run for run in plan.pending if not skip_failed or store.known(run.spec.name).failure is None]
        if executor is not None:
            _carry_out(waiting, executor, store, on_event, plan.study.execution.retries, deadline)
        failures = {run.spec.run_id: store.known(run.spec.name).failure for run in plan.runs}
        return {run_id: reason for run_id, reason in failures.items() if reason is not None}
    finally:
        if executor is not None:
            executor.close()


def _undisturbed(on_event: Callable[[StudyEvent], None]) -> Callable[[StudyEvent], None]:
    """Let a study go on whose watcher can't write: its terminal is gone, nobody reads its pipe, its disk is full."""

    def told(event: StudyEvent) -> None:
        with suppress(OSError, SystemExit):  # to exit is rich's answer to a broken pipe
            on_event(event)

    return told


def _carry_out(
    runs: list[PlannedRun],
    executor: Executor,
    store: StudyStore,
    on_event: Callable[[StudyEvent], None],
    retries: int,
    deadline: Deadline | None,
) -> None:
    with _signals() as signals:
        attempts = _Attempts(runs, executor, store, on_event, retries)
        if deadline is None:
            for run in runs:
                executor.submit(run)
        while attempts.waiting:
            if signals.asked and not attempts.stopping:
                attempts.stop(_STOPPING)
            if deadline is not None:
                _keep(deadline, attempts, executor)
                if deadline.past if attempts.stopping else not deadline.under_way:
                    break
            event = executor.next_event(_POLL_S)
            if event is not None:
                attempts.take(event)
                if deadline is not None:
                    deadline.hear(event, attempts.waiting)
            elif attempts.stopping and not attempts.running:
                break
        if signals.asked and attempts.waiting:
            raise KeyboardInterrupt


def _keep(deadline: Deadline, attempts: _Attempts, executor: Executor) -> None:
    """Start what is expected to end in time, and stop what runs when the time is over."""
    if attempts.stopping:
        return
    if deadline.over:
        if deadline.under_way:
            attempts.stop(_TIME_IS_OVER)
        return
    for run in deadline.to_start(attempts.waiting):
        executor.submit(run)


class _Attempts:
    """What of a call is not over yet, and what each event means for it."""

    def __init__(
        self,
        runs: Iterable[PlannedRun],
        executor: Executor,
        store: StudyStore,
        on_event: Callable[[StudyEvent], None],
        retries: int,
    ) -> None:
        self.waiting = {run.spec.name for run in runs}
        self.running: set[str] = set()
        self.stopping = False
        self._executor = executor
        self._store = store
        self._on_event = on_event
        self._retries = retries
        self._failures: Counter[str] = Counter()
        self._reached: Counter[str] = Counter()  # step of the last interruption that nobody asked for

    def stop(self, why: str) -> None:
        """Have what runs stopped, and start nothing more."""
        self._on_event(Notice(why))
        self.stopping = True
        self._executor.stop()

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
            self._interrupted(event.run, run, event.step)
        self._on_event(event)

    def _interrupted(self, planned: PlannedRun, run: str, step: int) -> None:
        self._store.interrupted(run)
        self._reached[run] = step
        self.running.discard(run)
        if not self.stopping:
            self._executor.submit(planned)

    def _ended(self, event: RunEnded, run: str) -> None:
        record = event.record
        self.running.discard(run)
        if record.failure == "disk_full":
            problem = f"no room for what it writes ({record.error}); make room, and the same command goes on"
            raise UserError(problem, file=self._store.folder / run)
        if record.status == "failed" and self._try_again(record, run):
            record = self._store.ended(record, retried=True)
            if self.stopping:
                self._on_event(Notice(f"{record.spec.run_id}: {record.error}"))
            else:
                self._on_event(RunRetried(event.run, record))
                self._executor.submit(event.run)
            return
        record = self._store.ended(record, event.adapter)
        self.waiting.discard(run)
        self._on_event(RunEnded(event.run, record, event.adapter))

    def _try_again(self, record: RunRecord, run: str) -> bool:
        """Tell whether a failure may pass: what a stop or Ctrl-C has killed counts as none."""
        if record.failure not in TRANSIENT:
            return False
        if self.stopping:
            return True
        self._failures[run] += 1
        return self._failures[run] <= self._retries


class _Signals:
    """Ctrl-C and SIGTERM: the first one asks, the second one ends at once, wherever it meets this process."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def _signals() -> Iterator[_Signals]:
    handler = _Signals()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) == usual:  # somebody who ignores or handles it had a reason
                before[number] = signal.signal(number, handler)
    try:
        yield handler
    finally:
        for stopped, previous in before.items():
            signal.signal(stopped, previous)
