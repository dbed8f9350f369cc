"""Studies: read all files, take all locks, plan everything, then carry out study by study."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from peft_vit.base.console import duration, progress
from peft_vit.base.errors import NothingDoneError, UserError, named
from peft_vit.base.files import folder_below
from peft_vit.core.config import StudyConfig, load_study
from peft_vit.lab.request import RunRequest
from peft_vit.runs.costs.time_limit import Limit
from peft_vit.runs.executors import EXECUTORS
from peft_vit.runs.records.progress import study_lock, study_status
from peft_vit.runs.scheduling.carry_out import carry_out

if TYPE_CHECKING:  # what plans and drives is loaded with the locks held: whoever comes too late leaves before torch
    from peft_vit.runs.scheduling.plan import Plan

_log = partial(print, flush=True)


@dataclass(frozen=True)
class _Requested:
    """A study of a command, and which of its runs are asked for."""

    study: StudyConfig
    file: Path
    seeds: list[int]


def plan_studies(request: RunRequest, *, profile: bool = False) -> None:
    """Check every study and print its plan; nothing is written.

    Args:
        request: studies, and which of their runs.
        profile: measure what runs cost of which nothing is known, instead of estimating it.

    Raises:
        UserError: for anything that would fail later.
    """
    _plan(request, _load(request), profile=profile)


def run_studies(request: RunRequest) -> dict[str, str]:
    """Print the plans, do every run that is asked for and not done, and return why runs have failed, by run id.

    Raises:
        UserError: before any run starts, for anything that would fail later or if another command works on one of
            the studies; later if there is no room for a result.
        NothingDoneError: if the time is over, and no run of any study is done.
        KeyboardInterrupt: see `drive`.
    """
    limit = None if request.minutes is None else Limit(request.minutes, time.monotonic())
    studies = _load(request)
    for requested in studies if not request.smoke else ():
        if requested.study.stopping is not None:  # here its comparisons would never stop
            reason = "is read by scripts of experiments/ alone; delete it to run every seed"
            raise UserError(reason, file=requested.file, field="stopping")
    with ExitStack() as stack:  # all locks are held from before planning on
        folders = [folder_below(request.results_dir, requested.study.name) for requested in studies]
        locks = [stack.enter_context(study_lock(folder)) for folder in folders]
        failed: dict[str, str] = {}
        nothing_done: list[NothingDoneError] = []
        for plan, lock in zip(_plan(request, studies), locks, strict=True):
            try:
                failed |= carry_out(
                    plan,
                    lock,
                    limit,
                    executor=request.executor,
                    ray_address=request.ray_address,
                    skip_failed=request.skip_failed,
                )
            except NothingDoneError as error:
                nothing_done.append(error)
        if len(nothing_done) == len(studies):
            raise nothing_done[0]
        if limit is not None:
            states = [run.state for lock in locks for run in study_status(lock.folder).runs]
            if left := states.count("pending") + states.count("running"):
                of = "the study's runs" if len(studies) == 1 else f"{len(states)} runs"
                more = f"the same command continues, for another {limit.minutes:g} minutes"
                print(f"Left: {left} of {of}; {more}.")
        return failed


def _load(request: RunRequest) -> list[_Requested]:
    """Return all studies, and refuse what can't be asked of one of them."""
    studies: dict[str, _Requested] = {}
    workers = 1 if EXECUTORS[request.executor].is_elastic else request.workers  # for the plan
    for file in request.configs:
        study = load_study(file)
        there = {str(seed): seed for seed in study.seeds}
        wanted = set(there) if request.seeds is None else {seed.strip() for seed in request.seeds.split(",")}
        with named(file):
            if study.name in studies:
                raise UserError(f"'{study.name}' names two of the given studies; rename one", field="name")
            if missing := wanted - there.keys():
                raise UserError(f"--seeds asks for {min(missing)!r}, the study has {study.seeds}", field="seeds")
            if request.method not in (None, *(experiment.method for experiment in study.experiments)):
                raise UserError(f"no experiment is of method {request.method}", field="experiments")
        if workers is not None:
            execution = study.execution.model_copy(update={"workers": workers})
            study = study.model_copy(update={"execution": execution})
        seeds = [seed for text, seed in there.items() if text in wanted]
        studies[study.name] = _Requested(study, file, seeds)
    return list(studies.values())


def _plan(request: RunRequest, studies: list[_Requested], *, profile: bool = False) -> list[Plan]:
    """Plan all studies before the first plan is printed."""
    plans = []
    with progress("planning"):  # from before torch is loaded, which takes seconds
        from peft_vit.runs.scheduling.display import print_plan
        from peft_vit.runs.scheduling.plan import plan_study
        from peft_vit.runs.scheduling.profiling import measure_costs, measure_step

        for requested in studies:
            study = requested.study
            if request.smoke:  # which has one seed, the first asked for
                study = study.model_copy(update={"seeds": tuple(requested.seeds)})
            plan = plan_study(
                study,
                request.results_dir,
                file=requested.file,
                smoke=request.smoke,
                measure=partial(measure_costs, log=_log) if profile else None,
                measure_step=partial(measure_step, log=_log),
            )
            experiments = [e.name for e in plan.study.experiments if request.method in (None, e.method)]
            plans.append(plan.only(experiments, requested.seeds, by_seed=request.minutes is not None))
    for plan in plans:
        print_plan(plan)
    if any(plan.pending for plan in plans) and (request.minutes is not None or len(plans) > 1):
        print(_within(plans, request.minutes))
    return plans


def _within(plans: list[Plan], minutes: float | None) -> str:
    """Return what is done of all plans in some minutes, or in an hour if nobody said how many; in their order."""
    waiting = [(run.estimate.seconds, plan.study.execution.workers) for plan in plans for run in plan.pending]
    ends_s = list(accumulate(seconds / workers for seconds, workers in waiting))
    limit = 60.0 if minutes is None else minutes
    fitting = sum(until_s <= 60 * limit for until_s in ends_s)
    if fitting == len(waiting):
        return f"All of it takes about {duration(ends_s[-1])}."
    left = f"about {fitting} of {len(waiting)} runs, and the same command does the other {len(waiting) - fitting} later"
    return f"All of it takes about {duration(ends_s[-1])}; --minutes {limit:g} does {left}."
