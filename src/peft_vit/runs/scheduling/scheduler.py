"""The driver of a study, the one writer of its folder: decides what is attempted, and can be killed at any moment.

study.json is written first. A result is written in the order adapter, record, removal of the rest. A kill in
between loses nothing: what is left over beside a result is removed when the study is opened again.
"""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from peft_vit.base.errors import UserError, printable
from peft_vit.base.files import checkpoint_folders, folder_below, remove_any, write_whole
from peft_vit.core.config import StudyConfig
from peft_vit.core.records import RunRecord, StudyFile
from peft_vit.runs.executors import (
    Event,
    Executor,
    Notice,
    RunEnded,
    RunInterrupted,
    RunRetried,
    RunStarted,
    StudyEvent,
    failed_attempt,
)
from peft_vit.runs.records.progress import PROGRESS_FILE, Attempt, StudyLock, read_run_files, utc_now
from peft_vit.runs.records.storage import (
    ADAPTER_FILE,
    RECORD_FILE,
    STUDY_FILE,
    read_record,
    write_result,
    write_study_file,
)

if TYPE_CHECKING:  # it runs without torch, which only executors need
    from peft_vit.runs.planned import Plan, PlannedRun
    from peft_vit.runs.scheduling.deadline import Deadline

_TRANSIENT = ("killed", "out_of_memory", "io")  # failures after which another attempt may end otherwise
_POLL_S = 0.2
_FREE = {"description", "execution"}  # settings on which no result depends
# What a run needs until it is done, and what files and checkpoints are called while they are written, see
# `write_checkpoint` and `write_atomically`.
_TEMPORARY = (".checkpoint-", *(f".{name}." for name in (RECORD_FILE, ADAPTER_FILE, PROGRESS_FILE)), PROGRESS_FILE)


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
        on_event: gets what happens; whether it can write is of no importance.
        skip_failed: leave runs alone that an earlier call has seen fail.
        deadline: what is started, and until when; None: everything, however long it takes.

    Returns:
        The reason by run id of those that have failed, now or before.

    Raises:
        UserError: if the folder holds another study, if something in it is damaged, or if there is no room for a
            result; nothing that was written is lost.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when what ran has been stopped; at once after the second.
    """

    def report(event: StudyEvent) -> None:
        """Tell it a watcher who may be unable to write: a terminal is gone, nobody reads a pipe, a disk is full."""
        with suppress(OSError, SystemExit):  # to exit is rich's answer to a broken pipe
            on_event(event)

    names = {run.spec.name for run in plan.runs}
    requested = study_file(plan.study, names, smoke=plan.runs[0].spec.smoke, data_sha256=plan.data_sha256)
    content = go_on(lock.folder, plan.existing, requested, source=str(plan.file or "asked for"), part=plan.part)
    executor = make_executor() if plan.pending else None  # may refuse, and then nothing was begun
    try:
        if content != plan.existing:
            write_study_file(lock.folder, content)
        store = StudyStore(lock, content.runs)
        for text in store.notices:
            report(Notice(text))
        waiting = [
            run for run in plan.pending if not skip_failed or read_run_files(lock.folder, run.spec.name).failure is None
        ]
        if executor is not None:
            open_runs = _OpenRuns(executor, store, report, plan.study.execution.retries)
            open_runs.carry_out(waiting, deadline)
        failures = {run.spec.run_id: read_run_files(lock.folder, run.spec.name).failure for run in plan.runs}
        return {run_id: reason for run_id, reason in failures.items() if reason is not None}
    finally:
        if executor is not None:
            executor.close()


@dataclass
class _OpenRuns:
    """What of a call is not over yet, and what each event means for it."""

    executor: Executor
    store: StudyStore
    on_event: Callable[[StudyEvent], None]
    retries: int
    waiting: set[str] = field(default_factory=set)  # names of the runs that have not ended
    running: set[str] = field(default_factory=set)
    stopping: bool = False
    failures: Counter[str] = field(default_factory=Counter)
    reached: Counter[str] = field(default_factory=Counter)  # step of the last interruption that nobody asked for

    def carry_out(self, runs: list[PlannedRun], deadline: Deadline | None) -> None:
        """Attempt runs until all have ended, or the time is over, or a signal came."""
        self.waiting = {run.spec.name for run in runs}
        with _signals() as signals:
            if deadline is None:
                for run in runs:
                    self.executor.submit(run)
            while self.waiting:
                if signals and not self.stopping:
                    self._stop("stopping after a checkpoint of each run; press Ctrl-C again to end at once")
                if deadline is not None:
                    if not self.stopping and deadline.limit.left_s > 0:
                        for run in deadline.to_start(self.waiting):
                            self.executor.submit(run)
                        if (warning := deadline.warning(self.waiting)) is not None:
                            self.on_event(Notice(warning))
                    elif not self.stopping and deadline.under_way:
                        self._stop("time is up: runs under way write a checkpoint, from which a later call continues")
                    if deadline.limit.is_past if self.stopping else not deadline.under_way:
                        break
                event = self.executor.next_event(_POLL_S)
                if event is not None:
                    self.take(event)
                    if deadline is not None:
                        deadline.on_event(event, self.waiting)
                elif self.stopping and not self.running:
                    break
            if signals and self.waiting:
                raise KeyboardInterrupt

    def _stop(self, why: str) -> None:
        """Have what runs stopped, and start nothing more."""
        self.on_event(Notice(why))
        self.stopping = True
        self.executor.stop()

    def take(self, event: Event) -> None:
        """Enter what happened, and tell it."""
        run = event.run.spec.name
        if run not in self.waiting:  # a late word, say of a node that was thought dead
            return
        if isinstance(event, RunInterrupted) and not self.stopping and event.step <= self.reached[run]:
            # It must not repeat for ever.
            event = failed_attempt(
                event.run, f"it was interrupted at step {event.step} without a step since the last time"
            )
        match event:
            case RunEnded():
                self.running.discard(run)
                self._end(event)
                return
            case RunStarted():
                self.store.started(run, event.worker, event.run.total_steps)
                self.running.add(run)
            case RunInterrupted():
                self.store.interrupted(run)
                self.reached[run] = event.step
                self.running.discard(run)
                if not self.stopping:
                    self.executor.submit(event.run)
        self.on_event(event)

    def _end(self, event: RunEnded) -> None:
        record, run = event.record, event.run.spec.name
        if record.failure == "disk_full":
            reason = f"no room for what it writes ({record.error}); make room, and the same command continues"
            raise UserError(reason, file=self.store.folder / run)
        again = record.status == "failed" and record.failure in _TRANSIENT
        if again and not self.stopping:  # what a stop or Ctrl-C has killed counts as no failure
            self.failures[run] += 1
            again = self.failures[run] <= self.retries
        record = self.store.ended(record, event.adapter, event.features, retried=again)
        if not again:
            self.waiting.discard(run)
            self.on_event(replace(event, record=record))
        elif self.stopping:
            self.on_event(Notice(f"{record.spec.run_id}: {record.error}"))
        else:
            self.on_event(RunRetried(event.run, record))
            self.executor.submit(event.run)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Note Ctrl-C and SIGTERM: the first one asks, the second one ends at once, wherever it meets this process."""
    noted: list[int] = []

    def handler(number: int, _: FrameType | None) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    previous_handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) == usual:  # somebody who ignores or handles it had a reason
                previous_handlers[number] = signal.signal(number, handler)
    try:
        yield noted
    finally:
        for stopped, previous in previous_handlers.items():
            signal.signal(stopped, previous)


