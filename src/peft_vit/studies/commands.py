"""What the commands that run studies do: read all files, take all locks, plan everything, then drive study by study."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from peft_vit.config import ExecutorName, StudyConfig, load_study
from peft_vit.errors import UserError
from peft_vit.forecasting.time_limit import Limit
from peft_vit.records.study_file import STUDY_FILE, read_study_file
from peft_vit.safe_io import folder_below
from peft_vit.studies.deadline import Deadline
from peft_vit.studies.lock import StudyLock, study_lock
from peft_vit.studies.status import study_status

if TYPE_CHECKING:  # what plans and drives is loaded with the locks held: whoever comes too late leaves before torch
    from peft_vit.statistics.sequential import Course
    from peft_vit.studies.plan import Plan
    from peft_vit.studies.request import TrainRequest

_say = partial(print, flush=True)


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


@dataclass(frozen=True)
class Execution:
    """How runs are carried out, beyond what the studies say; see `open_executor` and `drive`."""

    executor: ExecutorName = "local"
    ray_address: str | None = None
    oversubscribe: bool = False
    skip_failed: bool = False


def plan_studies(request: RunRequest) -> None:
    """Check every study and print its plan; nothing is written.

    Raises:
        UserError: for anything that would fail later.
    """
    _plan(request, _load(request))


def run_studies(request: RunRequest, execution: Execution) -> dict[str, str]:
    """Print the plans, do every run that is asked for and not done, and return why runs have failed, by run id.

    Raises:
        UserError: before any run starts, for anything that would fail later or if another command works on one of
            the studies; later if there is no room for a result.
        KeyboardInterrupt: see `drive`.
    """
    limit = None if request.minutes is None else Limit(request.minutes, time.monotonic())
    if execution.executor == "ray":
        if request.workers is not None:
            problem = "has no effect with --executor ray, where as many runs go at a time as nodes have room for"
            raise UserError(f"{problem}; leave it out", field="--workers")
        request = replace(request, workers=1)  # for the plan
    studies = _load(request)
    if request.until_decided:
        ((study, file, _),) = studies
        failed, still_open = run_until_decided(
            study, request.results_dir, file=file, execution=execution, limit=limit, tell=_say
        )
        if still_open:
            more = "" if limit is None else f", for another {limit.minutes:g} minutes"
            print(f"Open: {', '.join(still_open)}; the same command goes on{more}.")
        return failed
    for study, file, _ in studies if not request.smoke else ():
        if study.stopping is not None:  # its comparisons would stop as if their number of seeds were fixed
            problem = "says when comparisons stop, which takes --until-decided; give that, or take the section out"
            raise UserError(f"{problem} to run every seed", file=file, field="stopping")
    with _locked(request.results_dir, [study.name for study, _, _ in studies]) as locks:
        failed = {}
        for plan, lock in zip(_plan(request, studies), locks, strict=True):
            failed |= _drive(plan, lock, execution, limit)
        if limit is not None:
            left = sum(run.state in ("pending", "running") for run in study_status(locks[0].folder).runs)
            if left:
                runs, them = ("1 run of the study is", "it") if left == 1 else (f"{left} runs of the study are", "them")
                print(f"{runs} left; the same command goes on with {them}, for another {limit.minutes:g} minutes.")
        return failed


def run_on_own_images(request: TrainRequest) -> dict[str, str]:
    """Do one run on somebody's own images, beside those that the output holds already; as `run_studies`."""
    from peft_vit.studies.own_images import STUDY_NAME, refuse_among_images, study_of
    from peft_vit.studies.plan import plan_study
    from peft_vit.studies.printing import print_plan
    from peft_vit.studies.profiling import measure_step

    refuse_among_images(request.images, request.output)
    with _locked(request.output, [STUDY_NAME]) as (lock,):
        earlier = read_study_file(lock.folder)
        study, line = study_of(request, None if earlier is None else earlier.configuration)
        print(line)
        plan = plan_study(
            study,
            request.output,
            file=request.images,
            smoke=request.smoke,
            part=True,
            measure_step=partial(measure_step, tell=_say),
        )
        print_plan(plan)
        return _drive(plan, lock, Execution())


def run_until_decided(
    study: StudyConfig,
    results_dir: Path,
    *,
    file: Path,
    execution: Execution,
    limit: Limit | None = None,
    tell: Callable[[str], None],
) -> tuple[dict[str, str], list[str]]:
    """Go from look to look until every comparison with the control has stopped, or the time is over.

    A look takes as many seeds as it needs, of the comparisons that are open. What there is to do follows from records
    and the declared looks alone, so a command that was killed goes on.

    Args:
        study: with a section `stopping`; from a file, or built in memory.
        results_dir: its folder lies below it.
        file: the configuration file, named in errors.
        execution: how runs are carried out.
        limit: of time; what is not expected to end in it is not begun, and what then still runs writes a checkpoint.
        tell: told how a comparison stands, a line each, at the beginning and after each look.

    Returns:
        Why runs have failed, by run id: comparisons wait for those of theirs and of the control; and the experiments
        whose comparison has not stopped.

    Raises:
        UserError: as `plan_study` and `drive`.
        KeyboardInterrupt: see `drive`.
    """
    from peft_vit.analysis.results import read_results
    from peft_vit.analysis.stopping import courses
    from peft_vit.statistics.sequential import next_look
    from peft_vit.studies.plan import plan_study
    from peft_vit.studies.printing import course_line, print_plan
    from peft_vit.studies.profiling import measure_step

    assert study.stopping is not None
    control = study.stopping.control
    failed: dict[str, str] = {}
    told: dict[str, Course] = {}
    asked: tuple[list[str], int] | None = None
    with _locked(results_dir, [study.name]) as (lock,):
        while True:
            recorded = None
            if (lock.folder / STUDY_FILE).exists():
                (recorded,) = read_results(lock.folder).studies
            found = courses(study, recorded)
            for course in found:
                if course.looks and told.get(course.name) != course:
                    tell(course_line(course, study))
                told[course.name] = course
            out = {run_id.split("/")[1] for run_id in failed}  # they do not go on, in this call
            able = set() if control in out else {course.name for course in found} - out
            names, seeds = next_look(found, able)
            before, asked = asked, (names, seeds)
            if not names or asked == before or (limit is not None and limit.left_s <= 0):
                break  # the same again: time for the rest of this look is missing
            whole = plan_study(study, results_dir, file=file, measure_step=partial(measure_step, tell=tell))
            plan = whole.only([control, *names], study.seeds[:seeds], by_seed=True)
            print_plan(plan)
            failed |= _drive(plan, lock, execution, limit)
    return failed, [course.name for course in found if course.stopped is None]


