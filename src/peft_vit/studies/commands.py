"""What the commands that run studies do: read all files, take all locks, plan everything, then drive study by study."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from peft_vit.config import StudyConfig, load_study
from peft_vit.errors import UserError, named
from peft_vit.records.study_file import read_study_file
from peft_vit.studies.execution import Execution, drive_plans, hold_locks

if TYPE_CHECKING:
    from peft_vit.studies.memory_limit import MeasureStep
    from peft_vit.studies.own_images import OwnImages
    from peft_vit.studies.plan import Plan
    from peft_vit.studies.time_limit import Limit


@dataclass(frozen=True)
class RunRequest:
    """What a command was asked for.

    Attributes:
        configs: files of studies.
        results_dir: a study's folder lies below it.
        smoke: compress the studies.
        method: only runs of this method; the others are skipped, not removed.
        seeds: only runs of these, as in 0,1,2.
        workers: in place of those that the studies set.
        calibrate: measure what runs cost of which nothing is known, instead of estimating it.
        minutes: that the command may take; runs come seed by seed, and what does not fit is left for a later one.
        until_decided: go from look to look of the study's `stopping`, and do what is still open.
    """

    configs: list[Path]
    results_dir: Path
    smoke: bool = False
    method: str | None = None
    seeds: str | None = None
    workers: int | None = None
    calibrate: bool = False
    minutes: float | None = None
    until_decided: bool = False


def plan_studies(request: RunRequest) -> None:
    """Check every study and print its plan; nothing is written.

    Raises:
        UserError: for anything that would fail later.
    """
    if request.until_decided:
        _until_decided(request, None)
    else:
        _limit(request)
        _plan(request, _load(request))


def run_studies(request: RunRequest, execution: Execution) -> dict[str, str]:
    """Print the plans, do every run that is asked for and not done, and return why runs have failed, by run id.

    Raises:
        UserError: before any run starts, for anything that would fail later or if another command works on one of
            the studies; later if there is no room for a result.
        KeyboardInterrupt: see `drive`.
    """
    if execution.executor == "ray":
        if request.workers is not None:
            problem = "has no effect with --executor ray, where as many runs go at a time as nodes have room for"
            raise UserError(f"{problem}; leave it out", field="--workers")
        request = replace(request, workers=1)  # for the plan
    if request.until_decided:
        return _until_decided(request, execution)
    limit = _limit(request)
    studies = _load(request)
    for study, file in studies if not request.smoke else ():
        _refuse_looks(study, file)
    with hold_locks(request.results_dir, [study.name for study, _ in studies]) as locks:
        failed = drive_plans(_plan(request, studies), locks, execution, limit)
        if limit is not None:
            _say_left(locks[0].folder, limit.minutes)
        return failed


def _say_left(folder: Path, minutes: float) -> None:
    """Say how many runs of a study that a command asked for it has not come to."""
    from peft_vit.studies.status import study_status

    left = sum(run.state in ("pending", "running") for run in study_status(folder).runs)
    if left:
        runs, them = ("1 run of the study is", "it") if left == 1 else (f"{left} runs of the study are", "them")
        print(f"{runs} left; the same command goes on with {them}, for another {minutes:g} minutes.")


def _limit(request: RunRequest) -> Limit | None:
    """Start the time that a command has; None: as long as it takes.

    Raises:
        UserError: if something else is asked for that it can't be combined with.
    """
    from peft_vit.studies.time_limit import Limit

    if request.minutes is None:
        return None
    _alone(request, "--minutes")
    if not 0 < request.minutes < math.inf:
        raise UserError(f"is {request.minutes:g}; give more than 0", field="--minutes")
    return Limit(request.minutes, time.monotonic())


def _alone(request: RunRequest, option: str, **whys: str) -> None:
    """Refuse what an option can't be combined with, and a second study."""
    for name, why in whys.items():
        if getattr(request, name) not in (None, False):
            raise UserError(f"can't be combined with --{name}: {why}; leave one of the two out", field=option)
    if len(request.configs) > 1:
        problem = f"is of one study, and {len(request.configs)} are given; give one, or leave {option} out"
        raise UserError(problem, field=option)


