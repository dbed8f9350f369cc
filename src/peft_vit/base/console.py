"""What a command shows while it works: a bar on a terminal, one line in a notebook, lines now and then in a pipe."""

from __future__ import annotations

import os
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.text import Text

FIRST_S, EVERY_S, SELDOM_S = 1.5, 10.0, 60.0  # of silence: before the first line, then between lines, and at last
_LONGER = 0.1  # silence over what has passed: in twenty minutes some forty lines
_PLAIN_WIDTH = 120  # columns where the output is no terminal
_BAR_WIDTH = 24
_OF_NOTEBOOK = "JPY_PARENT_PID"  # the environment of commands that a notebook's kernel starts


def duration(seconds: float) -> str:
    """Return a time as a person says it: 12 s, 3.5 min, 2.1 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def quoted(*words: str | Path) -> str:
    """Return words of a command as this system's shell takes them."""
    return (subprocess.list2cmdline if os.name == "nt" else shlex.join)([*map(str, words)])


def some_of(names: Sequence[str], most: int = 3) -> str:
    """Return names as a list in prose, the first of them where there are more: a, b, c and 4 more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def open_console(file: TextIO | None = None) -> Console:
    """Return the console of a stream, by default the standard output; in a pipe lines are as wide as a table needs.

    `!peft-vit` in a notebook isn't a terminal, since the notebook's file keeps each state of a bar.
    """
    from rich.console import Console

    console = Console(file=file, force_terminal=False if _OF_NOTEBOOK in os.environ else None)
    return console if console.is_terminal else Console(file=file, force_terminal=False, width=_PLAIN_WIDTH)


def print_lines(lines: Iterable[str | Text], console: Console | None = None) -> None:
    """Print lines as they are: names of files, which they may quote, may look like markup."""
    from rich.text import Text

    console = open_console() if console is None else console
    for line in lines:
        console.print(Text(line) if isinstance(line, str) else line, soft_wrap=True)


def bar(share: float | None, text: str) -> RenderableType:
    """Return a bar with a text; None: it is not known how much is done."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    row = Table.grid(padding=(0, 1))
    row.add_row(
        ProgressBar(1.0, share or 0.0, _BAR_WIDTH, pulse=share is None),
        Text(text, style="bold", no_wrap=True, overflow="ellipsis"),
    )
    return row


class ProgressDisplay:
    """Shows how far something is; a context manager.

    Args:
        view: what a terminal shows, drawn again four times a second below all lines.
        line: what is said elsewhere; None: nothing.
        console: where; None: of the standard output.
    """

    def __init__(
        self, view: Callable[[], RenderableType], line: Callable[[], str | None], console: Console | None = None
    ) -> None:
        self._view, self._line = view, line
        self.console = open_console() if console is None else console
        self._began = time.monotonic()
        self._printed_at = self._began - EVERY_S + FIRST_S
        self._finished, self._lock = threading.Event(), threading.RLock()
        self._live: Live | None = None
        self._in_notebook: Any = None  # the line that is rewritten

    @property
    def is_drawn(self) -> bool:
        """Return whether a terminal shows how far it is."""
        return self._live is not None

    def __enter__(self) -> Self:
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            from rich.live import Live

            self._live = Live(get_renderable=self._view, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        else:
            threading.Thread(target=self._break_silence, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finished.set()
        if self._live is not None:
            self._live.stop()

    def _break_silence(self) -> None:
        with suppress(OSError, SystemExit):  # nobody reads any more
            while not self._finished.wait(0.25):
                self.tick()

    def tick(self) -> None:
        """Say how far it is, where no terminal shows it and nothing was said for long."""
        with self._lock:
            now = time.monotonic()
            silence_s = min(max(EVERY_S, _LONGER * (now - self._began)), SELDOM_S)
            if self._live is None and now - self._printed_at >= silence_s and (line := self._line()):
                self._printed_at = now
                if self.console.is_jupyter:
                    self._rewrite(line)
                else:
                    print_lines([line], self.console)

    def _rewrite(self, line: str) -> None:
        """Show a line in the place of the one before."""
        from IPython.display import display

        shown = {"text/plain": line}
        if self._in_notebook is None:
            self._in_notebook = display(shown, raw=True, display_id=True)
        else:
            self._in_notebook.update(shown, raw=True)

    def say(self, line: str | Text) -> None:
        """Print a line as it is."""
        with self._lock:
            self._printed_at = time.monotonic()
            print_lines([line], self.console)


class OnProgress(Protocol):
    """Takes how many things are done, of how many; and, if `what` is under way has another name now, that."""

    def __call__(self, done: int, count: int, what: str | None = None) -> None:
        """Take it in."""


def no_progress(done: int, count: int, what: str | None = None) -> None:
    """Show nothing."""


@contextmanager
def progress(what: str, file: TextIO | None = None) -> Iterator[OnProgress]:
    """Show that something is under way, and give what takes how far it is; another count begins another part of it."""
    part, counts = what, (0, 0)
    started_at = progressed_at = time.monotonic()

    def status() -> str:
        (done, count), passed_s = counts, time.monotonic() - started_at
        if not done:
            return f"{part}, {duration(passed_s)} so far"
        return f"{part}: {done:,} of {count:,}, about {duration(passed_s * (count - done) / done)} left"

    def view() -> RenderableType:
        done, count = counts
        return bar(done / count if count else None, status())

    with ProgressDisplay(view, status, open_console(file)) as display:

        def on_progress(done: int, count: int, what: str | None = None) -> None:
            nonlocal part, counts, started_at, progressed_at
            if counts[1] not in (0, count) or done < counts[0]:
                started_at = progressed_at
            part, counts, progressed_at = what or part, (done, count), time.monotonic()
            display.tick()

        yield on_progress
