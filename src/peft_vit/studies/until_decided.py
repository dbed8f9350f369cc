"""Runs a study look by look: as many seeds as the next look needs, of the comparisons that are open.

What there is to do follows from records and the declared looks alone, so a command that was killed goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from peft_vit.analysis.results import read_results
from peft_vit.analysis.stopping import courses
from peft_vit.analysis.studies import Study
from peft_vit.config import StudyConfig
from peft_vit.records.study_file import STUDY_FILE
from peft_vit.statistics.sequential import Course, next_look
from peft_vit.studies.execution import Execution, drive_plans, hold_locks
from peft_vit.studies.plan import plan_study
from peft_vit.studies.printing import course_line, print_plan
from peft_vit.studies.profiling import measure_step
from peft_vit.studies.time_limit import Limit


@dataclass(frozen=True)
class Decided:
    """What came of a call.

    Attributes:
        courses: of all comparisons with the control, as the records tell them now.
        failed: why runs have failed, by run id; comparisons wait for those of theirs and of the control.
    """

    courses: tuple[Course, ...]
    failed: dict[str, str]

    @property
    def open(self) -> tuple[str, ...]:
        """Return the experiments whose comparison has not stopped."""
        return tuple(one.name for one in self.courses if one.stopped is None)


def run_until_decided(
    study: StudyConfig,
    results_dir: Path,
    *,
    file: Path,
    execution: Execution | None = None,
    limit: Limit | None = None,
    tell: Callable[[str], None] = print,
) -> Decided:
    """Go from look to look until every comparison with the control has stopped, or the time is over.

    Args:
        study: with a section `stopping`; from a file, or built in memory.
        results_dir: its folder lies below it.
        file: the configuration file, named in errors.
        execution: how runs are carried out.
        limit: of time; what is not expected to end in it is not begun, and what then still runs writes a checkpoint.
        tell: told how a comparison stands, a line each, at the beginning and after each look.

    Raises:
        UserError: as `plan_study` and `drive`.
        KeyboardInterrupt: see `drive`.
    """
    execution = execution or Execution()
    failed: dict[str, str] = {}
    told: dict[str, Course] = {}
    asked: tuple[list[str], int] | None = None
    with hold_locks(results_dir, [study.name]) as (lock,):
        while True:
            found = courses(study, _recorded(lock.folder))
            for one in found:
                if one.looks and told.get(one.name) != one:
                    tell(course_line(one, study))
                told[one.name] = one
            before, asked = asked, _next(study, found, {run_id.split("/")[1] for run_id in failed})
            if not asked[0] or asked == before or (limit is not None and limit.left_s <= 0):
                break  # the same again: time for the rest of this look is missing
            names, seeds = asked
            whole = plan_study(study, results_dir, file=file, measure_step=partial(measure_step, tell=tell))
            plan = whole.seed_by_seed(names, study.seeds[:seeds])
            print_plan(plan)
            failed |= drive_plans([plan], [lock], execution, limit)
    return Decided(found, failed)


def _recorded(folder: Path) -> Study | None:
    """Return what a study's folder holds; None: nothing yet."""
    if not (folder / STUDY_FILE).exists():
        return None
    (study,) = read_results(folder).studies
    return study


def _next(study: StudyConfig, found: Sequence[Course], out: set[str]) -> tuple[list[str], int]:
    """Return who takes part in the next look, the control first, and how many seeds it takes; [] if nobody can.

    Args:
        study: the study.
        found: how comparisons stand.
        out: experiments that do not go on, in this call.
    """
    stopping = study.stopping
    assert stopping is not None
    able = set() if stopping.control in out else {one.name for one in found} - out
    at_it, seeds = next_look(found, able)
    return ([stopping.control, *at_it] if at_it else []), seeds
