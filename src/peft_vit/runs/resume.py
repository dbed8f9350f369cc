"""An attempt at a run: what earlier ones have left in a checkpoint, and what this one leaves for the next."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from peft_vit.errors import DataWarning, SilentNoEffectWarning, UnderflowWarning, UserError, first_fault, printable
from peft_vit.evaluation import MemoryWatch
from peft_vit.records import BitAllocation, HeadFit, Provenance, RunSpec
from peft_vit.training import CheckpointKeeper, Checkpoints, CheckpointWarning, Interrupted, Overhead, State

# What a record keeps of the warnings.
RECORDED = (SilentNoEffectWarning, UnderflowWarning, DataWarning, CheckpointWarning)
# Of what a run is made of: with another one it would be another run.
_THE_SAME = (
    "data_sha256",
    "split_sha256",
    "weights_name",
    "weights_sha256",
    "config_sha256",
    "random_weights",
    "head_init_sha256",
    "data_order_sha256",
    "start_sha256",
)
# What carried it out: with another one the numbers may round otherwise.
_ALIKE = ("python", "processor", "device", "git_hash")  # and the packages' versions


class Known(BaseModel):
    """What is known of a run beside the training's state: of all its attempts, as far as checkpoints tell."""

    model_config = ConfigDict(extra="forbid")

    spec_digest: str
    started_at: str  # ISO 8601, UTC
    provenance: Provenance | None = None  # what training began with
    bit_allocation: BitAllocation | None = None
    head_fit: HeadFit | None = None
    seconds: float = 0.0  # what came after an attempt's last checkpoint is lost
    overhead_s: dict[str, float] = {"checkpoints": 0.0}
    warnings: list[str] = []
    peak_memory_bytes: int = 0
    own_memory_bytes: int | None = 0  # None: the system does not tell


