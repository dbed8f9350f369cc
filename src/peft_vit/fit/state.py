"""A tuning that can be killed at any moment: what was asked, what was decided, what was tried, and the time it took."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from peft_vit.base.errors import UserError, checked
from peft_vit.base.files import read_bytes, write_whole
from peft_vit.fit.recipe import Recipe
from peft_vit.fit.tune_request import TuneRequest
from peft_vit.runs.costs.time_limit import Limit

TUNE_FILE, MODEL_FOLDER, STUDIES_FOLDER = "tune.json", "model", "studies"
SHARES = {"look": 0.02, "machine": 0.03, "sizes": 0.15}  # of the time; all else trains, and writes the model
TITLES = {
    "look": "your images",
    "machine": "time of a step",
    "sizes": "image sizes",
    "search": "recipes of LoRA",
    "folds": "the best on folds",
    "final": "last training",
    "output": "model and page",
}
_OVER = 0.1  # of the minutes, by which they may be exceeded
_Of = TypeVar("_Of")


class TuneFile(BaseModel):
    """Content of tune.json.

    `asked` may not change. `decided` holds what does not follow from records alone; of it `flips` and `compute` stay,
    since all runs share them. `recipes` are all that were tried. `seconds` are those of every call.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    schema_version: Literal[2] = 2
    asked: dict[str, Any]
    decided: dict[str, Any] = {}
    recipes: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}


def tuned_model(output: Path) -> Path | None:
    """Return the file of the model that a tuning has left in its output; None: there is none."""
    files = (output / MODEL_FOLDER / f"model{ending}" for ending in (".onnx", ".xml"))
    return next((file for file in files if file.is_file()), None)


@dataclass
class State:
    """What all stages share."""

    request: TuneRequest  # what was asked for
    tell: Callable[[str], None]  # told what is done and found, a line each
    limit: Limit  # the time of this call
    file: TuneFile  # what is kept
    clock: Callable[[], float] = field(default=time.monotonic)
    # nothing stands in the way any more; before, nothing is kept, so that another limit can be asked for
    begun: bool = False

    @classmethod
    def opened(
        cls, request: TuneRequest, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> State:
        """Begin, or continue with what the output holds.

        Raises:
            UserError: if it was begun with something else asked for, with the difference; or if it can't be read.
        """
        limit = Limit(request.minutes, clock(), clock)
        place = request.output / TUNE_FILE
        before = _read(place)
        if request.threads is None:
            from peft_vit.runs.machine import cpu_count  # with torch, which whoever asks a tuned file does without

            threads = cpu_count() if before is None else before.asked.get("threads")
            request = request.model_copy(update={"threads": threads})
        asked = json.loads(json.dumps(request.kept()))
        if before is None:
            return cls(request, tell, limit, TuneFile(asked=asked), clock)
        for option, value in asked.items():
            if before.asked.get(option) != value:
                raise UserError(
                    f"was begun with {_said(before.asked.get(option))}, and {_said(value)} is asked for now; set it "
                    "back, or choose another --output",
                    file=place,
                    field=f"--{option}" if option != "images" else "IMAGES",
                )
        return cls(request, tell, limit, before, clock, begun=True)

    @property
    def studies(self) -> Path:
        """Return the results directory of all studies."""
        return self.request.output / STUDIES_FOLDER

    def share_s(self, stage: str) -> float:
        """Return the seconds that a stage before training has of a call's time."""
        return 60 * self.request.minutes * SHARES[stage]

    @property
    def training_s(self) -> float:
        """Return the seconds of a call that training has, with the output."""
        return 60 * self.request.minutes * (1 - sum(SHARES.values()))

    @property
    def over_s(self) -> float:
        """Return the seconds by which a call may exceed its minutes."""
        return 60 * self.request.minutes * _OVER

    def until(self, reserved_s: float) -> Limit:
        """Return this call's limit, so many seconds earlier."""
        return Limit(self.limit.minutes - reserved_s / 60, self.limit.started, self.limit.clock)

    def once(self, name: str, decide: Callable[[], _Of]) -> _Of:
        """Return what was decided under a name, a plain value, or decide it now and keep it."""
        if name not in self.file.decided:
            self.file.decided[name] = json.loads(json.dumps(decide()))
            self.save()
        decided: _Of = self.file.decided[name]
        return decided

    def remember(self, recipe: Recipe) -> None:
        """Keep a recipe that is tried."""
        if (values := asdict(recipe)) not in self.file.recipes:
            self.file.recipes.append(values)
            self.save()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Say that a stage begins, and count its seconds, however it ends."""
        self.tell(f"{TITLES[name]}: {max(0.0, self.limit.left_s) / 60:.1f} minutes are left")
        started = self.clock()
        try:
            yield
        finally:
            self.file.seconds[name] = self.file.seconds.get(name, 0.0) + self.clock() - started
            self.save()

    def save(self) -> None:
        """Write tune.json, once the tuning has begun."""
        if self.begun:
            write_whole(self.request.output / TUNE_FILE, (self.file.model_dump_json(indent=1) + "\n").encode())


def _read(place: Path) -> TuneFile | None:
    try:
        with checked(place, "move it away, or choose another --output"):
            return TuneFile.model_validate_json(read_bytes(place))
    except FileNotFoundError:
        return None


def _said(value: Any) -> str:
    return " ".join(map(str, value if isinstance(value, list) else [value])) if value not in (None, []) else "none"