# --- results and attempts ---


class StudyStore:
    """The one writer of a study's results.

    Attributes:
        folder: the study's.
        notices: what a person should know about what was found in it.

    Args:
        lock: of its folder.
        runs: that are planned.

    Raises:
        UserError: as of `read_run_files`.
    """

    def __init__(self, lock: StudyLock, runs: tuple[str, ...]) -> None:
        self.folder = lock.folder
        self.notices = []
        for run in runs:
            known = read_run_files(self.folder, run)
            if known.fault:
                self.notices.append(f"{run}: {known.fault}")
            if known.is_done:
                self._clean_up(run)

    def started(self, run: str, worker: str, total_steps: int) -> None:
        """Write that an attempt begins."""
        self._write(run, self._attempt(run, begins=True), worker=worker, total_steps=total_steps)

    def interrupted(self, run: str) -> None:
        """Write that an attempt was stopped."""
        self._write(run, self._attempt(run), state="interrupted")

    def ended(
        self, record: RunRecord, adapter: bytes | None = None, features: bytes | None = None, *, retried: bool = False
    ) -> RunRecord:
        """Write what came of an attempt: of the last one its result, whose checkpoints go if it is done.

        Args:
            record: what happened.
            adapter: content of the adapter file; None if the run failed.
            features: content of the file of training features; None: there is none.
            retried: it failed, and is attempted again.

        Returns:
            The record with the number of attempts.
        """
        run = record.spec.name
        attempt = self._attempt(run)
        update: dict[str, Any] = {"attempts": attempt.number}
        for name in ("error", "traceback"):
            text = getattr(record, name)
            if text is not None:  # it may quote a file's name, which may be any bytes
                update[name] = text.encode(errors="backslashreplace").decode()
        record = record.model_copy(update=update)
        if retried:
            self._write(run, attempt, state="failed", error=record.error)
            return record
        write_result(self.folder.parent, record, adapter, features)
        if record.status == "done":
            self._clean_up(run)
        return record

    def _attempt(self, run: str, *, begins: bool = False) -> Attempt:
        """Return the attempt that is under way, or the next one where it begins, or its start was not told."""
        known = read_run_files(self.folder, run)
        if not begins and known.attempt is not None and known.attempt.state == "running":
            return known.attempt
        return Attempt(number=known.attempts + 1, state="running", started_at=utc_now())

    def _write(self, run: str, attempt: Attempt, **changes: Any) -> None:
        content = attempt.model_copy(update=changes).model_dump_json()
        write_whole(folder_below(self.folder, run) / PROGRESS_FILE, content.encode())

    def _clean_up(self, run: str) -> None:
        """Remove what a finished run needs no more, and files that a killed process was about to put in place."""
        folder = self.folder / run
        left_over = [path for path in folder.iterdir() if path.name.startswith(_TEMPORARY)]
        for path in (*checkpoint_folders(folder).values(), *left_over):
            remove_any(path)


