"""Times some real steps of a study's methods, at most for some seconds, in worker processes as its runs will have."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from peft_vit.backbones import describe
from peft_vit.config import MeasuresConfig, StudyConfig
from peft_vit.costs.cache import Costs
from peft_vit.costs.estimate import TIME_OUTSIDE_PRODUCTS, Workload, product_rate
from peft_vit.costs.pace import Pace, Probe
from peft_vit.costs.proxy_run import miniature
from peft_vit.costs.steadiness import Speed, disturbance, machine_speed
from peft_vit.data import ImageIndex
from peft_vit.errors import UserError
from peft_vit.records import RunRecord, RunSpec
from peft_vit.studies.events import Executor, RunEnded, RunProgress
from peft_vit.studies.executors import decode_images
from peft_vit.studies.executors.local import LocalExecutor
from peft_vit.studies.ledger import run_name
from peft_vit.studies.plan import PlannedRun, spec_of, splits_of
from peft_vit.studies.profiling import UNKNOWN, costs_of
from peft_vit.studies.sizes import smallest_image
from peft_vit.training import Progress

_NEVER_S = 1e9
_POLL_S = 0.5
_STEPS = 3  # of a probe; the first one counts as part of the start
_LONGEST_STEP_S = 1.2  # about: of a longer one the batch is cut down
_START_S, _PROCESS_S = 2.0, 10.0  # of a run and of a worker process, where nothing was measured
_TWICE = 2  # so many experiments are measured at two sizes


@dataclass(frozen=True)
class _Kind:
    """A run of a few steps that stands for those of some experiments."""

    names: tuple[str, ...]
    spec: RunSpec
    tokens: int


def measure_pace(
    study: StudyConfig,
    index: ImageIndex,
    workload: Workload,
    budget_s: float,
    tell: Callable[[str], None],
    speed: Callable[[], Speed] = machine_speed,
) -> Pace:
    """Measure what runs of a study cost; where not even one experiment could be measured, arithmetic has to do.

    The first two experiments are measured at the study's size and at the smallest that it may be cut down to, then
    the others at the study's, as long as there is time. As many runs go at a time as the study has workers. Nothing
    is kept.

    Args:
        study: as its file says.
        index: its images.
        workload: of the study.
        budget_s: seconds until the measurement ends, whatever it has found.
        tell: told what is being done, a line each.
        speed: measures how fast the machine is, before and after.
    """
    ends_at = time.monotonic() + budget_s
    workers = study.execution.workers
    tell(f"measuring steps of the study's methods, {budget_s:.0f} s at most")
    before = speed()
    probes: dict[str, list[Probe]] = {}
    process_s = 0.0
    with tempfile.TemporaryDirectory() as folder:
        executor = LocalExecutor(workers, study.threads, Path(folder), checkpoint_every_s=_NEVER_S, oversubscribe=True)
        try:
            for kind in _kinds(study, index, workload):
                started = time.monotonic()
                records, costs = _side_by_side(kind.spec, workers, executor, ends_at)
                if not costs:
                    if not records:  # it took too long
                        break
                    tell(f"{kind.names[0]} could not be measured ({records[0].error})")
                    continue
                if not probes:
                    process_s = max(0.0, time.monotonic() - started - max(record.seconds for record in records))
                found = Probe(
                    kind.spec.experiment.method, kind.tokens, kind.spec.experiment.training.batch_size, _mean(costs)
                )
                for name in kind.names:
                    probes.setdefault(name, []).append(found)
        finally:
            executor.close()
    if busy := disturbance(before, speed()):
        tell(f"the machine was busy ({busy}), so these times may be long; what finished runs take corrects them")
    if probes:
        return Pace(probes, process_s)
    tell("no experiment could be measured in this time; how fast matrices are multiplied has to do")
    return reckoned_pace(study, workload, product_rate(workload))


def reckoned_pace(study: StudyConfig, workload: Workload, rate: float) -> Pace:
    """Return what runs cost by how much they multiply, see `estimate_runs`.

    Args:
        study: whose first experiment stands for all.
        workload: of the study.
        rate: multiply-adds per second.
    """
    experiment = study.experiments[0]
    image_s = TIME_OUTSIDE_PRODUCTS * workload.shape.parameters * workload.tokens / rate
    batch_size = experiment.training.batch_size
    costs = Costs(
        start_s=_START_S,
        step_s=experiment.kind.forward_passes * batch_size * image_s,
        image_s=image_s,
        peak_memory_bytes=1,
        images=1,
    )
    return Pace({experiment.name: [Probe(experiment.method, workload.tokens, batch_size, costs)]}, _PROCESS_S)


def _kinds(study: StudyConfig, index: ImageIndex, workload: Workload) -> Iterator[_Kind]:
    """Yield what is measured, in this order: the first experiments, the same at the smallest size, the others."""
    patch_size = workload.shape.patch_size
    smallest = smallest_image(study.data.image_size, patch_size)
    large = _unlike(study, index, workload, study.data.image_size)
    yield from large[:_TWICE]
    if smallest < study.data.image_size:
        yield from _unlike(study, index, workload, smallest)[:_TWICE]
    yield from large[_TWICE:]


def _unlike(study: StudyConfig, index: ImageIndex, workload: Workload, image_size: int) -> list[_Kind]:
    """Return the miniatures of a study's experiments at some image size, one for all that differ in nothing else."""
    shape = describe(study.backbone, image_size)
    rate = product_rate(workload)
    splits = splits_of(index, study)[study.seeds[0]]
    names: dict[str, list[str]] = {}
    kinds: dict[str, RunSpec] = {}
    for place, experiment in enumerate(study.experiments):
        if experiment.is_probe:  # it takes no steps; its images are timed with those of the others
            continue
        spec = spec_of(study, place, study.seeds[0])
        training = experiment.training
        a_step = TIME_OUTSIDE_PRODUCTS * experiment.kind.forward_passes * shape.parameters * shape.tokens / rate
        batch_size = training.batch_size
        while batch_size > 1 and a_step * batch_size > _LONGEST_STEP_S:
            batch_size //= 2
        shorter = experiment.model_copy(update={"training": training.model_copy(update={"batch_size": batch_size})})
        data = spec.data.model_copy(update={"image_size": image_size})
        spec = spec.model_copy(update={"experiment": shorter, "data": data, "measures": MeasuresConfig()})
        total_steps = experiment.total_steps(len(splits.train))
        kind = miniature(spec, total_steps, shape, index, splits, at_most=_STEPS)
        few = max(2, min(batch_size, kind.data.validation_images))
        kind = kind.model_copy(
            update={"data": kind.data.model_copy(update={"validation_images": few, "test_images": few})}
        )
        digest = kind.digest()
        kinds[digest] = kind
        names.setdefault(digest, []).append(experiment.name)
    return [_Kind(tuple(names[digest]), kind, shape.tokens) for digest, kind in kinds.items()]


