"""Runs on this machine, several at a time, each in worker processes of its own: one, or as many as it has devices.

Started by torchrun, a run has one worker here, the first; the other processes of torchrun are those of the run too, and
read in torchrun's store what it is.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

from peft_vit.base.errors import UserError
from peft_vit.base.files import checkpoint_folders
from peft_vit.core.adapters.footprint import peak_memory_of
from peft_vit.core.records import RunSpec
from peft_vit.core.training import Checkpoints, Helped, Interrupted, Member, Progress
from peft_vit.runs.execute import Finished, run_one
from peft_vit.runs.executors import Event, Executor, RunEnded, RunInterrupted, RunProgress, RunStarted, failed_attempt
from peft_vit.runs.executors.torchrun import Launch, announce, at_parents_end, launch
from peft_vit.runs.planned import Plan, PlannedRun
from peft_vit.runs.records.storage import run_folder
from peft_vit.runs.this_machine.machine import check_devices, loaded_git_state

# glibc returns freed memory to the system by default and pays for it with page faults in every step.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
# On Intel's processors MKL adds in an order that follows where memory lies, unless it is told before torch is imported.
SURROUNDINGS = ALLOCATOR | {"MKL_CBWR": "AUTO,STRICT"}
_PR_SET_PDEATHSIG = 1  # prctl(2)
# What a worker is asked to do; None in its place asks it to stop what it does.
_Order = tuple[RunSpec, Checkpoints, Member | None]
# None: its part is done, and the run's first worker tells the rest.
_Message = Progress | Finished | Interrupted | None


@dataclass(eq=False)
class _Worker:
    """A worker process as its parent sees it. No other process holds an end of its pipe, so its death closes it."""

    process: BaseProcess
    pipe: Connection
    run: PlannedRun | None = None  # what it works on
    rank: int = 0  # among the workers of that run
    since: float = 0.0  # time.monotonic()
    stepped: bool = False  # it has told of a step of this attempt


class LocalExecutor:
    """Spawned processes that do one run after the other; one that dies costs its own run only.

    Call it from one thread, and one that lives as long as it does: on Linux, workers end with the thread that started
    them. Images should be in the cache before (`decode_images`), or workers decode them, each for itself.

    Args:
        workers: runs at a time.
        results_dir: a run's folder with its checkpoints lies below it.
        checkpoint_every_s: see `Checkpoints`.
        devices: processes of a run that takes steps, started as there are runs for them.
        launched: by torchrun, with all of them but the first.
    """

    def __init__(
        self,
        workers: int,
        results_dir: Path,
        checkpoint_every_s: float,
        devices: int = 1,
        launched: Launch | None = None,
    ) -> None:
        self._devices = 1 if launched is not None else devices  # that are started here
        self._launched = launched
        self._store: dist.TCPStore | None = None  # where the workers of a run meet
        self._met = 0  # runs in which some have
        self._count = workers * self._devices
        self._results_dir = results_dir
        self._checkpoint_every_s = checkpoint_every_s
        self._waiting: deque[PlannedRun] = deque()
        self._events: deque[Event] = deque()
        self._workers: list[_Worker] = []

    def submit(self, run: PlannedRun) -> None:
        """Take an attempt on, to be started when a worker is free."""
        self._waiting.append(run)

    def next_event(self, timeout_s: float) -> Event | None:
        """Return what happened next; None if nothing did within the time."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._hand_out()
            if self._events:
                return self._events.popleft()
            left_s = deadline - time.monotonic()
            if left_s < 0 or not self._workers:
                return None
            ready = wait([worker.pipe for worker in self._workers], left_s)
            for worker in [worker for worker in self._workers if worker.pipe in ready]:
                self._read(worker)

    def peak_memory_bytes(self) -> int:
        """Return the largest resident memory of a worker since training began in it; 0 where the system hides it."""
        return max((peak_memory_of(worker.process.pid or 0) for worker in self._workers), default=0)

    def stop(self) -> None:
        """Forget what has not started; let what runs write a checkpoint and report `RunInterrupted`.

        An attempt that has made no step has nothing to keep: its worker, which may still be starting, is ended.
        """
        self._waiting.clear()
        for first in [worker for worker in self._workers if worker.run is not None and worker.rank == 0]:
            assert first.run is not None
            if first.stepped:
                for worker in self._workers_of(first.run):
                    _send(worker, None)
                continue
            self._kill_workers_of(first.run)
            steps = checkpoint_folders(run_folder(self._results_dir, first.run.spec))  # of earlier attempts
            self._events.append(RunInterrupted(first.run, max(steps, default=0)))

    def close(self) -> None:
        """End at once, whatever runs; leave no process behind."""
        self._waiting.clear()
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers.clear()

    def _hand_out(self) -> None:
        for idle in [worker for worker in self._workers if worker.run is None]:
            if idle.pipe.poll():  # without a run it has nothing to say: it is dead, and would cost the next run
                self._read(idle)
        while self._waiting and (workers := self._free_workers(self._waiting[0])):
            run = self._waiting.popleft()
            count, also, members = len(workers), "", list[Member | None]([None])
            if self._launched is not None and not run.spec.experiment.is_probe:
                members = [announce(self._launched, run.spec)]
            elif count > 1:
                also = f", with {count - 1} more"
                self._met += 1
                self._store = self._store or dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
                place = ("127.0.0.1", self._store.port, f"run-{self._met}")
                members = [Member(rank, count, rank, count, *place) for rank in range(count)]
            self._events.append(RunStarted(run, f"process {workers[0].process.pid} on {platform.node()}{also}"))
            checkpoints = Checkpoints(run_folder(self._results_dir, run.spec), self._checkpoint_every_s)
            for rank, (worker, member) in enumerate(zip(workers, members, strict=True)):
                worker.run, worker.rank, worker.since, worker.stepped = run, rank, time.monotonic(), False
                _send(worker, (run.spec, checkpoints, member))

    def _free_workers(self, run: PlannedRun) -> list[_Worker]:
        """Return workers without a run, started if there may be more; none: others may yet take what waits."""
        count = 1 if run.spec.experiment.is_probe else self._devices
        free = [worker for worker in self._workers if worker.run is None]
        while len(free) < count and len(self._workers) < self._count:
            try:
                free.append(_start_worker())
            except OSError as error:  # no further process now
                if len(free) == len(self._workers):
                    reason = f"no worker process can be started ({error.strerror or error})"
                    remedy = "free processes or memory, or raise the limits (ulimit); the same command continues"
                    raise UserError(f"{reason}; {remedy}", field="execution.workers") from None
                break
            self._workers.append(free[-1])
        return free[:count] if len(free) >= count else []

    def _workers_of(self, run: PlannedRun) -> list[_Worker]:
        return [worker for worker in self._workers if worker.run is run]

    def _kill_workers_of(self, run: PlannedRun) -> None:
        for worker in self._workers_of(run):
            worker.process.kill()
            self._remove(worker)

    def _read(self, worker: _Worker) -> None:
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):  # it is dead
            self._remove(worker)
            if worker.run is not None:
                reason = f"the worker process {_how_it_ended(worker.process.exitcode)}"
                self._events.append(failed_attempt(worker.run, reason, time.monotonic() - worker.since))
                self._kill_workers_of(worker.run)
            return
        assert worker.run is not None
        failed = isinstance(message, Finished) and message.record.status == "failed"
        if message is not None and (worker.rank == 0 or failed):
            self._events.append(event_of(worker.run, message))
        if isinstance(message, Progress):
            worker.stepped = True
            return
        run, worker.run = worker.run, None
        if failed:  # the others wait for it
            self._kill_workers_of(run)

    def _remove(self, worker: _Worker) -> None:
        worker.process.join()
        worker.pipe.close()
        self._workers.remove(worker)