@contextmanager
def _locked(results_dir: Path, names: list[str]) -> Iterator[list[StudyLock]]:
    """Hold all locks, from before planning on."""
    with ExitStack() as stack:
        yield [stack.enter_context(study_lock(folder_below(results_dir, name))) for name in names]


def _drive(plan: Plan, lock: StudyLock, execution: Execution, limit: Limit | None = None) -> dict[str, str]:
    """Do what a plan says is pending, and show it; see `drive`.

    With a limit what is not expected to end in it is not begun, and what then still runs writes a checkpoint.
    """
    from peft_vit.studies.executors import open_executor
    from peft_vit.studies.progress_view import Watch
    from peft_vit.studies.scheduler import drive

    results_dir = lock.folder.parent
    make_executor = partial(
        open_executor,
        execution.executor,
        plan,
        results_dir,
        oversubscribe=execution.oversubscribe,
        ray_address=execution.ray_address,
    )
    deadline = None if limit is None else Deadline(plan, results_dir, limit, execution.executor)
    with Watch(plan, until=None if limit is None else limit.over_at) as watch:
        return drive(plan, lock, make_executor, watch.on_event, skip_failed=execution.skip_failed, deadline=deadline)


def _load(request: RunRequest) -> list[tuple[StudyConfig, Path, list[int]]]:
    """Return all studies with their files and the seeds that are asked for.

    Raises:
        UserError: for what can't be asked for together or of one of them.
    """
    if request.until_decided:
        for name, asked, why in (
            ("smoke", request.smoke, "a smoke study has one seed"),
            ("method", request.method is not None, "all comparisons share one level"),
            ("seeds", request.seeds is not None, "the looks decide which seeds are taken"),
        ):
            if asked:
                problem = f"can't be combined with --{name}: {why}; leave one of the two out"
                raise UserError(problem, field="--until-decided")
    for option, given in (("--until-decided", request.until_decided), ("--minutes", request.minutes is not None)):
        if given and len(request.configs) > 1:
            problem = f"is of one study, and {len(request.configs)} are given; give one, or leave {option} out"
            raise UserError(problem, field=option)
    if request.minutes is not None and not 0 < request.minutes < math.inf:
        raise UserError(f"is {request.minutes:g}; give more than 0", field="--minutes")
    loaded = [(load_study(file), file) for file in request.configs]
    names = [study.name for study, _ in loaded]
    studies = []
    for study, file in loaded:
        if names.count(study.name) > 1:
            raise UserError(f"'{study.name}' names two of the given studies; rename one", file=file, field="name")
        there = {str(seed): seed for seed in study.seeds}
        wanted = set(there) if request.seeds is None else {seed.strip() for seed in request.seeds.split(",")}
        if not wanted <= there.keys():
            problem = f"--seeds asks for {min(wanted - there.keys())!r}, the study has {study.seeds}"
            raise UserError(problem, file=file, field="seeds")
        if request.method not in (None, *(experiment.method for experiment in study.experiments)):
            raise UserError(f"no experiment is of method {request.method}", file=file, field="experiments")
        if request.until_decided and study.stopping is None:
            problem = "is missing: it says what is compared, and after how many seeds; add it, or leave --until-decided"
            raise UserError(f"{problem} out", file=file, field="stopping")
        if request.workers is not None:
            execution = study.execution.model_copy(update={"workers": request.workers})
            study = study.model_copy(update={"execution": execution})  # noqa: PLW2901
        studies.append((study, file, [seed for text, seed in there.items() if text in wanted]))
    return studies


def _plan(request: RunRequest, studies: list[tuple[StudyConfig, Path, list[int]]]) -> list[Plan]:
    """Plan all studies before the first plan is printed."""
    from peft_vit.studies.plan import plan_study
    from peft_vit.studies.printing import print_plan
    from peft_vit.studies.profiling import measure_costs, measure_step

    plans = []
    for study, file, seeds in studies:
        if request.smoke:  # it has one seed, the first asked for
            study = study.model_copy(update={"seeds": tuple(seeds)})  # noqa: PLW2901
        plan = plan_study(
            study,
            request.results_dir,
            file=file,
            smoke=request.smoke,
            measure=partial(measure_costs, tell=_say) if request.calibrate else None,
            measure_step=partial(measure_step, tell=_say),
        )
        names = [one.name for one in plan.study.experiments if request.method in (None, one.method)]
        plans.append(plan.only(names, seeds, by_seed=request.minutes is not None))
    for plan in plans:
        print_plan(plan)
    return plans