# --- study.json ---


def study_file(study: StudyConfig, wanted: Collection[str], *, smoke: bool, data_sha256: str) -> StudyFile:
    """Return what study.json will say; `wanted` are the names of the runs that the command does not leave out."""
    runs = tuple(f"{experiment.name}/seed_{seed}" for experiment in study.experiments for seed in study.seeds)
    skipped = tuple(run for run in runs if run not in wanted)
    return StudyFile(smoke=smoke, data_sha256=data_sha256, runs=runs, skipped=skipped, configuration=study)


def go_on(
    folder: Path, existing: StudyFile | None, requested: StudyFile, *, source: str, part: bool = False
) -> StudyFile:
    """Return what study.json will say after a command asked for `requested`; seeds and experiments may be added.

    Args:
        folder: the study's.
        existing: what study.json says; None: the study is new.
        requested: by the command.
        source: the name of the configuration file, for the difference.
        part: experiments and seeds that `requested` does not name stay, instead of counting as removed.

    Raises:
        UserError: with the difference, if the folder holds another study or one that was configured otherwise.
    """
    if existing is None:
        return requested
    file, remedy = folder / STUDY_FILE, "choose another --output"
    if existing.smoke != requested.smoke:
        kinds = {True: "a smoke study", False: "a real study"}
        reason = f"belongs to {kinds[existing.smoke]}, not to {kinds[requested.smoke]}; {remedy}"
        raise UserError(reason, file=file, field="smoke")
    old, new = _comparable(existing.configuration, requested.configuration, part)
    if old != new:
        raise UserError(
            f"was begun with another configuration, see below; set it back, give the study another name, or {remedy}",
            file=file,
            field="configuration",
            details=difference(old, new, str(file), source),
        )
    if existing.data_sha256 != requested.data_sha256:
        raise UserError(f"was begun with other images under the same path; {remedy}", file=file, field="data_sha256")
    runs = tuple(dict.fromkeys((*requested.runs, *existing.runs)))
    configuration = requested.configuration
    if part:
        earlier = existing.configuration
        experiments = {experiment.name: experiment for experiment in (*earlier.experiments, *configuration.experiments)}
        seeds = tuple(dict.fromkeys((*earlier.seeds, *configuration.seeds)))
        configuration = configuration.model_copy(update={"experiments": tuple(experiments.values()), "seeds": seeds})
    return requested.model_copy(
        update={
            "runs": runs,
            "skipped": tuple(run for run in runs if run not in requested.runs or run in requested.skipped),
            "configuration": configuration,
            "seeds_added": _seeds_added(folder, existing, requested.configuration),
        }
    )


