"""Runs a plan in a spawned worker process, which survives a failed run and can be replaced if it dies."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from peft_vit.data import load_data
from peft_vit.errors import UserError
from peft_vit.experiments.plan import PlannedRun
from peft_vit.experiments.provenance import loaded_git_state
from peft_vit.experiments.run import Finished, run_one
from peft_vit.records import RunRecord, RunSpec, write_result
from peft_vit.training import Progress

# glibc returns freed memory to the system by default and pays for it with page faults in every step.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
_POLL_S = 0.2


@dataclass(frozen=True)
class RunStarted:
    """A run begins."""

    run: PlannedRun


@dataclass(frozen=True)
class RunProgress:
    """A run made a step."""

    run: PlannedRun
    progress: Progress


@dataclass(frozen=True)
class RunEnded:
    """A run is done or has failed; its record is written."""

    run: PlannedRun
    record: RunRecord


Event = RunStarted | RunProgress | RunEnded

_channel: Any = None  # the worker's end of the progress queue


def execute(runs: tuple[PlannedRun, ...], results_dir: Path, on_event: Callable[[Event], None]) -> list[RunRecord]:
    """Do every run, one after the other, and return their records.

    Args:
        runs: what is to be done.
        results_dir: where records go.
        on_event: told what happens, in this process.

    Raises:
        UserError: before any run starts, if an image is broken or nothing can be written to `results_dir`.
        KeyboardInterrupt: on Ctrl-C; records of finished runs are on disk, the run in progress is lost.
    """
    if not runs:
        return []
    _check_writable(results_dir)
    _decode_images(runs)
    os.environ.update({name: os.environ.get(name, value) for name, value in ALLOCATOR.items()})
    context = multiprocessing.get_context("spawn")
    channel = context.Queue()
    records = []
    pool = _start_pool(context, channel)
    try:
        for run in runs:
            on_event(RunStarted(run))
            started = time.perf_counter()
            future = pool.submit(_work, run.spec)
            try:
                finished = _wait(future, channel, run, on_event)
            except BrokenProcessPool:
                finished = Finished(_died(run.spec, time.perf_counter() - started), None)
                pool.shutdown(wait=False)
                channel = context.Queue()  # the dead worker may have left a lock or half a message in the old one
                pool = _start_pool(context, channel)
            write_result(results_dir, finished.record, finished.adapter)
            records.append(finished.record)
            on_event(RunEnded(run, finished.record))
    except KeyboardInterrupt:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return records


def _check_writable(results_dir: Path) -> None:
    try:
        results_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=results_dir):
            pass
    except OSError as error:
        problem = f"can't be written to ({error.strerror}); choose another --output-dir"
        raise UserError(problem, file=results_dir) from None


def _decode_images(runs: tuple[PlannedRun, ...]) -> None:
    """Bring every image that a run will need into the cache: a broken one should show before training, once."""
    for data, seed, smoke in dict.fromkeys((run.spec.data, run.spec.seed, run.spec.smoke) for run in runs):
        load_data(data, seed, smoke=smoke)


def _start_pool(context: Any, channel: Any) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=context, initializer=_initialize, initargs=(channel, os.getpid()))


def _initialize(channel: Any, parent: int) -> None:
    """Make a fresh worker ready: it leaves Ctrl-C to its parent, and does not outlive it."""
    global _channel  # noqa: PLW0603 - a worker has one parent
    _channel = channel
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_interop_threads(1)
    loaded_git_state()
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(spec: RunSpec) -> Finished:
    return run_one(spec, on_progress=lambda progress: _channel.put((spec.run_id, progress)))


def _wait(future: Future[Finished], channel: Any, run: PlannedRun, on_event: Callable[[Event], None]) -> Finished:
    while True:
        try:
            run_id, progress = channel.get(timeout=_POLL_S)
            if run_id == run.spec.run_id:  # a late message of the run before is dropped
                on_event(RunProgress(run, progress))
        except queue.Empty:
            if future.done():
                return future.result()


def _died(spec: RunSpec, seconds: float) -> RunRecord:
    return RunRecord(
        spec=spec, spec_digest=spec.digest(), status="failed", failure="killed", seconds=seconds,
        error="the worker process died (killed, or out of memory); run the same command again to retry",
        traceback=traceback.format_exc(), started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip
