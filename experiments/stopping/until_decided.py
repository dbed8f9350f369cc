"""Run only as many seeds of a study as the comparisons in its section `stopping` need to be decided.

    .venv/bin/python -m experiments.stopping.until_decided STUDY.yaml --output DIR [--minutes M]

It runs all experiments up to the first look, says how each comparison stands, and goes on with those that are open. The
same command continues. A run that fails leaves its comparison open until it is done. `peft-vit plan` says what all
seeds would take.

Exit codes: 0 every comparison has stopped, or --minutes are over and some run is done, 1 a run failed, or no run is
done in --minutes, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from experiments.stopping.comparisons import follow_study, stopping_of
from experiments.stopping.sequential import SequentialResult, next_look
from peft_vit import cli
from peft_vit.base.errors import UserError, named
from peft_vit.base.files import folder_below
from peft_vit.core.config import StudyConfig, load_study
from peft_vit.lab.analysis import Study, read_results
from peft_vit.runs.costs.time_limit import Limit
from peft_vit.runs.records.progress import study_lock
from peft_vit.runs.records.storage import STUDY_FILE
from peft_vit.runs.scheduling.carry_out import carry_out
from peft_vit.runs.scheduling.display import counted, print_plan
from peft_vit.runs.scheduling.plan import plan_study
from peft_vit.runs.scheduling.profiling import measure_step

_ENDS = {"decided": "Decided.", "futile": "Stops: further seeds would hardly decide it.", "maximum": "Ends here."}


def run_until_decided(
    study: StudyConfig, file: Path, results_dir: Path, limit: Limit | None, log: Callable[[str], None]
) -> tuple[dict[str, str], list[str]]:
    """Go from look to look until every comparison with the control has stopped, or the time is over.

    A look takes as many seeds as it needs, of the comparisons that are open. What there is to do follows from records
    and the declared looks alone, so a command that was killed continues.

    Args:
        study: with a section `stopping`.
        file: its own, for errors.
        results_dir: where its folder lies.
        limit: of time; what is not expected to end in it is not begun, and what then still runs writes a checkpoint.
        log: gets how a comparison stands, a line each, at the beginning and after each look.

    Returns:
        Why runs have failed, by run id: comparisons wait for those of theirs and of the control; and the experiments
        whose comparison has not stopped.

    Raises:
        UserError: as `stopping_of`, `plan_study` and `drive`; without a section `stopping`, or if the study was begun
            with other experiments or seeds.
        NothingDoneError: if the time is over, and no run of the study is done.
        KeyboardInterrupt: see `drive`.
    """
    with named(file):
        stopping = stopping_of(study)
        if stopping is None:
            reason = "is missing: it says what is compared, and after how many seeds; add it, or use peft-vit run"
            raise UserError(reason, field="stopping")
    control = stopping.control
    failed: dict[str, str] = {}
    reported: dict[str, SequentialResult] = {}
    look: tuple[list[str], int] | None = None
    with study_lock(folder_below(results_dir, study.name)) as lock:
        while True:
            recorded = None
            if (lock.folder / STUDY_FILE).exists():
                (recorded,) = read_results(lock.folder).studies
                _refuse_another(study, recorded, file)
            courses = follow_study(study, recorded)
            for course in courses:
                if recorded is not None and course.looks and reported.get(course.name) != course:
                    log(course_line(course, study, recorded.scores.unit))
                reported[course.name] = course
            out = {run_id.split("/")[1] for run_id in failed}  # they do not go on, in this call
            able = set() if control in out else {course.name for course in courses} - out
            before, look = look, next_look(courses, able)
            names, seeds = look
            time_is_over = limit is not None and limit.left_s <= 0 and before is not None  # one is begun in any case
            if not names or look == before or time_is_over:
                break  # the same again: time for the rest of this look is missing
            whole = plan_study(study, results_dir, file=file, measure_step=partial(measure_step, log=log))
            plan = whole.only([control, *names], study.seeds[:seeds], by_seed=True)
            print_plan(plan)
            failed |= carry_out(plan, lock, limit)
    return failed, [course.name for course in courses if course.stopped is None]


def _refuse_another(study: StudyConfig, recorded: Study, file: Path) -> None:
    """Refuse experiments and seeds that were not declared: they share one level, looks are in the order of seeds."""
    names = [experiment.name for experiment in study.experiments]
    for before in recorded.plan.configurations:
        if ([experiment.name for experiment in before.experiments], before.seeds) != (names, study.seeds):
            reason = "was begun with other experiments or seeds, for which its looks were declared"
            raise UserError(f"{reason}; set them back, or choose another --output", file=file, field="stopping")


def course_line(course: SequentialResult, study: StudyConfig, unit: str) -> str:
    """Return how a comparison with the control stands after its last look, and what follows."""
    stopping, look = stopping_of(study), course.looks[-1]
    assert stopping is not None
    questions = (
        (f"not worse by {stopping.margin or 0:g}", look.noninferiority, course.noninferiority),
        ("better", look.superiority, course.superiority),
    )
    answers = [
        f"{what}? {verdict} (takes {_points(test.upper_bound)}; the opposite {_points(test.lower_bound)})"
        for what, test, verdict in questions
        if test is not None
    ]
    interval = f"[{_points(look.low)}, {_points(look.high)}]" if math.isfinite(look.high) else "without an interval yet"
    return (
        f"{course.name} minus {stopping.control}, {counted(look.pairs, 'pair')} of at most {len(study.seeds)}: "
        f"{_points(look.difference)} {unit} {interval}. {'. '.join(answers)}. "
        f"{f'Continues to {course.next_look}.' if course.stopped is None else _ENDS[course.stopped]}"
    )


def _points(share: float) -> str:
    return f"{100 * share:+.2f}" if math.isfinite(share) else "more pairs"


def main(arguments: list[str] | None = None) -> None:
    """Run a study, and say what is open or has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a YAML file with a section `stopping`")
    parser.add_argument("--output", type=Path, required=True, help="the folder for results")
    parser.add_argument("--minutes", type=float, help="stop after so many")
    asked = parser.parse_args(arguments)
    if asked.minutes is not None and asked.minutes <= 0:
        parser.error("--minutes: expected a number above 0")
    limit = None if asked.minutes is None else Limit(asked.minutes, time.monotonic())
    with cli.user_errors():
        log = partial(print, flush=True)
        failed, still_open = run_until_decided(load_study(asked.study), asked.study, asked.output, limit, log)
        if still_open:
            print(f"Open: {', '.join(still_open)}; the same command continues.")
        for run_id, reason in failed.items():
            print(f"{run_id} failed: {reason}", file=sys.stderr)
        if failed:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