class Attempt:
    """What `run_one` knows of the run's past, and keeps for its future.

    Args:
        spec: what is attempted.
        checkpoints: where they lie; None: there are none and none are written.
        should_stop: asked between two steps.
        heard: the warnings so far, as `warnings.catch_warnings` collects them.

    Attributes:
        known: of the attempts before, and what this one has found since; `so_far` brings its sums up to date.
        overhead: seconds by purpose, of all attempts.
    """

    def __init__(
        self,
        spec: RunSpec,
        checkpoints: Checkpoints | None,
        should_stop: Callable[[], bool] | None,
        heard: Sequence[warnings.WarningMessage],
    ) -> None:
        self._keeper = None if checkpoints is None else CheckpointKeeper(checkpoints)
        self._folder = None if checkpoints is None else checkpoints.folder
        self._should_stop = should_stop
        self._heard = heard
        self._started = time.perf_counter()
        self._memory: MemoryWatch | None = None
        self._training: State | None = None
        self._source: Path | None = None
        self.known = Known(spec_digest=spec.digest(), started_at=datetime.now(UTC).isoformat(timespec="seconds"))
        self.overhead = Overhead(self.known.overhead_s)

    # --- what was ---------------------------------------------------------------------------------------------------

    def look_back(self, data_sha256: str) -> None:
        """Read the newest checkpoint that is whole, if there is one.

        Raises:
            UserError: if it is of another configuration or other images.
        """
        state = None if self._keeper is None else self._keeper.newest()
        if state is None:
            return
        try:
            known = Known.model_validate(state.part("run").values)
            training = state.part("training")
        except ValidationError as error:
            raise self._foreign(*first_fault(error)) from None
        except (LookupError, TypeError) as error:
            raise self._foreign("state", f"{type(error).__name__}: {error}") from None
        if known.spec_digest != self.known.spec_digest:
            raise self._foreign("spec_digest", "it was made with another configuration")
        if known.provenance is None or known.provenance.data_sha256 != data_sha256:
            raise self._foreign("data_sha256", "it was made with other images under the same path")
        self.known, self.overhead = known, Overhead(known.overhead_s)
        self._training, self._source = training, state.source

    def _foreign(self, field: str | None, reason: str) -> UserError:
        return UserError(
            f"the checkpoint of step {self._step} can't be gone on from: {reason}; remove the checkpoint-* folders "
            "there, and the run starts anew",
            file=self._folder,
            field=field,
        )

    @property
    def _step(self) -> int:
        return 0 if self._keeper is None else self._keeper.step

    @property
    def goes_on(self) -> bool:
        """Return whether an earlier attempt has begun to train."""
        return self._source is not None

    def take_training(self) -> State | None:
        """Hand out the training's state, once: nothing of it is held here while the training goes on."""
        state, self._training = self._training, None
        return state

    # --- what is ----------------------------------------------------------------------------------------------------

    def watch_memory(self) -> MemoryWatch:
        """Begin to watch memory: before anything of the run is read, after the libraries that it needs."""
        self._memory = MemoryWatch()
        return self._memory

    def begin(self, provenance: Provenance) -> Provenance:
        """Take note of what the training is about to start from.

        Returns:
            The provenance of the first attempt.

        Raises:
            UserError: if an earlier attempt started from something else.
        """
        first = self.known.provenance
        if first is None:
            self.known.provenance = provenance
            return provenance
        other = next((field for field in _THE_SAME if getattr(first, field) != getattr(provenance, field)), None)
        if other is not None:
            was, now = getattr(first, other), getattr(provenance, other)
            raise self._foreign(other, f"{was} when the run began, {now} now")
        before, after = _tools(first), _tools(provenance)
        changes = [
            f"{name} {after.get(name)} in place of {before.get(name)}"
            for name in {**before, **after}
            if before.get(name) != after.get(name)
        ]
        if changes:
            warnings.warn(
                f"the run went on from step {self._step} with {', '.join(changes)}; uninterrupted, its numbers may "
                "have rounded otherwise",
                CheckpointWarning,
                stacklevel=2,
            )
        return first

    def between_steps(self, step: int, training: Callable[[], State]) -> None:
        """Keep a checkpoint if one is due, or if the run is to stop.

        Raises:
            Interrupted: if it is to stop.
            OSError: if the checkpoint can't be written.
        """
        stops = self._should_stop is not None and self._should_stop()
        if self._keeper is not None and step > 0 and (stops or self._keeper.is_due()):
            with self.overhead.of("checkpoints"):
                run = State({}, self.so_far().model_dump(mode="json"))
                self._keeper.keep(step, lambda: State.of_parts(training=training(), run=run))
        if stops:
            raise Interrupted(self._step)

    # --- what the record says of all attempts -------------------------------------------------------------------------

    @property
    def gone_on_from(self) -> str:
        """Return what to add to an error that nobody has foreseen: where the attempt has gone on from, if it has."""
        if self._source is None:
            return ""
        return (
            f" (the run had gone on from {self._source}; if that was changed, remove the checkpoint-* folders there, "
            "and it starts anew)"
        )

    def so_far(self) -> Known:
        """Return what is known now. Warnings stand there once: an attempt repeats those of the start.

        They may quote names of files, which may be any bytes, and a record is UTF-8.
        """
        known, memory = self.known, self._memory
        heard = [printable(str(entry.message)) for entry in self._heard if entry.category in RECORDED]
        now: dict[str, Any] = {
            "seconds": known.seconds + time.perf_counter() - self._started,
            "overhead_s": dict(self.overhead),
            "warnings": list(dict.fromkeys([*known.warnings, *heard])),
        }
        if memory is not None:
            own = (known.own_memory_bytes, memory.own_bytes)
            now["peak_memory_bytes"] = max(known.peak_memory_bytes, memory.peak_bytes)
            now["own_memory_bytes"] = None if own[0] is None or own[1] is None else max(own[0], own[1])
        return known.model_copy(update=now)


def _tools(provenance: Provenance) -> dict[str, Any]:
    return {**provenance.packages, **provenance.model_dump(include=set(_ALIKE))}
