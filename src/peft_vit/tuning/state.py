"""A tuning that can be killed at any moment: what was asked, what was decided, and the time that was spent."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from peft_vit.errors import UserError, checked
from peft_vit.forecasting.time_limit import Limit
from peft_vit.records import write_whole
from peft_vit.safe_io import read_bytes
from peft_vit.tuning.tune_request import TuneRequest

TUNE_FILE, MODEL_FOLDER, STUDIES_FOLDER = "tune.json", "model", "studies"
SHARES = {  # of the time; what a stage leaves is the race's
    "look": 0.02,
    "machine": 0.03,
    "probes": 0.15,
    "rates": 0.25,
    "race": 0.40,
    "final": 0.10,
    "output": 0.05,
}
_STAYS = {"tried": "steps", "probes": "image size", "rates": "learning rates"}  # of what is decided, in words
_ENDLESS_MINUTES = 1e6
_Of = TypeVar("_Of")


class TuneFile(BaseModel):
    """Content of tune.json.

    `asked` may not change. `decided` holds what does not follow from records alone, since it depended on the time that
    there was. `seconds` are those of every call.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    schema_version: Literal[1] = 1
    asked: dict[str, Any]
    decided: dict[str, Any] = {}
    seconds: dict[str, float] = {}


def tuned_model(output: Path) -> Path | None:
    """Return the file of the model that a tuning has left in its output; None: there is none."""
    files = (output / MODEL_FOLDER / f"model{ending}" for ending in (".onnx", ".xml"))
    return next((file for file in files if file.is_file()), None)


@dataclass
class State:
    """What all stages share.

    Attributes:
        request: what was asked for.
        tell: told what is done and found, a line each.
        limit: the time of this call.
        file: what is kept.
        begun: nothing stands in the way any more; before, nothing is kept, so that another limit can be asked for.
    """

    request: TuneRequest
    tell: Callable[[str], None]
    limit: Limit
    file: TuneFile
    clock: Callable[[], float] = field(default=time.monotonic)
    begun: bool = False

    @classmethod
    def opened(
        cls, request: TuneRequest, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> State:
        """Begin, or go on with what the output holds.

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
        if "compute" not in before.asked:  # an earlier version began it, in float
            before.asked["compute"], before.decided["compute"] = "auto", "float"
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

    def share_s(self, *stages: str) -> float:
        """Return the seconds that stages have of a call's time."""
        return 60 * self.request.minutes * sum(SHARES[stage] for stage in stages)

    def once(self, name: str, decide: Callable[[], _Of]) -> _Of:
        """Return what was decided under a name, a plain value, or decide it now and keep it."""
        if name not in self.file.decided:
            self.file.decided[name] = json.loads(json.dumps(decide()))
            self.save()
        found: _Of = self.file.decided[name]
        return found

    def tell_what_stays(self) -> None:
        """Say what a call that goes on does not choose anew, however many minutes it has."""
        stays = [words for name, words in _STAYS.items() if name in self.file.decided]
        if stays:
            said = ", ".join(stays[:-1]) + (" and " if stays[1:] else "") + stays[-1]
            self.tell(f"goes on: {said} stay as they were chosen; to choose anew, take another --output")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Say that a stage begins, and count its seconds, however it ends."""
        self.tell(f"{name}: {SHARES[name]:.0%} of the time, {max(0.0, self.limit.left_s) / 60:.1f} minutes are left")
        started = self.clock()
        try:
            yield
        finally:
            self.file.seconds[name] = self.file.seconds.get(name, 0.0) + self.clock() - started
            self.save()

    def begin(self) -> None:
        """Keep from now on what is asked for and decided."""
        self.begun = True
        self.save()

    @property
    def unlimited(self) -> Limit:
        """Return a limit that is never reached, for what has to be brought to its end."""
        return Limit(_ENDLESS_MINUTES, self.clock(), self.clock)

    def save(self) -> None:
        """Write tune.json, once the tuning has begun."""
        if not self.begun:
            return
        write_whole(self.request.output / TUNE_FILE, (self.file.model_dump_json(indent=1) + "\n").encode())


def _read(place: Path) -> TuneFile | None:
    try:
        with checked(place, "move it away, or choose another --output"):
            return TuneFile.model_validate_json(read_bytes(place))
    except FileNotFoundError:
        return None


def _said(value: Any) -> str:
    return (
        "none" if value is None or value == [] else " ".join(map(str, value)) if isinstance(value, list) else str(value)
    )
