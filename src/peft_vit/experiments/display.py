"""What a person sees: the plan as a table, then live progress, or plain lines where the output is no terminal."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from peft_vit.experiments.executor import Event, RunEnded, RunProgress, RunStarted
from peft_vit.experiments.export import Exported
from peft_vit.experiments.plan import Plan
from peft_vit.experiments.provenance import cpu_count

_PLAIN_WIDTH = 120  # columns where the output is no terminal


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_PLAIN_WIDTH)


_MERGED = {
    "float": "Updates added to float weights.",
    "offsets": "Updates moved into the groups' offsets; codes and scales stay.",
    "codes": "No groups, so weights and updates were quantized anew: not exact, see the accuracy.",
}


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
            f"The file against the run's model, {found.images} validation images, float32: "
            f"{100 * found.same_predictions:.2f} % of predictions equal, logits within {found.logit_error:.1e} "
            f"relative, accuracy {before:.2f} % before and {after:.2f} % after"
        )
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


def print_plan(plan: Plan) -> None:
    """Print every run with its estimated seconds and peak memory, and the sum of what is left to do."""
    console = _console()
    study = plan.study
    console.print(
        f"[bold]{study.name}[/bold]: {study.backbone.model} ({study.backbone.weights} weights), {study.data.dataset} "
        f"at {study.data.image_size} px, {study.precision}, {study.threads} threads"
    )
    if plan.runs[0].spec.smoke:
        console.print("[bold yellow]SMOKE: random weights and synthetic images; no number below means anything.[/]")
    elif study.backbone.weights == "random":
        console.print("[bold yellow]RANDOM WEIGHTS: nothing is pretrained in this study.[/]")
    if study.threads > cpu_count():
        console.print(f"[bold yellow]threads: {study.threads} exceeds this machine's {cpu_count()} processors.[/]")
    console.print(f"Images: {plan.licence}")
    table = Table()
    table.add_column("run", no_wrap=True)
    for name in ("steps", "seconds", "peak MB"):
        table.add_column(name, justify="right")
    table.add_column("basis")
    table.add_column("state")
    for run in plan.runs:
        table.add_row(
            f"{run.spec.experiment.name}/seed_{run.spec.seed}", str(run.total_steps), f"{run.estimate.seconds:.0f}",
            f"{run.estimate.peak_memory_bytes / 1e6:.0f}", "measured" if run.estimate.measured else "estimate",
            "done" if run.done else "to do",
        )  # fmt: skip
    console.print(table)
    skipped = len(plan.runs) - len(plan.pending)
    minutes = sum(run.estimate.seconds for run in plan.pending) / 60
    console.print(
        f"{len(plan.runs)} runs: {len(plan.pending)} to do in about {minutes:.1f} minutes, "
        f"{skipped} already done and skipped."
    )


class Watch:
    """Shows a study's progress; use as a context manager and hand `on_event` to `execute`."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._console = _console()
        self._started = time.perf_counter()
        self._ended = 0
        self._bars: Progress | None = None
        self._all: TaskID | None = None
        self._one: TaskID | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and self._plan.pending:
            self._bars = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=self._console,
            )  # fmt: skip
            steps = sum(run.total_steps for run in self._plan.pending)
            self._all = self._bars.add_task("all steps", total=steps, note="")
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def on_event(self, event: Event) -> None:
        """Take in what happened."""
        if isinstance(event, RunStarted):
            if self._bars is not None:
                self._one = self._bars.add_task(event.run.spec.run_id, total=event.run.total_steps, note="loading")
        elif isinstance(event, RunProgress):
            self._progress(event)
        else:
            self._end(event)

    def _progress(self, event: RunProgress) -> None:
        if self._bars is None or self._one is None or self._all is None:
            return
        accuracy = event.progress.validation_accuracy
        validated = "" if accuracy is None else f", validation {accuracy:.1%}"
        before = self._bars.tasks[self._bars.task_ids.index(self._one)].completed
        self._bars.update(self._one, completed=event.progress.step, note=f"loss {event.progress.loss:.3f}{validated}")
        self._bars.advance(self._all, event.progress.step - before)

    def _end(self, event: RunEnded) -> None:
        self._ended += 1
        record = event.record
        if self._bars is not None and self._one is not None:
            self._bars.remove_task(self._one)
        elapsed = time.perf_counter() - self._started
        left = elapsed / self._ended * (len(self._plan.pending) - self._ended)
        place = f"[{self._ended}/{len(self._plan.pending)}]"
        for warning in record.warnings:
            line = f"{place} {record.spec.run_id}: warning: {warning}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        if record.status == "failed" or record.validation is None:
            self._console.print(f"{place} {record.spec.run_id}: FAILED, {record.error}", markup=False, highlight=False)
            return
        self._console.print(
            f"{place} {record.spec.run_id}: validation {record.validation.accuracy:.1%}, "
            f"loss {record.steps[-1].loss:.3f}, {record.seconds:.0f} s, "
            f"{(record.peak_memory_bytes or 0) / 1e6:.0f} MB; about {left / 60:.1f} min left",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