def open_executor(plan: Plan, results_dir: Path, ray_address: str | None) -> Executor:
    """Return an executor for a plan's runs.

    Raises:
        UserError: if an address is given.
    """
    if ray_address is not None:
        raise UserError("has no effect with --executor local; add --executor ray", field="--ray-address")
    execution, launched = plan.study.execution, launch()
    devices = execution.devices
    if launched is None:
        if devices > 1:
            check_devices(devices * execution.workers, plan.study.device)
    elif launched.rank > 0:
        raise UserError("torchrun starts the command, `-m peft_vit.cli`, and no script that calls peft_vit")
    elif devices not in (1, launched.count):
        raise UserError(f"torchrun has started {launched.count} processes, not {devices}", field="execution.devices")
    return LocalExecutor(execution.workers, results_dir, execution.checkpoint_every_s, devices, launched)


def _how_it_ended(exitcode: int | None) -> str:
    if exitcode == -9:  # Windows has no such signal
        return "was killed (SIGKILL: by somebody, or by the system, which was out of memory)"
    if exitcode is not None and exitcode < 0:
        return f"was ended by {signal.Signals(-exitcode).name}"
    return f"ended with code {exitcode}"


def _send(worker: _Worker, order: _Order | None) -> None:
    with suppress(OSError):  # it is dead, which `next_event` is about to notice
        worker.pipe.send(order)