def _side_by_side(
    kind: RunSpec, workers: int, executor: Executor, ends_at: float
) -> tuple[list[RunRecord], list[Costs]]:
    """Run a miniature on all workers at the same time; return the records, and the costs of those that are done.

    Both are empty if it took too long.
    """
    assert kind.data.train_images is not None
    steps = kind.experiment.total_steps(kind.data.train_images)
    copies = [PlannedRun(kind.model_copy(update={"seed": copy}), steps, UNKNOWN, done=False) for copy in range(workers)]
    try:
        decode_images(copies[:1])  # of all: the split is fixed
    except UserError:
        return [], []
    for run in copies:
        executor.submit(run)
    seen: dict[str, list[tuple[Progress, float]]] = {run_name(run.spec): [] for run in copies}
    records: list[RunRecord] = []
    costs: list[Costs] = []
    while len(records) < workers:
        left_s = ends_at - time.monotonic()
        if left_s <= 0:
            return [], []
        event = executor.next_event(min(_POLL_S, left_s))
        if isinstance(event, RunProgress):
            seen[run_name(event.run.spec)].append((event.progress, time.perf_counter()))
        elif isinstance(event, RunEnded):
            records.append(event.record)
            if event.record.status == "done":
                costs.append(costs_of(event.record, seen[run_name(event.run.spec)]))
    return records, costs


def _mean(costs: list[Costs]) -> Costs:
    """Return what several runs that went side by side have cost each."""
    count = len(costs)
    return Costs(
        start_s=sum(one.start_s for one in costs) / count,
        step_s=sum(one.step_s for one in costs) / count,
        image_s=sum(one.image_s for one in costs) / count,
        peak_memory_bytes=max(one.peak_memory_bytes for one in costs),
        images=costs[0].images,
    )
