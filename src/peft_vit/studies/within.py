"""Plans a study for a limited time: measures the machine, and takes the sizes, experiments and seeds that fit."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from peft_vit.backbones import describe
from peft_vit.config import ExecutorName, StudyConfig
from peft_vit.costs.estimate import Workload
from peft_vit.costs.pace import Pace, ReckonedPace
from peft_vit.data import ImageIndex, open_index
from peft_vit.errors import UserError, named
from peft_vit.records import checkpoint_folders, run_folder
from peft_vit.records.study_file import STUDY_FILE, Limited, read_study_file
from peft_vit.studies.plan import (
    Plan,
    PlannedRun,
    Within,
    decide_precision,
    plan_begun_study,
    spec_of,
    splits_of,
    workload_of,
)
from peft_vit.studies.printing import counted
from peft_vit.studies.profiling import measure_pace
from peft_vit.studies.sizes import Sizes, smaller_sizes, smaller_study, with_sizes
from peft_vit.studies.study_file import in_place_of, refuse_another
from peft_vit.studies.time_limit import (
    LATER_THAN_PLANNED,
    Choice,
    Deadline,
    Limit,
    can_decide,
    choose,
    makespan,
    seed_by_seed,
    seeds_for_verdict,
)

_MEASURED_S = 20.0  # at most, and at most a quarter of the time that is left
_DECIDED = 2  # experiments that are worth a smaller study

Measure = Callable[[StudyConfig, ImageIndex, Workload, float, Callable[[str], None]], Pace]


def plan_within(
    study: StudyConfig,
    results_dir: Path,
    limit: Limit,
    *,
    file: Path,
    tell: Callable[[str], None],
    measure: Measure = measure_pace,
) -> tuple[Plan, Deadline]:
    """Plan what a limited time is spent on; see `choose` for what comes first.

    A study that is begun now is cut down to sizes at which two experiments get enough seeds for a verdict. One that
    was begun goes on with its sizes, and with its experiments before further ones.

    Args:
        study: as its file says.
        results_dir: its folder lies below it.
        limit: the time that there is.
        file: the configuration file, named in errors.
        tell: told what is being done, a line each.
        measure: see `measure_pace`.

    Returns:
        The plan of the experiments that are taken, with all their seeds in the order in which they are started; and
        what keeps the time.

    Raises:
        UserError: for anything that would fail later, and if no sizes are small enough.
    """
    with named(file):
        return _plan_within(study, results_dir, limit, file, tell, measure)


def _plan_within(
    study: StudyConfig, results_dir: Path, limit: Limit, file: Path, tell: Callable[[str], None], measure: Measure
) -> tuple[Plan, Deadline]:
    folder = results_dir / study.name
    before = read_study_file(folder)
    precision = decide_precision(study, before)
    study = study.model_copy(update={"precision": precision.chosen})
    index = open_index(study.data)
    taken = study
    if before is not None and before.limited is not None and before.smaller_than_asked:
        refuse_another(before.limited.asked, study, folder / STUDY_FILE, file)  # of which the sizes may make no sense
        taken = smaller_study(study, before.configuration.data, index)
    first = () if before is None or before.limited is None else before.limited.first
    plan = plan_begun_study(taken, before, results_dir, file=file, limited=Limited(asked=study, first=first))
    begun = before is not None or any(run.done for run in plan.runs)
    may_shrink = not begun and can_decide(len(study.experiments), len(study.seeds))
    pace: Pace | None = None
    may_measure = may_shrink and not _fits(plan, limit)
    if may_measure or not all(_is_known(plan, run) for run in plan.runs):
        workload = _workload(taken, index)
        pace = _pace_of_records(plan, workload)
        # A probe takes little, known or not: for it alone nothing is measured.
        stepped = (run for run in plan.runs if not run.spec.experiment.is_probe)
        if pace is None and (may_measure or not all(_is_known(plan, run) for run in stepped)):
            pace = measure(taken, index, workload, min(_MEASURED_S, limit.left_s / 4), tell)
    if pace is not None and may_shrink:
        taken = _that_fits(study, index, pace, limit)
        if taken != study:
            plan = plan_begun_study(taken, before, results_dir, file=file, limited=Limited(asked=study, first=first))
    if pace is not None:
        plan = _at_pace(plan, pace, _workload(taken, index))
    plan = replace(plan, precision=precision)  # with the reason, which the plan of a decided one can't know
    return _choose(plan, study, results_dir, first, limit, 0.0 if pace is None else pace.process_s)


def _fits(plan: Plan, limit: Limit) -> bool:
    """Tell whether the study of a plan, of which nothing is done, needs no smaller sizes."""
    rows = _rows(plan, [one.name for one in plan.study.experiments])
    seconds = [[run.estimate.seconds for run in row] for row in rows]
    return choose(seconds, plan.study.execution.workers, limit.left_s).fits


def _rows(plan: Plan, names: Sequence[str]) -> list[list[PlannedRun]]:
    """Return a row an experiment, in it its runs in the order of the seeds."""
    return [[run for run in plan.runs if run.spec.experiment.name == name] for name in names]


def _is_known(plan: Plan, run: PlannedRun) -> bool:
    """Tell whether a run's time is known: from others that ended here, or measured alone for runs that go alone."""
    alone = plan.study.execution.workers == 1
    return run.estimate.basis == "records" or (run.estimate.basis == "calibration" and alone)


