"""What a person sees of a study: its plan, and its runs while they continue."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.table import Column, Table
from rich.text import Text

from peft_vit.base.console import ProgressDisplay, bar, duration, open_console, print_lines
from peft_vit.base.errors import printable
from peft_vit.core.adapters.footprint import available_memory_bytes
from peft_vit.core.records import RunRecord
from peft_vit.core.tasks import metric_of
from peft_vit.core.training import Progress
from peft_vit.runs.costs.time_limit import makespan
from peft_vit.runs.executors import Notice, RunEnded, RunInterrupted, RunProgress, RunRetried, RunStarted, StudyEvent
from peft_vit.runs.planned import Plan, PlannedRun
from peft_vit.runs.scheduling.deadline import RunTimes
from peft_vit.runs.this_machine.machine import cpu_count

_UNKNOWN = "–"
_WARNING = "bold yellow"


def counted(number: int, what: str) -> str:
    """Return a number of things: 1 run, 2 runs."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# --- before: the plan -------------------------------------------------------------------------------------------------


def plan_notes(plan: Plan) -> list[Text]:
    """Return what to know of a plan before believing or awaiting a number."""
    study, precision = plan.study, plan.precision
    notes = []
    if plan.runs[0].spec.smoke:
        smoke = "SMOKE: random weights and synthetic images; no number below means anything."
        notes.append(Text(smoke, style=_WARNING))
    elif study.backbone.weights == "random":
        notes.append(Text("RANDOM WEIGHTS: nothing is pretrained in this study.", style=_WARNING))
    if precision.emulated and plan.pending:
        notes.append(Text(f"BF16 MAY BE SLOW HERE: {precision.support.reason}.", style=_WARNING))
    if study.execution.workers * study.threads > cpu_count():
        at_once = f"workers x threads: {study.execution.workers} x {study.threads}"
        notes.append(Text(f"{at_once} exceeds this machine's {cpu_count()} processors.", style=_WARNING))
    return notes + [Text(line) for line in plan.memory] + [Text(printable(n), style=_WARNING) for n in plan.notices]


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print every run with what it will take, and what all together will."""
    console = open_console() if console is None else console
    study, workers, pending = plan.study, plan.study.execution.workers, plan.pending
    console.print(
        f"[bold]{study.name}[/bold]: {study.backbone.model} ({study.backbone.weights} weights), {study.data.title} "
        f"at {study.data.image_size} px, {study.precision}, {counted(study.threads, 'thread')}"
    )
    decided = filter(None, (plan.precision.note, plan.compute_note))
    print_lines([f"Images: {plan.licence}", *decided, *plan_notes(plan)], console)
    numbers = (Column(name, justify="right") for name in ("steps", "seconds", "peak MB"))
    table = Table(Column("run", no_wrap=True), *numbers, "known from", "state")
    for run in plan.runs:
        estimate, state = run.estimate, "done" if run.done else "to do"
        memory = f"{estimate.peak_memory_bytes / 1e6:.0f}"
        table.add_row(run.spec.name, str(run.total_steps), f"{estimate.seconds:.0f}", memory, estimate.basis, state)
    if len(plan.runs) > 1:
        console.print(table)
    together = f" with {workers} workers" if workers > 1 else " one after the other" if len(pending) > 1 else ""
    seconds = makespan([run.estimate.seconds for run in pending], workers)
    time = f" in about {duration(seconds)}{together}" if pending else ""
    done = len(plan.runs) - len(pending)
    console.print(
        f"{counted(len(plan.runs), 'run')}: {len(pending)} to do{time}, {done} already done and skipped.",
        soft_wrap=True,
    )
    if pending:
        peak = sum(sorted(run.estimate.peak_memory_bytes for run in pending)[-workers:]) / 1e9
        of = "at a time" if workers > 1 else "a run"
        free = f"{available_memory_bytes() / 1e9:.1f} GB are free here"
        print_lines([f"At most {peak:.1f} GB of memory {of} ({free})."], console)


# --- meanwhile --------------------------------------------------------------------------------------------------------


@dataclass
class _Running:
    """A run in progress."""

    run: PlannedRun
    said_at: float  # when the latest plain line was on it; all times are time.monotonic()
    started_at: float
    latest: Progress | None = None


class StudyProgress(ProgressDisplay):
    """Shows a study's progress; use as a context manager and hand `on_event` to the driver.

    What is left follows what the call has seen so far, see `RunTimes`, and is never more than what `until` leaves.

    Args:
        plan: what is done.
        results_dir: checkpoints lie below it, from which runs continue; None: there are none.
        console: where to show it.
        until: when the study is stopped, done or not, on time.monotonic(); None: it is not.
    """

    def __init__(
        self, plan: Plan, results_dir: Path | None = None, *, console: Console | None = None, until: float | None = None
    ) -> None:
        super().__init__(self._shown, self._of_the_quietest, console)
        self._until = math.inf if until is None else until
        self._notices = plan.notices
        self._since = time.monotonic()
        self._workers = plan.study.execution.workers
        self._waiting = {run.spec.name: run for run in plan.pending}
        self._count = len(self._waiting)
        self._running: dict[str, _Running] = {}
        self._times = RunTimes(plan.pending, results_dir)

    def _of_the_quietest(self) -> str | None:
        """Return how far the run is of which nothing was said for longest."""
        now = time.monotonic()
        running = min(list(self._running.values()), key=lambda running: running.said_at, default=None)
        if running is None:
            return None
        running.said_at = now
        if running.latest is None:
            said = f"getting ready (weights, features of the images) for {duration(now - running.started_at)}"
        else:
            step, *values = _cells(running.latest, running.run)
            names = ("loss", "validation", "mean rank", "mean bits")
            known = [f"{name} {value}" for name, value in zip(names, values, strict=True) if value != _UNKNOWN]
            said = ", ".join([f"step {step}", *known])
        left = f"about {self._left(now)[running.run.spec.name]} left"
        left += f", {duration(self._left_s(now))} for all" if self._count > 1 else ""
        return f"{self._place(running.run)}{said}; {left}"

    def _place(self, run: PlannedRun) -> str:
        return f"[{self._ended()}/{self._count}] {run.spec.run_id}: "

    def on_event(self, event: StudyEvent) -> None:
        """Take in what happened, and say it."""
        if isinstance(event, Notice):
            self.say(event.text)
            return
        run, now = event.run, time.monotonic()
        name = run.spec.name
        self._times.on_event(event, now)
        match event:
            case RunStarted():
                self._waiting.pop(name, None)
                self._running[name] = _Running(run, said_at=now, started_at=now)
                if not self.is_drawn:
                    self.say(f"{self._place(run)}started on {event.worker}")
            case RunProgress():
                if (running := self._running.get(name)) is not None:
                    running.latest = event.progress
                    self.tick()
            case RunEnded():
                self._running.pop(name, None)
                self._waiting.pop(name, None)  # of one that has never started
                for warning in event.record.warnings:
                    if not any(notice.startswith(warning) for notice in self._notices):  # which the plan has said
                        self.say(f"{self._place(run)}warning: {warning}")
                self.say(f"{self._place(run)}{self._outcome(run, event.record)}")
            case RunRetried() | RunInterrupted():
                self._running.pop(name, None)
                self._waiting[name] = run
                if isinstance(event, RunRetried):
                    what = f"{event.record.error}; it is tried again"
                else:
                    what = f"stopped after step {event.step}" if event.step else "stopped before its first step"
                self.say(f"{self._place(run)}{what}")

    def _outcome(self, run: PlannedRun, record: RunRecord) -> str:
        if record.status == "failed":
            return f"FAILED, {record.error}"
        left = f"; about {duration(self._left_s(time.monotonic()))} left" if self._waiting or self._running else ""
        validation = ""
        if record.validation is not None:
            metric = metric_of(record.spec)
            probe = None if record.head_fit is None or record.spec.experiment.is_probe else record.head_fit.chosen
            its = "" if probe is None else f" (its linear probe {metric.plain(metric.of(probe))})"  # on the same images
            validation = f"validation {metric.text(metric.of(record.validation))}{its}, "
        memory = f"{(record.peak_memory_bytes or 0) / 1e6:.0f} MB"
        return f"{validation}loss {record.steps[-1].loss:.3f}, {record.seconds:.0f} s, {memory}{left}"

    def _ended(self) -> int:
        return self._count - len(self._waiting) - len(self._running)

    def _left(self, now: float) -> dict[str, str]:
        """Return what is left of each run under way, by name."""
        most_s = max(0.0, self._until - now)
        return {name: duration(min(most_s, seconds)) for name, seconds in self._times.left_s(now).items()}

    def _left_s(self, now: float) -> float:
        busy = self._times.left_s(now).values()
        workers = max(self._workers, len(busy))  # on a cluster it shows how many there are
        left_s = makespan(self._times.whole_s(list(self._waiting.values()), now), workers, busy=busy)
        return min(left_s, max(0.0, self._until - now))

    def _shown(self) -> Group:
        """Return what a terminal shows now; called from the thread that refreshes it."""
        now = time.monotonic()
        names = ("step", "left", "loss", "validation", "rank", "bits")
        numbers = (Column(name, justify="right", no_wrap=True) for name in names)
        run = Column("run", no_wrap=True, overflow="ellipsis")
        table, left = Table(run, *numbers, box=None, pad_edge=False, header_style="dim"), self._left(now)
        for name, running in list(self._running.items()):
            latest = running.latest
            cells = [_UNKNOWN] * 5 if latest is None else _cells(latest, running.run)
            table.add_row(name, cells[0], left.get(name, _UNKNOWN), *cells[1:])
        left_s = self._left_s(now)
        share = (now - self._since) / max(1.0, now - self._since + left_s)
        total = bar(share, f"{self._ended()} of {self._count} runs ended, about {duration(left_s)} left")
        return Group(*([table] if table.row_count else []), total)


def _cells(progress: Progress, run: PlannedRun) -> list[str]:
    """Return step, loss, what decides on validation, mean rank if ranks change, and mean bits."""
    score, rank = progress.validation_score, progress.mean_rank
    if "adalora" not in run.spec.experiment.method:
        rank = None
    return [
        f"{progress.step}/{progress.total_steps}",
        f"{progress.loss:.3f}",
        _UNKNOWN if score is None else metric_of(run.spec).text(score),
        _UNKNOWN if rank is None else f"{rank:.1f}",
        _UNKNOWN if progress.mean_bits is None else f"{progress.mean_bits:.1f}",
    ]
