"""What a fit says while it works; the command line, notebooks and pages listen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from peft_vit.base.console import duration


@dataclass(frozen=True)
class StageBegan:
    """A stage begins, with so many seconds left of the call's minutes."""

    title: str
    left_s: float

    def __str__(self) -> str:
        return f"{self.title}: {duration(max(0.0, self.left_s))} left"


@dataclass(frozen=True)
class Message:
    """What was found or decided, in a line."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Advanced:
    """So many of the things that a stage goes through are done: images, steps of a run."""

    what: str
    done: int
    count: int

    def __str__(self) -> str:
        return f"{self.what}: {self.done:,} of {self.count:,}"


FitEvent = StageBegan | Message | Advanced
Emit = Callable[[FitEvent], None]


def telling(say: Callable[[str], None]) -> Emit:
    """Return what says everything but how far something is, a line each."""
    return lambda event: None if isinstance(event, Advanced) else say(str(event))


print_event = telling(partial(print, flush=True))
