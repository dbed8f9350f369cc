"""What runs in the processes of a Ray cluster: an attempt at a run, and the channel between attempts and their driver.

torch is imported by attempts alone, so that the channel's process starts at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from peft_vit.core.records import RunSpec

if TYPE_CHECKING:
    from peft_vit.core.training import Checkpoints, Interrupted, Progress
    from peft_vit.runs.execute import Finished

_TELL_S = 0.5  # how often a task talks to the driver


class Channel:
    """Carries what tasks tell to the driver, beside whom it lives, and to them whether to stop."""

    def __init__(self) -> None:
        self._bundles: list[tuple[int, str]] = []
        self._arrived = asyncio.Event()
        self._stopping = False
        self._results: dict[int, Any] = {}

    async def keep(self, number: int, result: Any) -> None:
        """Keep what came of an attempt by several processes, from the first of them."""
        self._results[number] = result

    async def result(self, number: int) -> Any:
        """Return it, once."""
        return self._results.pop(number)

    async def report(self, number: int, bundle: str) -> bool:
        """Take what an attempt sends, which is not opened here; return whether it should stop."""
        self._bundles.append((number, bundle))
        self._arrived.set()
        return self._stopping

    async def take(self, wait_s: float, stopping: bool) -> list[tuple[int, str]]:
        """Return what was sent since the last call, once there is something or the time is over."""
        self._stopping = stopping
        if not self._bundles:
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), wait_s)
        bundles, self._bundles = self._bundles, []
        return bundles


@dataclass(frozen=True)
class Place:
    """What of the driver's surroundings matters to a task: relative paths start there, and checkpoints go there."""

    folder: str
    lock: Path
    lock_content: bytes | None

    def is_seen(self) -> bool:
        """Tell whether this process sees the driver's files: the content of a lock differs from driver to driver."""
        try:
            return self.lock_content is not None and self.lock.read_bytes() == self.lock_content
        except OSError:
            return False


@dataclass
class _Line:
    """A task's line to the driver: told in bundles, since a step may be shorter than a message."""

    channel: Any
    number: int
    should_stop: bool = False  # as far as it is known here
    _bundle: list[str | dict[str, Any]] = field(default_factory=list)
    _answer: ray.ObjectRef | None = None
    _exchanged: float = 0.0

    def report(self, message: str | Progress) -> None:
        """Send something, at the next occasion."""
        self._bundle.append(message if isinstance(message, str) else asdict(message))
        if time.monotonic() - self._exchanged > _TELL_S:
            self.exchange(wait=False)

    def exchange(self, *, wait: bool) -> None:
        """Take the answer to the last bundle, if it is there, and send the next one."""
        self._exchanged = time.monotonic()
        if self._answer is not None:
            if not wait and not ray.wait([self._answer], timeout=0)[0]:
                return
            answer, self._answer = self._answer, None
            with contextlib.suppress(RayError):  # the channel has died; what it knew was only for watching
                self.should_stop = ray.get(answer)
        if self._bundle:
            self._answer = self.channel.report.remote(self.number, json.dumps(self._bundle))
            self._bundle = []


def carry_out(
    channel: Any, number: int, spec: RunSpec, checkpoints: Checkpoints, place: Place
) -> Finished | Interrupted | None:
    """Do a run in one of Ray's worker processes, which may have done others of the study before.

    Returns:
        What came of it; None: this is not the first of its processes.
    """
    from peft_vit.core.training import Helped, Interrupted, processes
    from peft_vit.runs.execute import run_one
    from peft_vit.runs.executors.local import prepare_process

    prepare_process()
    if os.path.isdir(place.folder):
        os.chdir(place.folder)
    if processes.rank() > 0:
        with contextlib.suppress(Helped, Interrupted):
            run_one(spec)
        return None
    line = _Line(channel, number)
    node = ray.get_runtime_context().get_node_id()
    also = f", with {processes.count() - 1} more" if processes.count() > 1 else ""
    line.report(f"process {os.getpid()} on {platform.node()}, Ray's node {node[:12]}{also}")
    try:
        return run_one(
            spec,
            on_progress=line.report,
            checkpoints=checkpoints if place.is_seen() else None,
            should_stop=lambda: line.should_stop,
        )
    except Interrupted as interrupted:
        return interrupted
    finally:
        for _ in range(2):  # the answer to the last bundle, and to what has gathered meanwhile
            line.exchange(wait=True)


def carry_out_together(resources: dict[str, float], count: int, *attempt: Any) -> Finished | Interrupted:
    """Do a run with several of Ray's processes, wherever there is room for them; see `carry_out`.

    Raises:
        LostProcessError: if one of them is lost. Ray repeats nothing: the driver does, from the last checkpoint.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from peft_vit.core.training.processes import LIMIT_S, LostProcessError

    on_gpus = resources["GPU"] > 0
    with tempfile.TemporaryDirectory() as folder:  # where Ray keeps what our checkpoints are not among
        trainer = TorchTrainer(
            _take_part,
            train_loop_config={"attempt": attempt},
            scaling_config=ScalingConfig(num_workers=count, use_gpu=on_gpus, resources_per_worker=resources),
            torch_config=TorchConfig("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout_s=int(LIMIT_S)),
            run_config=RunConfig(storage_path=folder, failure_config=FailureConfig(max_failures=0)),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise LostProcessError(" ".join(str(error).split())) from None
    channel, number, *_ = attempt
    result: Finished | Interrupted = ray.get(channel.result.remote(number))
    return result


def _take_part(config: dict[str, Any]) -> None:
    import torch
    from ray.train.torch import get_device

    from peft_vit.core.training import processes

    if torch.cuda.is_available():
        torch.cuda.set_device(get_device())
    channel, number, *_ = config["attempt"]
    with processes.patiently():
        result = carry_out(*config["attempt"])
    if result is not None:
        ray.get(channel.keep.remote(number, result))
