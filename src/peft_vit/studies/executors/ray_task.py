"""What runs in the processes of a Ray cluster: an attempt at a run, and its line to the driver."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from peft_vit.records import RunSpec
from peft_vit.runs.execute import Finished, run_one
from peft_vit.studies.executors.worker import WeightsOnce, prepare_process
from peft_vit.training import Checkpoints, Interrupted, Progress

_TELL_S = 0.5  # how often a task talks to the driver


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


class _Line:
    """A task's line to the driver: told in bundles, since a step may be shorter than a message."""

    def __init__(self, channel: Any, number: int) -> None:
        self._channel = channel
        self._number = number
        self._bundle: list[str | dict[str, Any]] = []
        self._answer: ray.ObjectRef | None = None
        self._asked = 0.0
        self._stop = False

    def tell(self, message: str | Progress) -> None:
        """Tell something, at the next occasion."""
        self._bundle.append(message if isinstance(message, str) else asdict(message))
        if time.monotonic() - self._asked > _TELL_S:
            self._exchange(wait=False)

    def asked_to_stop(self) -> bool:
        """Tell whether the driver wants the run to be interrupted, as far as it is known here."""
        return self._stop

    def hang_up(self) -> None:
        """Return when everything has been told."""
        self._exchange(wait=True)
        self._exchange(wait=True)

    def _exchange(self, *, wait: bool) -> None:
        """Hear the answer to the last bundle, if it is there, and send the next one."""
        self._asked = time.monotonic()
        if self._answer is not None:
            if not wait and not ray.wait([self._answer], timeout=0)[0]:
                return
            answer, self._answer = self._answer, None
            with contextlib.suppress(RayError):  # the channel has died; what it knew was only for watching
                self._stop = ray.get(answer)
        if self._bundle:
            self._answer = self._channel.tell.remote(self._number, json.dumps(self._bundle))
            self._bundle = []


_weights_once = functools.cache(WeightsOnce)  # of this process


def carry_out(
    channel: Any, number: int, spec: RunSpec, checkpoints: Checkpoints, place: Place
) -> Finished | Interrupted:
    """Do a run in one of Ray's worker processes, which may have done others of the study before."""
    prepare_process()
    if os.path.isdir(place.folder):
        os.chdir(place.folder)
    line = _Line(channel, number)
    node = ray.get_runtime_context().get_node_id()
    line.tell(f"process {os.getpid()} on {platform.node()}, Ray's node {node[:12]}")
    try:
        return run_one(
            spec,
            on_progress=line.tell,
            checkpoints=checkpoints if place.is_seen() else None,
            should_stop=line.asked_to_stop,
            read=_weights_once(),
        )
    except Interrupted as interrupted:
        return interrupted
    finally:
        line.hang_up()
