"""Where and how often a run keeps what it needs to go on after it was interrupted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Checkpoints:
    """Where checkpoints lie, and how often one is due.

    Attributes:
        folder: of the run; a checkpoint is a folder in it.
        every_s: seconds between two; 0: after every step.
    """

    folder: Path
    every_s: float = 30.0


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """A run was stopped on request.

    Attributes:
        step: which its newest checkpoint holds; 0 if there is none.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(step)
