"""The real command `peft-vit run`, as processes that can be killed: started afresh, or forked from this one.

A fresh one is the installed program with its worker processes. A forked one saves the seconds that importing torch
costs, and nothing else: this process has imported everything and started no thread of its own, and its child calls the
command line's own `main`, with the driver, the lock, the pipes and the worker processes of any other, except that
workers are forked as well and not spawned.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch starts threads unless OMP_NUM_THREADS is set before
    from tiny_studies import End

_THREADS = os.environ.get("OMP_NUM_THREADS")
os.environ["OMP_NUM_THREADS"] = "1"  # numpy, loaded after this, starts no threads then; a fork would miss them
POLL_S = 0.0005
PATIENCE_S = 1800.0  # for what takes seconds on an idle machine
_IMPORTED = (
    "peft_vit.cli",
    "peft_vit.lab.run_studies",
    "peft_vit.runs.executors.local",
    *(f"peft_vit.runs.scheduling.{name}" for name in ("carry_out", "display", "plan", "profiling", "scheduler")),
)
_MINDS_FORKS = "jemalloc_bg_thd"  # a thread of pyarrow's allocator, which starts it again where need be


class Command:
    """A process that leads a session of its own."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: int | None = None  # how it ended, negative for a signal

    def ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait for something or for the end, whatever comes first; tell whether it was the former."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.ended():
            if until():
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return False

    def kill(self, *, group: bool) -> bool:
        """Send SIGKILL to it, or to all its processes, and see it dead; tell whether it lived until then."""
        if self.ended():
            return False
        (os.killpg if group else os.kill)(self.pid, signal.SIGKILL)
        while not self.ended():
            time.sleep(POLL_S)
        return self.code == -signal.SIGKILL

    def finish(self) -> int:
        """Wait for its end; return its code.

        Raises:
            TimeoutError: if it does not come; it is killed then.
        """
        self.wait()
        if self.code is None:
            self.kill(group=True)
            raise TimeoutError(f"the command did not end within {PATIENCE_S:.0f} s")
        return self.code


def run_fresh(arguments: list[str], log: Path, events: Path | None = None) -> Command:
    """Start `peft-vit run`, its output to the end of a file, and the events of its runs to the end of another."""
    command = [str(Path(sys.executable).with_name("peft-vit")), "run", *arguments]
    if events is not None:
        command = [sys.executable, __file__, str(events), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {} if _THREADS is None else {"OMP_NUM_THREADS": _THREADS}
    return _start(lambda: os.execve(command[0], command, environment), log)


def run_forked(arguments: list[str], log: Path, events: Path | None = None) -> Command:
    """Do the same in a child of this process."""
    _import_all()

    def run() -> None:
        from peft_vit.cli import main
        from peft_vit.runs.executors import local

        fork = multiprocessing.get_context("fork")
        local.multiprocessing = SimpleNamespace(get_context=lambda _method: fork)  # type: ignore[assignment]
        serve = local._serve

        def serve_alone(pipe: Connection, parent: int) -> None:
            _let_go(pipe.fileno())
            serve(pipe, parent)

        local._serve = serve_alone
        if events is not None:
            write_events(events)
        sys.argv = ["peft-vit", "run", *arguments]
        main(["run", *arguments])

    return _start(run, log)


def undisturbed(config: Path) -> dict[str, End]:
    """Return what the runs of a study come to if nothing happens; they are written to `out` beside its file."""
    from tiny_studies import ends_of

    log, out = config.parent / "undisturbed.txt", config.parent / "out"
    if code := run_forked([str(config), "--output", str(out)], log).finish():
        raise RuntimeError(f"the undisturbed study ended with {code}: {log.read_text()[-3000:]}")
    return ends_of(out)


def write_events(file: Path) -> None:
    """Have each start, step and end of a run appended to a file, one JSON object a line."""
    from peft_vit.runs.executors import RunEnded, RunProgress, RunStarted, StudyEvent
    from peft_vit.runs.scheduling.display import StudyProgress

    show = StudyProgress.on_event

    def on_event(watch: StudyProgress, event: StudyEvent) -> None:
        if isinstance(event, RunStarted | RunProgress | RunEnded):
            step = event.progress.step if isinstance(event, RunProgress) else None
            line = json.dumps({"event": type(event).__name__, "run": event.run.spec.name, "step": step})
            with file.open("a") as handle:
                handle.write(f"{line}\n")
        show(watch, event)

    StudyProgress.on_event = on_event  # type: ignore[method-assign, assignment]


def _let_go(pipe: int) -> None:
    """Give up every file of the driver's but a pipe, as a spawned worker has none: a lock would live on in a copy."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2 and descriptor != pipe:
            os.dup2(null, descriptor)  # not closed, so that no other file takes its number


def _import_all() -> None:
    for module in _IMPORTED:
        importlib.import_module(module)
    deadline = time.monotonic() + 60
    while True:
        threads = []
        for thread in Path("/proc/self/task").iterdir():
            with suppress(OSError):  # it has just ended
                threads.append((thread / "comm").read_text().strip())
        if len(threads) <= 1 + threads.count(_MINDS_FORKS):  # some say their names late
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"this process has threads, which a forked one would miss: {threads}")
        time.sleep(0.01)


def _start(action: Callable[[], None], log: Path) -> Command:
    log.parent.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return Command(child)
    code = 70
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        action()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":  # commands.py FILE CONFIG [OPTION ...]: `peft-vit run` that also writes its events
    from peft_vit.cli import main

    write_events(Path(sys.argv[1]))
    sys.argv = ["peft-vit", "run", *sys.argv[2:]]
    main(sys.argv[1:])
