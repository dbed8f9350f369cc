"""What a person sees before and after a study: the plan as a table, and what an export did."""

from __future__ import annotations

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peft_vit.config import StudyConfig, file_bytes
from peft_vit.errors import printable
from peft_vit.evaluation import available_memory_bytes
from peft_vit.runs.export import Exported, said_loss
from peft_vit.runs.provenance import cpu_count
from peft_vit.statistics.sequential import Course
from peft_vit.studies.plan import Plan
from peft_vit.studies.time_limit import makespan

_PLAIN_WIDTH = 120  # columns where the output is no terminal


def open_console() -> Console:
    """Return the console of the standard output; where that is no terminal, lines are as wide as a table needs."""
    console = Console()
    return console if console.is_terminal else Console(width=_PLAIN_WIDTH)


_MERGED = {
    "float": "Updates added to float weights.",
    "offsets": "Updates moved into the groups' offsets; codes and scales stay.",
    "codes": "No groups, so weights and updates were quantized anew: not exact, see the accuracy.",
}


_ENDS = {"decided": "Decided.", "futile": "Stops: further seeds would hardly decide it.", "maximum": "Ends here."}


def print_export(done: Exported, file: Path) -> None:
    """Print what merging changed, how the file compares with the model that was trained, and where it lies."""
    print(_MERGED[done.merged.how])
    for stored, errors in done.merged.errors.items():
        worst = max(errors, key=errors.__getitem__)
        what = stored if stored == "codes" else f"{stored} offsets"
        print(f"  with {what}: relative error of the weights at most {errors[worst]:.1e} ({worst})")
    if done.merged.offset_dtype is not None:
        print(f"  stored: {done.merged.offset_dtype} offsets, as the run was configured")
    found = done.comparison
    if found is None:
        print(f"Not compared with the run's model, since its images are not there: {done.not_compared}")
    else:
        before, after = 100 * found.trained_accuracy, 100 * found.exported_accuracy
        print(
            f"The file against the run's model, {found.images} {found.split} images, {done.activations}: "
            f"{100 * found.same_predictions:.2f} % of predictions equal, logits within {found.logit_error:.1e} "
            f"relative, accuracy {before:.2f} % before and {after:.2f} % after"
        )
        if done.activations == "int8" or found.same_predictions < 1:
            print(f"Lost: {said_loss(found)}")
    print(f"{file}: {file_bytes(file) / 1e6:.1f} MB")


def course_line(course: Course, study: StudyConfig) -> str:
    """Return how a comparison with the control stands after its last look, and what follows."""
    stopping, look = study.stopping, course.looks[-1]
    assert stopping is not None
    questions = (
        (f"not worse by {stopping.margin or 0:g}", look.noninferiority, course.noninferiority),
        ("better", look.superiority, course.superiority),
    )
    said = [
        f"{what}? {verdict} (takes {_points(test.upper_bound)}; the opposite {_points(test.lower_bound)})"
        for what, test, verdict in questions
        if test is not None
    ]
    interval = f"[{_points(look.low)}, {_points(look.high)}]" if math.isfinite(look.high) else "without an interval yet"
    return (
        f"{course.name} minus {stopping.control}, {counted(look.pairs, 'pair')} of at most {len(study.seeds)}: "
        f"{_points(look.difference)} points {interval}. {'. '.join(said)}. "
        f"{f'Goes on to {course.next_look}.' if course.stopped is None else _ENDS[course.stopped]}"
    )


def _points(share: float) -> str:
    return f"{100 * share:+.2f}" if math.isfinite(share) else "more pairs"


def duration(seconds: float) -> str:
    """Return a time as a person says it: 12 s, 3.5 min, 2.1 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def counted(number: int, what: str) -> str:
    """Return a number of things: 1 run, 2 runs."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print every run with what it will take, and what all together will."""
    console = open_console() if console is None else console
    study, precision = plan.study, plan.precision
    console.print(
        f"[bold]{study.name}[/bold]: {study.backbone.model} ({study.backbone.weights} weights), {study.data.title} "
        f"at {study.data.image_size} px, {study.precision}, {counted(study.threads, 'thread')}"
    )
    if plan.runs[0].spec.smoke:
        console.print("[bold yellow]SMOKE: random weights and synthetic images; no number below means anything.[/]")
    elif study.backbone.weights == "random":
        console.print("[bold yellow]RANDOM WEIGHTS: nothing is pretrained in this study.[/]")
    if precision.note is not None:
        console.print(Text(precision.note), soft_wrap=True)
    if plan.bf16_factor is not None:
        slow = (
            f"BF16 MAY BE SLOW HERE: {precision.support.reason}; a matrix product takes {plan.bf16_factor:.1f} times "
            "as long as in fp32."
        )
        console.print(Text(slow, style="bold yellow"), soft_wrap=True)
    if study.threads > cpu_count():
        console.print(f"[bold yellow]threads: {study.threads} exceeds this machine's {cpu_count()} processors.[/]")
    console.print(f"Images: {plan.licence}")
    for line in plan.memory:
        console.print(Text(line), soft_wrap=True)
    for notice in plan.notices:  # they quote names of files, which may look like markup
        console.print(Text(printable(notice), style="bold yellow"), soft_wrap=True)
    table = Table()
    table.add_column("run", no_wrap=True)
    for name in ("steps", "seconds", "peak MB"):
        table.add_column(name, justify="right")
    table.add_column("known from")
    table.add_column("state")
    for run in plan.runs:
        table.add_row(
            f"{run.spec.experiment.name}/seed_{run.spec.seed}",
            str(run.total_steps),
            f"{run.estimate.seconds:.0f}",
            f"{run.estimate.peak_memory_bytes / 1e6:.0f}",
            run.estimate.basis,
            "done" if run.done else "to do",
        )
    console.print(table)
    workers, pending = study.execution.workers, plan.pending
    together = f" with {workers} workers" if workers > 1 else " one after the other" if len(pending) > 1 else ""
    seconds = makespan([run.estimate.seconds for run in pending], workers)
    time = f" in about {duration(seconds)}{together}" if pending else ""
    console.print(
        f"{counted(len(plan.runs), 'run')}: {len(pending)} to do{time}, "
        f"{len(plan.runs) - len(pending)} already done and skipped.",
        soft_wrap=True,
    )
    if not pending:
        return
    of = "at a time" if workers > 1 else "a run"
    memory = sum(sorted(run.estimate.peak_memory_bytes for run in pending)[-workers:])
    console.print(
        f"At most {memory / 1e9:.1f} GB of memory {of} ({available_memory_bytes() / 1e9:.1f} GB are free here).",
        soft_wrap=True,
        highlight=False,
    )
