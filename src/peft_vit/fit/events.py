"""What a fit says while it works; the command line, notebooks and pages listen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True)
class StageBegan:
    """A stage begins, with so many seconds left of the call's minutes."""

    title: str
    left_s: float

    def __str__(self) -> str:
        return f"{self.title}: {max(0.0, self.left_s) / 60:.1f} minutes are left"


@dataclass(frozen=True)
class Message:
    """What was found or decided, in a line."""

    text: str

    def __str__(self) -> str:
        return self.text


FitEvent = StageBegan | Message
Emit = Callable[[FitEvent], None]
print_event = partial(print, flush=True)  # an event as a line of a terminal