def _seeds_added(folder: Path, existing: StudyFile, requested: StudyConfig) -> tuple[int, ...]:
    """Return the seeds whose number may follow from results: those that are new where a run is done, and earlier ones.

    A smoke study has no results.
    """
    new = tuple(seed for seed in requested.seeds if seed not in existing.configuration.seeds)
    if new and not existing.smoke:
        recorded = (file for run in existing.runs if (file := folder / run / RECORD_FILE).exists())
        if any(read_record(file).status == "done" for file in recorded):
            return tuple(dict.fromkeys((*existing.seeds_added, *new)))
    return existing.seeds_added


def _comparable(existing: StudyConfig, requested: StudyConfig, part: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return both as plain values, without what may change: experiments by name, and only what both could have."""
    old, new = (study.model_dump(mode="json", exclude=_FREE, exclude_none=True) for study in (existing, requested))
    names = [{experiment.name for experiment in study.experiments} for study in (existing, requested)]
    both = names[0] & names[1]
    for study, compared in ((old, both if part else names[0]), (new, both)):
        study["experiments"] = {
            section["name"]: section for section in study["experiments"] if section["name"] in compared
        }
        if not study["experiments"]:
            del study["experiments"]
    new["seeds"] = sorted({*new["seeds"]} & {*old["seeds"]})
    old["seeds"] = new["seeds"] if part else sorted(old["seeds"])
    return old, new


def difference(old: dict[str, Any], new: dict[str, Any], old_name: str, new_name: str) -> str:
    """Return what differs in two mappings, a line for each setting of each, by its dotted name."""
    old_values, new_values = _by_dotted_name(old), _by_dotted_name(new)
    lines = [f"--- {old_name}", f"+++ {new_name}"]
    for name in dict.fromkeys((*old_values, *new_values)):
        if old_values.get(name) != new_values.get(name):
            lines += [f"-{name}: {old_values[name]}"] if name in old_values else []
            lines += [f"+{name}: {new_values[name]}"] if name in new_values else []
    return "\n".join(map(printable, lines))


def _by_dotted_name(values: dict[str, Any], place: str = "") -> dict[str, Any]:
    named: dict[str, Any] = {}
    for key, value in values.items():
        named |= _by_dotted_name(value, f"{place}{key}.") if isinstance(value, dict) else {f"{place}{key}": value}
    return named
