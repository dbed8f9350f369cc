"""One run by the processes of `torchrun ... -m peft_vit.cli`: the first is the command, the others wait for its runs.

They meet in torchrun's store. The first, or a worker that it starts, writes there what a run is; the others do it with
it, again and again, until the command ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

import psutil

from peft_vit.base.errors import UserError
from peft_vit.base.place import ProcessPlace

if TYPE_CHECKING:  # the first process may refuse what was typed before it loads torch
    from torch.distributed import TCPStore

    from peft_vit.core.records import RunSpec
    from peft_vit.core.training import Member

_NUMBER, _ORDER = "peft_vit/runs", "peft_vit/run/{}"
_LOOK_S = 0.2  # how often a process looks for the next run, and for its parent


class Launch(ProcessPlace):
    """What torchrun says to a process in its environment."""

    def store(self) -> TCPStore:
        """Return torchrun's store."""
        from torch.distributed import TCPStore

        return TCPStore(self.host, self.port, is_master=False)

    def member(self, number: int) -> Member:
        """Return this process's place in a run."""
        from peft_vit.core.training import Member

        return Member(**asdict(self), name=f"peft_vit/meeting/{number}")


def launch() -> Launch | None:
    """Return how torchrun has started this process, or the one that it works for; None: it was not, or alone."""
    given = os.environ
    if "TORCHELASTIC_RUN_ID" not in given or given.get("WORLD_SIZE", "1") == "1":
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    rank, count, local_rank, local_count, port = (int(given[name]) for name in names)
    return Launch(rank, count, local_rank, local_count, given["MASTER_ADDR"], port)


def announce(launched: Launch, spec: RunSpec | None) -> Member:
    """Tell the others of a run, or with None that none follows; return the first process's place in it."""
    store = launched.store()
    number = store.add(_NUMBER, 1)
    store.set(_ORDER.format(number), "" if spec is None else spec.model_dump_json())
    return launched.member(number)


def at_parents_end(act: Callable[[], object], parent: int) -> None:
    """Do something in a thread once this process has another parent, since that one has ended."""

    def watch() -> None:
        while os.getppid() == parent and psutil.pid_exists(parent):  # on Windows none takes its place
            time.sleep(_LOOK_S)
        act()

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def leading(launched: Launch) -> Iterator[None]:
    """Be the command, and let the others end with it.

    Raises:
        UserError: if torchrun is gone, which ends the command as Ctrl-C does.
    """
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a script starts with & ignores it
    at_parents_end(_interrupt, parent)
    try:
        yield
    except KeyboardInterrupt:
        if os.getppid() == parent:
            raise
        raise UserError("was killed; the same command does what is left", file="torchrun") from None
    finally:
        if os.getppid() == parent:  # else nobody listens, which takes minutes to find out
            with suppress(RuntimeError):
                announce(launched, None)


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def help_first(launched: Launch) -> None:
    """Do the runs of the command with it, until it ends; the first process reports what fails, if it can.

    A signal to end stops a run in all processes, after a checkpoint.
    """
    from peft_vit.core.records import RunSpec
    from peft_vit.core.training import Helped, Interrupted
    from peft_vit.runs.execute import run_one
    from peft_vit.runs.executors.local import prepare_process

    prepare_process()
    store, number, signals = launched.store(), 1, list[int]()
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, lambda received, _: signals.append(received))
    at_parents_end(_interrupt, os.getppid())
    while not signals:
        with suppress(RuntimeError):
            if not store.check([_ORDER.format(number)]):
                time.sleep(_LOOK_S)
                continue
        try:
            order = store.get(_ORDER.format(number))
        except RuntimeError:  # torchrun is gone
            return
        if not order:
            return
        member, number = launched.member(number), number + 1
        with suppress(Helped, Interrupted):
            spec = RunSpec.model_validate_json(order)
            record = run_one(spec, should_stop=lambda: bool(signals), member=member).record
            if record.failure in ("out_of_memory", "io"):
                print(f"error: process {launched.rank} of {launched.count}: {record.error}", file=sys.stderr)
