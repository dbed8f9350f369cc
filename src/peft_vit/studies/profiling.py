"""Measures what runs cost before they start: the miniature of each kind is run."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from peft_vit.costs.cache import Costs, keep_costs
from peft_vit.costs.estimate import Estimate
from peft_vit.costs.steadiness import Speed, disturbance, machine_speed
from peft_vit.records import RunRecord, RunSpec
from peft_vit.studies.events import Executor, RunEnded, RunProgress
from peft_vit.studies.executors import decode_images
from peft_vit.studies.executors.local import LocalExecutor
from peft_vit.studies.plan import PlannedRun
from peft_vit.training import Progress

_POLL_S = 1.0
_NEVER_S = 1e9
UNKNOWN = Estimate(0.0, 0, "estimate")


def measure_costs(
    kinds: Mapping[str, RunSpec], tell: Callable[[str], None], speed: Callable[[], Speed] = machine_speed
) -> dict[str, Costs]:
    """Measure, keep and return what runs of some kinds cost, one after the other in a worker process as runs are.

    A kind that fails is told and left out. What was measured while the machine was busy is used, but not kept.

    Args:
        kinds: miniatures by the name of an experiment.
        tell: told what is being done, a line each.
        speed: measures how fast the machine is, before and after each kind.
    """
    measured = {}
    before = speed()
    with tempfile.TemporaryDirectory() as folder:
        executor = LocalExecutor(1, 1, Path(folder), checkpoint_every_s=_NEVER_S, oversubscribe=True)
        try:
            for place, (name, kind) in enumerate(kinds.items(), start=1):
                tell(f"measuring {place} of {len(kinds)}: {name}")
                costs = _measure(kind, executor)
                after = speed()
                if isinstance(costs, str):
                    tell(f"{name} could not be measured ({costs}); its time and memory are estimated")
                else:
                    measured[name] = costs
                    if busy := disturbance(before, after):
                        tell(f"{name}: the machine was busy ({busy}); its time serves this plan and is not kept")
                    else:
                        keep_costs(kind, costs)
                before = after
        finally:
            executor.close()
    return measured


def _measure(kind: RunSpec, executor: Executor) -> Costs | str:
    """Return what a miniature took, or why it failed."""
    assert kind.data.train_images is not None
    run = PlannedRun(kind, kind.experiment.total_steps(kind.data.train_images), UNKNOWN, done=False)
    decode_images([run])
    executor.submit(run)
    seen: list[tuple[Progress, float]] = []
    while not isinstance(event := executor.next_event(_POLL_S), RunEnded):
        if isinstance(event, RunProgress):
            seen.append((event.progress, time.perf_counter()))
    if event.record.status == "failed":
        return event.record.error or "no error was recorded"
    return costs_of(event.record, seen)


def costs_of(record: RunRecord, seen: list[tuple[Progress, float]]) -> Costs:
    """Return a run's costs from its record, and from when it was heard of each step and each validation.

    The first step is left out of the mean: it also allocates what the others find, and counts as part of the start.
    """
    steps: list[float] = []
    evaluations: list[float] = []
    for (before, earlier), (now, later) in itertools.pairwise(seen):
        (steps if now.step > before.step else evaluations).append(later - earlier)
    steps = steps or [record.steps[0].seconds]  # there is no other
    step_s = sum(steps) / len(steps)
    image_s = sum(evaluations) / len(evaluations) / record.split_sizes["validation"]
    many_times = len(record.steps) * step_s + sum(evaluations) + record.split_sizes["test"] * image_s
    return Costs(
        start_s=max(0.0, record.seconds - many_times),
        step_s=step_s,
        image_s=image_s,
        peak_memory_bytes=record.peak_memory_bytes or 0,
        images=sum(record.split_sizes.values()),
    )