def _pace_of_records(plan: Plan, workload: Workload) -> Pace | None:
    """Return at what pace runs of the study ended here, at the median of its experiments; None: none did."""
    ended = {run.spec.experiment.name: run for run in plan.runs if run.estimate.basis == "records"}
    if not ended:
        return None
    unit = ReckonedPace(1.0)
    return ReckonedPace(
        statistics.median(unit.run_s(run.spec, workload) / run.estimate.seconds for run in ended.values())
    )


def _at_pace(plan: Plan, pace: Pace, workload: Workload) -> Plan:
    """Return the plan with the times of what was measured now, where nothing better is known."""

    def at_pace(run: PlannedRun) -> PlannedRun:
        if _is_known(plan, run):
            return run
        seconds = pace.run_s(run.spec, workload)
        return replace(run, estimate=replace(run.estimate, seconds=seconds, basis="calibration"))

    return replace(plan, runs=tuple(map(at_pace, plan.runs)))


def _workload(study: StudyConfig, index: ImageIndex) -> Workload:
    return workload_of(study, index, splits_of(index, study)[study.seeds[0]])


def _that_fits(study: StudyConfig, index: ImageIndex, pace: Pace, limit: Limit) -> StudyConfig:
    """Return the largest study of which two experiments get enough seeds for a verdict in the time that there is.

    Raises:
        UserError: if there is none, with the least time that would do.
    """
    classes = len(index.class_names)
    needed = seeds_for_verdict(_DECIDED, len(study.seeds))
    assert needed is not None
    full = Sizes.of(study.data, splits_of(index, study)[study.seeds[0]])
    patch_size = describe(study.backbone, full.image_size).size_step
    least_s = math.inf
    for sizes in smaller_sizes(full, patch_size, classes):
        try:
            smaller = smaller_study(study, with_sizes(study.data, full, sizes, classes), index)
            workload = _workload(smaller, index)
        except UserError:  # a class without an image, or a schedule that does not fit so few steps
            continue
        a_seed = [pace.run_s(spec_of(smaller, place, study.seeds[0]), workload) for place in range(_DECIDED)]
        seconds = LATER_THAN_PLANNED * makespan(needed * a_seed, study.execution.workers) + pace.process_s
        if seconds <= limit.left_s:
            return smaller
        least_s = min(least_s, seconds)
    spent_s = 60 * limit.minutes - limit.left_s
    minutes = math.ceil((least_s + spent_s) / 60 + 0.5)
    problem = f"{limit.minutes:g} are too few for a verdict, even on the smallest images: two experiments with {needed}"
    raise UserError(f"{problem} seeds each take {minutes} on this machine; give at least as many", field="--minutes")