def _start_worker() -> _Worker:
    """Start a worker with the allocator's settings, and without Ctrl-C, which it leaves to its parent from the first.

    Python would look for modules in the working directory first, which may hold anybody's data. A new process imports
    the main module of the one that starts it: a script that calls `peft_vit.train` would begin there again, and scripts
    of others seldom guard against that.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, os.getpid()), daemon=True)
    main, blocks = sys.modules["__main__"], os.name != "nt"  # where nothing can be blocked
    if blocks:
        resource_tracker.ensure_running()  # what starts it lets Ctrl-C through again
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        sys.modules["__main__"] = ModuleType("__main__")
        with environment(SURROUNDINGS | {"PYTHONSAFEPATH": "1"}):
            process.start()
    except OSError:
        ours.close()
        raise
    finally:
        sys.modules["__main__"] = main
        if blocks:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
    return _Worker(process, ours)


def _serve(pipe: Connection, parent: int) -> None:
    """Do what comes through the pipe, until its other end is closed: without a parent there is nothing left to do."""
    if sys.platform == "linux":  # it is not to outlive its parent: at once, elsewhere within a second
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows it comes here, too
    at_parents_end(lambda: os._exit(1), parent)
    prepare_process()
    stopping = False

    def receive() -> _Order | None:
        try:
            return pipe.recv()
        except (EOFError, OSError):
            os._exit(1)

    def should_stop() -> bool:
        nonlocal stopping
        stopping = stopping or (pipe.poll() and receive() is None)
        return stopping

    def reply(message: _Message) -> None:
        try:
            pipe.send(message)
        except OSError:
            os._exit(1)

    while True:
        while (order := receive()) is None:  # a request to stop that came after the end of the run before is void
            pass
        (spec, checkpoints, member), stopping = order, False
        on_progress = reply if member is None or member.rank == 0 else None
        try:
            reply(
                run_one(spec, on_progress=on_progress, checkpoints=checkpoints, should_stop=should_stop, member=member)
            )
        except Interrupted as interrupted:
            reply(interrupted if on_progress else None)
        except Helped:
            reply(None)


# --- for any executor -------------------------------------------------------------------------------------------------


def event_of(run: PlannedRun, message: Progress | Finished | Interrupted) -> Event:
    """Return what a worker has sent of its run as an event."""
    match message:
        case Progress():
            return RunProgress(run, message)
        case Interrupted():
            return RunInterrupted(run, message.step)
    return RunEnded(run, message.record, message.adapter, message.features)


@contextmanager
def environment(added: Mapping[str, str]) -> Iterator[None]:
    """Hand variables down to the processes that are started meanwhile, unless the user has set them."""
    new = {name: value for name, value in added.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]


@functools.cache
def prepare_process() -> None:
    """Make a fresh process ready for runs; a second call does nothing."""
    torch.set_num_interop_threads(1)
    loaded_git_state()
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    gc.freeze()  # what libraries hold, or each of a run's garbage collections would look at all of it
