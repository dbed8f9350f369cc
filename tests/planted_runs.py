"""Carries out runs at no cost: each ends with the test accuracy that was planted for it."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any

import planted
from small_methods import study_mapping

from peft_vit.core.config import DataConfig
from peft_vit.core.records import RunRecord
from peft_vit.data import open_index
from peft_vit.runs.executors import Event, RunEnded, RunStarted
from peft_vit.runs.planned import PlannedRun

ADAPTER = b"adapter"
IMAGES = 100_000  # so that a share of whole images is as good as the planted number


@cache
def _data_sha256(data: DataConfig) -> str:
    return open_index(data).sha256


class PlantedRuns:
    """An executor; `accuracy` tells it of an experiment and a seed, None: that run fails.

    Attributes:
        done: names of the runs that were carried out.
        left: so many may still be, before whoever waits is interrupted as by a second Ctrl-C.
    """

    def __init__(self, accuracy: Callable[[str, int], float | None]) -> None:
        self.accuracy = accuracy
        self.done: list[str] = []
        self.left = 10**9
        self._events: deque[Event] = deque()
        self._waiting: deque[PlannedRun] = deque()

    def submit(self, run: PlannedRun) -> None:
        self._waiting.append(run)

    def next_event(self, timeout_s: float) -> Event | None:
        if not self._events and self._waiting:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            run = self._waiting.popleft()
            record = self._record(run)
            self.done.append(f"{run.spec.experiment.name}/seed_{run.spec.seed}")
            self._events.append(RunStarted(run, "nobody"))
            self._events.append(RunEnded(run, record, ADAPTER if record.status == "done" else None))
        return self._events.popleft() if self._events else None

    def _record(self, run: PlannedRun) -> RunRecord:
        spec, accuracy = run.spec, self.accuracy(run.spec.experiment.name, run.spec.seed)
        own = {"spec": spec, "spec_digest": spec.digest(), "adapter_sha256": hashlib.sha256(ADAPTER).hexdigest()}
        if accuracy is None:
            failed = {"status": "failed", "failure": "error", "error": "it was planted", "adapter_sha256": None}
            return planted.record(spec.experiment, spec.seed, 0.5).model_copy(update={**own, **failed})
        images = {"data_sha256": _data_sha256(spec.data)}
        record = planted.record(spec.experiment, spec.seed, accuracy, provenance_changes=images)
        return record.model_copy(update={**own, "test": planted.metrics(accuracy, IMAGES)})

    def stop(self) -> None:
        self._waiting.clear()

    def close(self) -> None:
        self._waiting.clear()
        self._events.clear()


def study_of_loras(name: str, experiments: tuple[str, ...], seeds: int) -> dict[str, Any]:
    """Return the configuration of a study whose experiments differ in their rank."""
    training = {"steps": 6, "validate_every": 6, "batch_size": 12, "learning_rate": 1e-3}
    loras = [
        {"name": experiment, "method": "lora", "lora": {"rank": place}, "training": training}
        for place, experiment in enumerate(experiments, start=1)
    ]
    data = {"dataset": "digits", "image_size": 32, "train_images": 24, "validation_images": 20, "test_images": 20}
    return study_mapping(loras, range(seeds), name=name, data=data)