def _choose(
    plan: Plan, asked: StudyConfig, results_dir: Path, first: tuple[str, ...], limit: Limit, process_s: float
) -> tuple[Plan, Deadline]:
    study, workers = plan.study, plan.study.execution.workers
    names = sorted((one.name for one in study.experiments), key=lambda name: name not in first)  # else the file's order
    rows = _rows(plan, names)
    left = {run.spec.name: share_left(results_dir, run) for run in plan.runs}
    seconds = [[left[run.spec.name] * run.estimate.seconds for run in row] for row in rows]
    begun = max((place for place, row in enumerate(rows, start=1) if any(run.done for run in row)), default=0)
    left_s = limit.left_s - process_s
    choice = choose(seconds, workers, left_s, at_least=len(first), begun=begun)
    taken = rows[: choice.experiments]
    expected = seed_by_seed(taken, choice.experiments, choice.seeds)
    within = Within(
        Limited(asked=asked, first=tuple(names[: choice.experiments])),
        frozenset(run.spec.name for run in expected),
        tuple(_lines(choice, names, study, asked, limit)),
    )
    ordered = seed_by_seed(taken, choice.experiments, len(study.seeds))
    deadline = Deadline(taken, workers, limit, left=left, begun=begun)
    return replace(plan, runs=tuple(ordered), within=within), deadline


def part_within(
    whole: Plan,
    results_dir: Path,
    names: Sequence[str],
    seeds: Sequence[int],
    executor: ExecutorName,
    limit: Limit | None,
) -> tuple[Plan, Deadline | None]:
    """Return the plan of some experiments and seeds, seed by seed so that pairs are complete early, and its deadline.

    Args:
        whole: of the study.
        results_dir: its folder lies below it.
        names: of the experiments, in the order in which their runs of a seed begin.
        seeds: in their order.
        executor: of the runs; on a cluster all may run at a time.
        limit: of time; None: there is no deadline.
    """
    runs = {(run.spec.experiment.name, run.spec.seed): run for run in whole.runs}
    rows = [[runs[name, seed] for seed in seeds] for name in names]
    plan = replace(whole, runs=tuple(seed_by_seed(rows, len(rows), len(seeds))))
    if limit is None:
        return plan, None
    workers = max(1, len(plan.runs)) if executor == "ray" else whole.study.execution.workers
    left = {run.spec.name: share_left(results_dir, run) for run in plan.runs}
    return plan, Deadline(rows, workers, limit, left=left, may_leave_out=False)


def share_left(results_dir: Path, run: PlannedRun) -> float:
    """Return the share of a run that is still to be done, by its newest checkpoint."""
    if run.done:
        return 0.0
    return 1 - max(checkpoint_folders(run_folder(results_dir, run.spec)), default=0) / run.total_steps


def _lines(choice: Choice, names: Sequence[str], study: StudyConfig, asked: StudyConfig, limit: Limit) -> list[str]:
    """Return what was taken, and what was left out and why."""
    seeds, there = choice.seeds, len(study.seeds)
    whole = choice.experiments == len(names) and seeds == there
    lines = []
    if study.data != asked.data:
        lines.append(f"Smaller than its file asks for, so that it fits: {in_place_of(study.data, asked.data)}.")
        if study.experiments != asked.experiments:
            lines.append("Schedules shrink with the number of steps.")
    what = f"{limit.minutes:g} minutes, {counted(choice.experiments, 'experiment')} x {seeds} of {there} seeds"
    if whole:
        return [*lines, f"{what}: all of the study."]
    lines.append(f"{what} expected ({', '.join(names[: choice.experiments])}), seed by seed.")
    if left_out := names[choice.experiments :]:
        lines.append(f"Left for a later call: {counted(len(left_out), 'experiment')} ({', '.join(left_out)}).")
    if choice.needed is None:
        lines.append("The study has too few seeds or experiments for a verdict; the time only bounds it.")
    elif seeds < choice.needed:
        lines.append(f"A verdict takes {choice.needed} seeds: not in this call, but in later ones.")
    else:
        lines.append(f"{choice.needed} seeds are enough for a verdict on each comparison with {names[0]}.")
    if not choice.fits and not seeds:
        lines.append("No run may end in this time; what is begun goes on in a later call.")
    return lines
