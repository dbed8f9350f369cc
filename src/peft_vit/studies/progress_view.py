"""What a person sees of a study that runs: a table that moves, or plain lines where the output is no terminal."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from peft_vit.forecasting.time_limit import makespan
from peft_vit.studies.events import Notice, RunEnded, RunInterrupted, RunProgress, RunRetried, RunStarted, StudyEvent
from peft_vit.studies.plan import Plan, PlannedRun
from peft_vit.studies.printing import duration, open_console
from peft_vit.training import Progress

_PLAIN_EVERY_S = 30.0  # between two lines on one run, where the output is no terminal
_UNKNOWN = "–"


@dataclass
class _Running:
    """A run in progress, and the first that was heard of it: a resumed one does not begin with step 1."""

    run: PlannedRun
    told: float  # when the latest plain line was printed; all times are time.monotonic()
    first: tuple[int, float] | None = None  # step, time
    latest: Progress | None = None

    def left_s(self, now: float, pace: float) -> float:
        """Return the seconds that are left: at the run's own rate, or as planned before there is one.

        Until the first step a new process starts, which is no part of the plan.
        """
        planned = pace * self.run.estimate.seconds
        if self.first is None or self.latest is None:
            return planned
        (step, began), latest = self.first, self.latest
        if latest.step == step:
            return planned * (latest.total_steps - step) / latest.total_steps
        return (now - began) / (latest.step - step) * (latest.total_steps - latest.step)


class Watch:
    """Shows a study's progress; use as a context manager and hand `on_event` to the driver.

    Args:
        plan: what is done.
        console: where to show it.
        until: when the study is stopped, done or not, on time.monotonic(); None: it is not.
    """

    def __init__(self, plan: Plan, *, console: Console | None = None, until: float | None = None) -> None:
        self._until = until
        self._workers = plan.study.execution.workers
        self._console = open_console() if console is None else console
        self._waiting = {run.spec.name: run for run in plan.pending}
        self._count = len(self._waiting)
        self._running: dict[str, _Running] = {}
        self._taken_s = self._planned_s = 0.0  # of the runs that are done
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._console.is_dumb_terminal and self._waiting:
            self._live = Live(get_renderable=self._view, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def on_event(self, event: StudyEvent) -> None:
        """Take in what happened, and say it."""
        match event:
            case Notice():
                self._say(event.text)
            case RunStarted():
                self._started(event)
            case RunProgress():
                self._progress(event)
            case RunEnded():
                self._ended(event)
            case RunRetried():
                self._back(event.run)
                self._say_of(event.run, f"{event.record.error}; it is tried again")
            case RunInterrupted():
                self._back(event.run)
                when = f"after step {event.step}" if event.step else "before its first step"
                self._say_of(event.run, f"stopped {when}")

    def _say(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)

    def _say_of(self, run: PlannedRun, what: str) -> None:
        ended = self._count - len(self._waiting) - len(self._running)
        self._say(f"[{ended}/{self._count}] {run.spec.run_id}: {what}")

    def _back(self, run: PlannedRun) -> None:
        name = run.spec.name
        self._running.pop(name, None)
        self._waiting[name] = run

    def _started(self, event: RunStarted) -> None:
        name, now = event.run.spec.name, time.monotonic()
        self._waiting.pop(name, None)
        self._running[name] = _Running(event.run, told=now)
        if self._live is None:
            self._say_of(event.run, f"started on {event.worker}")

    def _progress(self, event: RunProgress) -> None:
        running = self._running.get(event.run.spec.name)
        if running is None:
            return
        now = time.monotonic()
        running.first = running.first or (event.progress.step, now)
        running.latest = event.progress
        if self._live is None and now - running.told >= _PLAIN_EVERY_S:
            running.told = now
            left = duration(running.left_s(now, self._pace()))
            step, *values = _cells(event.progress)
            names = ("loss", "validation", "mean rank", "mean bits")
            known = [f"{name} {value}" for name, value in zip(names, values, strict=True) if value != _UNKNOWN]
            self._say_of(event.run, f"{', '.join([f'step {step}', *known])}; {left} left")

    def _ended(self, event: RunEnded) -> None:
        self._running.pop(event.run.spec.name, None)
        record = event.record
        for warning in record.warnings:
            self._say_of(event.run, f"warning: {warning}")
        if record.status == "failed":
            self._say_of(event.run, f"FAILED, {record.error}")
            return
        self._taken_s += record.seconds
        self._planned_s += event.run.estimate.seconds
        left = f"; about {duration(self._left_s())} left" if self._waiting or self._running else ""
        validation = ""
        if record.validation is not None:
            probe = None if record.head_fit is None or record.spec.experiment.is_probe else record.head_fit.chosen
            its = "" if probe is None else f" (its linear probe {probe.accuracy:.1%})"  # on the same images
            validation = f"validation {record.validation.accuracy:.1%}{its}, "
        self._say_of(
            event.run,
            f"{validation}loss {record.steps[-1].loss:.3f}, {record.seconds:.0f} s, "
            f"{(record.peak_memory_bytes or 0) / 1e6:.0f} MB{left}",
        )

    def _pace(self) -> float:
        """Return how much longer runs took than they were planned to."""
        return self._taken_s / self._planned_s if self._planned_s else 1.0

    def _left_s(self) -> float:
        now, pace = time.monotonic(), self._pace()
        left_s = makespan(
            [pace * run.estimate.seconds for run in list(self._waiting.values())],
            max(self._workers, len(self._running)),  # on a cluster it shows how many there are
            busy=[running.left_s(now, pace) for running in list(self._running.values())],
        )
        return left_s if self._until is None else min(left_s, max(0.0, self._until - now))

    def _view(self) -> Group:
        """Return what a terminal shows now; called from the thread that refreshes it."""
        now, pace = time.monotonic(), self._pace()
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("run", no_wrap=True, overflow="ellipsis")
        for name in ("step", "left", "loss", "validation", "rank", "bits"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, running in list(self._running.items()):
            latest = running.latest
            cells = [_UNKNOWN] * 5 if latest is None else _cells(latest)
            table.add_row(name, cells[0], duration(running.left_s(now, pace)), *cells[1:])
        ended = self._count - len(self._waiting) - len(self._running)
        total = f"{ended} of {self._count} runs ended, about {duration(self._left_s())} left"
        return Group(*([table] if table.row_count else []), Text(total, style="bold"))


def _cells(progress: Progress) -> list[str]:
    """Return step, loss, validation accuracy, mean rank and mean bits."""
    return [
        f"{progress.step}/{progress.total_steps}",
        f"{progress.loss:.3f}",
        _UNKNOWN if progress.validation_accuracy is None else f"{progress.validation_accuracy:.1%}",
        _UNKNOWN if progress.mean_rank is None else f"{progress.mean_rank:.1f}",
        _UNKNOWN if progress.mean_bits is None else f"{progress.mean_bits:.1f}",
    ]
