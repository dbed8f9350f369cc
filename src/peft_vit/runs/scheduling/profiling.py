"""Measures what runs cost before they start: timing runs do a few real steps in worker processes, as runs do."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from peft_vit.base.errors import UserError
from peft_vit.core.records import RunRecord, RunSpec
from peft_vit.core.training import Progress
from peft_vit.runs.costs.estimate import RunCost
from peft_vit.runs.costs.memory_limit import StepCost
from peft_vit.runs.costs.timing_run import MeasuredCosts, cache_costs
from peft_vit.runs.executors import RunEnded, RunProgress, decode_images
from peft_vit.runs.executors.local import LocalExecutor
from peft_vit.runs.planned import PlannedRun

_NEVER_S = 1e9
_POLL_S = 0.5
_UNKNOWN = RunCost(0.0, 0, "estimate")

TimedProgress = list[tuple[Progress, float]]  # and when it was heard of, seconds


def measure_costs(kinds: Mapping[str, RunSpec], log: Callable[[str], None]) -> dict[str, MeasuredCosts]:
    """Measure, keep and return what runs of some kinds cost, one after the other.

    A kind that fails is reported and left out.

    Args:
        kinds: timing runs by the name of an experiment.
        log: gets what is being done, a line each.
    """
    measured = {}
    with _executor() as executor:
        for place, (name, kind) in enumerate(kinds.items(), start=1):
            log(f"measuring {place} of {len(kinds)}: {name}")
            record, progress = _carried_out(kind, executor)
            if record.status == "failed":
                log(f"{name} could not be measured ({record.error}); its time and memory are estimated")
                continue
            measured[name] = costs_of(record, progress)
            cache_costs(kind, measured[name])
    return measured


def costs_of(record: RunRecord, progress: TimedProgress) -> MeasuredCosts:
    """Return a run's costs from its record, and from when it was heard of each step and each validation.

    The first step is left out of the mean: it also allocates what the others find, and counts as part of the start.
    """
    steps: list[float] = []
    evaluations: list[float] = []
    for (previous, earlier), (latest, later) in itertools.pairwise(progress):
        (steps if latest.step > previous.step else evaluations).append(later - earlier)
    steps = steps or [record.steps[0].seconds]  # there is no other
    step_s = sum(steps) / len(steps)
    image_s = sum(evaluations) / len(evaluations) / record.split_sizes["validation"]
    many_times = len(record.steps) * step_s + sum(evaluations) + record.split_sizes["test"] * image_s
    return MeasuredCosts(
        start_s=max(0.0, record.seconds - many_times),
        step_s=step_s,
        image_s=image_s,
        peak_memory_bytes=record.peak_memory_bytes or 0,
        images=sum(record.split_sizes.values()),
    )


def measure_step(spec: RunSpec, log: Callable[[str], None]) -> StepCost | None:
    """Do a run of a few steps in a worker process of its own, as runs do; None: there was not enough memory for it.

    Args:
        spec: of the few steps.
        log: gets what is being done, a line.

    Raises:
        UserError: if it fails for another reason.
    """
    training = spec.experiment.training
    again = f"{training.recomputed_blocks or 'no'} block{'' if training.recomputed_blocks == 1 else 's'}"
    log(f"measuring {spec.experiment.method}: {training.images_at_once} at a time, {again} computed again")
    with _executor() as executor:
        record, _ = _carried_out(spec, executor)
        peak = executor.peak_memory_bytes()
    if record.failure in ("killed", "out_of_memory"):
        return None
    if record.status == "failed":
        raise UserError(f"a step could not be measured ({record.error})", field="training.memory_limit")
    assert record.bytes is not None
    return StepCost(
        step_s=min(row.seconds for row in record.steps[1:] or record.steps),
        peak_bytes=max(peak, record.peak_memory_bytes or 0),
        model_bytes=record.bytes.frozen_bytes + record.bytes.trainable_bytes,
    )


@contextmanager
def _executor() -> Iterator[LocalExecutor]:
    with tempfile.TemporaryDirectory() as folder, closing(LocalExecutor(1, Path(folder), _NEVER_S)) as executor:
        yield executor


def _carried_out(kind: RunSpec, executor: LocalExecutor) -> tuple[RunRecord, TimedProgress]:
    """Do a timing run and return what came of it.

    Raises:
        UserError: if an image is broken.
    """
    assert kind.data.train_images is not None
    run = PlannedRun(kind, kind.experiment.total_steps(kind.data.train_images), _UNKNOWN, done=False)
    decode_images([run])
    progress = TimedProgress()
    executor.submit(run)
    while True:
        event = executor.next_event(_POLL_S)
        if isinstance(event, RunProgress):
            progress.append((event.progress, time.perf_counter()))
        elif isinstance(event, RunEnded):
            return event.record, progress