def _until_decided(request: RunRequest, execution: Execution | None) -> dict[str, str]:
    """Go from look to look; `execution` None: only plan all that may be needed."""
    option = "--until-decided"
    _alone(
        request,
        option,
        smoke="a smoke study has one seed",
        method="all comparisons share one level",
        seeds="the looks decide which seeds are taken",
    )
    limit = _limit(request)
    ((study, file),) = _load(request)
    if study.stopping is None:
        problem = f"is missing: it says what is compared, and after how many seeds; add it, or leave {option} out"
        raise UserError(problem, file=file, field="stopping")
    if execution is None:
        _plan(request, [(study, file)])
        return {}
    from peft_vit.studies.until_decided import run_until_decided

    decided = run_until_decided(study, request.results_dir, file=file, execution=execution, limit=limit)
    if decided.open:
        names = ", ".join(decided.open)
        more = "" if request.minutes is None else f", for another {request.minutes:g} minutes"
        print(f"Open: {names}; the same command goes on{more}.")
    return decided.failed


def _refuse_looks(study: StudyConfig, file: Path) -> None:
    """Refuse to run a study whose comparisons stop as if their number of seeds were fixed."""
    if study.stopping is not None:
        problem = "says when comparisons stop, which takes --until-decided; give that, or take the section out"
        raise UserError(f"{problem} to run every seed", file=file, field="stopping")


def run_on_own_images(request: OwnImages, results_dir: Path, *, smoke: bool = False) -> dict[str, str]:
    """Do one run on somebody's own images, beside those that the directory holds already; as `run_studies`."""
    from peft_vit.studies.own_images import STUDY_NAME, refuse_among_images, study_of
    from peft_vit.studies.plan import plan_begun_study

    refuse_among_images(request.folder, results_dir)
    with hold_locks(results_dir, [STUDY_NAME]) as locks:
        earlier = read_study_file(results_dir / STUDY_NAME)
        study, line = study_of(request, None if earlier is None else earlier.configuration)
        print(line)
        with named(request.folder):
            plan = plan_begun_study(
                study, earlier, results_dir, file=request.folder, smoke=smoke, part=True, measure_step=_measure_step()
            )
        _show(plan)
        return drive_plans([plan], locks, Execution())


def _load(request: RunRequest) -> list[tuple[StudyConfig, Path]]:
    studies = [(load_study(file), file) for file in request.configs]
    names = [study.name for study, _ in studies]
    for study, file in studies:
        if names.count(study.name) > 1:
            raise UserError(f"'{study.name}' names two of the given studies; rename one", file=file, field="name")
        _chosen_seeds(study, request.seeds, file)
        if request.method not in (None, *(experiment.method for experiment in study.experiments)):
            raise UserError(f"no experiment is of method {request.method}", file=file, field="experiments")
    if request.workers is None:
        return studies
    workers = {"workers": request.workers}
    return [
        (study.model_copy(update={"execution": study.execution.model_copy(update=workers)}), file)
        for study, file in studies
    ]


def _chosen_seeds(study: StudyConfig, seeds: str | None, file: Path) -> tuple[int, ...]:
    if seeds is None:
        return study.seeds
    there = {str(seed) for seed in study.seeds}
    wanted = {seed.strip() for seed in seeds.split(",")}
    if not wanted <= there:
        problem = f"--seeds asks for {min(wanted - there)!r}, the study has {study.seeds}"
        raise UserError(problem, file=file, field="seeds")
    return tuple(seed for seed in study.seeds if str(seed) in wanted)


def _plan(request: RunRequest, studies: list[tuple[StudyConfig, Path]]) -> list[Plan]:
    from peft_vit.studies.plan import plan_study
    from peft_vit.studies.profiling import measure_costs

    measure = partial(measure_costs, tell=partial(print, flush=True)) if request.calibrate else None
    plans = []
    for study, file in studies:
        seeds = _chosen_seeds(study, request.seeds, file)
        if request.smoke:  # it has one seed, the first asked for
            study = study.model_copy(update={"seeds": seeds})  # noqa: PLW2901
        plan = plan_study(
            study, request.results_dir, file=file, smoke=request.smoke, measure=measure, measure_step=_measure_step()
        )
        plan = plan.only(request.method, seeds)
        if request.minutes is not None:
            plan = plan.seed_by_seed([one.name for one in plan.study.experiments], seeds)
        plans.append(plan)
    for plan in plans:
        _show(plan)
    return plans


def _measure_step() -> MeasureStep:
    from peft_vit.studies.profiling import measure_step

    return partial(measure_step, tell=partial(print, flush=True))


def _show(plan: Plan) -> None:
    from peft_vit.studies.printing import print_plan

    print_plan(plan)
