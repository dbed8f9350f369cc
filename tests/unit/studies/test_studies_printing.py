"""What a person reads of a plan: times and numbers as one says them, and what is true of one worker and of two."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from peft_vit.studies.display import counted, duration, print_plan
from peft_vit.studies.plan import plan_study

pytestmark = pytest.mark.part("runner")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59.4, "59 s"), (90, "1.5 min"), (3599, "60.0 min"), (3600, "1.0 h"), (100_000, "27.8 h")],
)
def test_a_time_is_said_as_a_person_says_it(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_one_is_no_plural() -> None:
    assert (counted(0, "run"), counted(1, "run"), counted(2, "run")) == ("0 runs", "1 run", "2 runs")


def printed(plan) -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    print_plan(plan, console)
    return console.file.getvalue().splitlines()


def test_notices_stand_above_the_table_a_line_each_and_are_no_markup(study, tmp_path) -> None:
    plan = plan_study(study("linear"), tmp_path, file=tmp_path / "tiny.yaml")
    notices = ("Images: [red]a.png and \x1b[31mb.png " + "x" * 150, "Images: no test image is of class 'a'")
    lines = printed(replace(plan, notices=notices))
    place = lines.index("Images: [red]a.png and \\x1b[31mb.png " + "x" * 150)
    assert lines[place + 1] == notices[1]
    assert "linear/seed_0" not in "".join(lines[: place + 2])


def test_a_plan_sums_up_what_its_workers_take(study, tmp_path) -> None:
    plan = plan_study(study("linear", "lora"), tmp_path, file=tmp_path / "tiny.yaml")
    runs = tuple(
        replace(run, estimate=replace(run.estimate, seconds=seconds, peak_memory_bytes=memory))
        for run, seconds, memory in zip(plan.runs, (20.0, 70.0), (10**9, 3 * 10**9), strict=True)
    )
    alone = printed(replace(plan, runs=runs))
    assert alone[0].endswith("digits at 32 px, fp32, 1 thread")
    assert "2 runs: 2 to do in about 1.5 min one after the other, 0 already done and skipped." in alone
    assert alone[-1].startswith("At most 3.0 GB of memory a run (")
    two = plan.study.execution.model_copy(update={"workers": 2})
    together = printed(replace(plan, runs=runs, study=plan.study.model_copy(update={"execution": two})))
    assert "2 runs: 2 to do in about 1.2 min with 2 workers, 0 already done and skipped." in together
    assert together[-1].startswith("At most 4.0 GB of memory at a time (")
    last = replace(plan, runs=(runs[0], replace(runs[1], done=True)))
    assert "2 runs: 1 to do in about 20 s, 1 already done and skipped." in printed(last)
    done = replace(plan, runs=(replace(runs[0], done=True),))
    assert printed(done)[-1] == "1 run: 0 to do, 1 already done and skipped."
