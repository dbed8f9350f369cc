"""An attempt at a run: what earlier ones have left in a checkpoint, and what this one leaves for the next."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from peft_vit.analysis.hypotheses import load_registry
from peft_vit.config import ExperimentConfig, QaLoraConfig
from peft_vit.errors import DataWarning, SilentNoEffectWarning, UnderflowWarning, UserError, first_fault, printable
from peft_vit.evaluation import MemoryWatch
from peft_vit.records import BitAllocation, HeadFit, Provenance, Registration, RunSpec
from peft_vit.training import CheckpointKeeper, Checkpoints, CheckpointWarning, ChosenBits, Interrupted, State

# What a record keeps of the warnings.
RECORDED = (SilentNoEffectWarning, UnderflowWarning, DataWarning, CheckpointWarning)
# Of what a run is made of: with another one it would be another run.
_THE_SAME = (
    "data_sha256",
    "split_sha256",
    "weights_name",
    "weights_sha256",
    "random_weights",
    "head_init_sha256",
    "data_order_sha256",
    "start_sha256",
)
# What carried it out: with another one the numbers may round otherwise.
_ALIKE = ("packages", "python", "processor", "device", "git_hash")


class Earlier(BaseModel):
    """What a checkpoint says of the attempts up to it, beside the training's state."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    spec_digest: str
    provenance: Provenance
    started_at: str
    seconds: float
    checkpoints_s: float
    warnings: list[str]
    peak_memory_bytes: int
    own_memory_bytes: int | None = None  # None in checkpoints of older versions, too
    bit_allocation: BitAllocation | None
    bits_s: dict[str, float]
    registration: Registration | None = None  # None in checkpoints of older versions
    head_fit: HeadFit | None = None


class Attempt:
    """What `run_one` knows of the run's past, and keeps for its future.

    Args:
        spec: what is attempted.
        checkpoints: where they lie; None: there are none and none are written.
        should_stop: asked between two steps.
        heard: the warnings so far, as `warnings.catch_warnings` collects them.
        registration: the hypotheses that stand written down now; None: those that come with the package.
    """

    def __init__(
        self,
        spec: RunSpec,
        checkpoints: Checkpoints | None,
        should_stop: Callable[[], bool] | None,
        heard: Sequence[warnings.WarningMessage],
        registration: Registration | None = None,
    ) -> None:
        self._spec_digest = spec.digest()
        self._keeper = None if checkpoints is None else CheckpointKeeper(checkpoints)
        self._folder = None if checkpoints is None else checkpoints.folder
        self._should_stop = should_stop
        self._heard = heard
        self._registration = load_registry().registration() if registration is None else registration
        self._started_at = datetime.now(UTC).isoformat(timespec="seconds")
        self._started = time.perf_counter()
        self._memory: MemoryWatch | None = None
        self._earlier: Earlier | None = None
        self._training: State | None = None
        self._source: Path | None = None
        self._provenance: Provenance | None = None
        self._bits: tuple[ChosenBits | None, dict[str, float]] = (None, {})
        self.head_fit: HeadFit | None = None  # how the head was fitted, by whichever attempt

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
            earlier = Earlier.model_validate(state.part("run").values)
            training = state.part("training")
        except ValidationError as error:
            raise self._foreign(*first_fault(error)) from None
        except (LookupError, TypeError) as error:
            raise self._foreign("state", f"{type(error).__name__}: {error}") from None
        if earlier.spec_digest != self._spec_digest:
            raise self._foreign("spec_digest", "it was made with another configuration")
        if earlier.provenance.data_sha256 != data_sha256:
            raise self._foreign("data_sha256", "it was made with other images under the same path")
        self._earlier, self._training, self._source = earlier, training, state.source
        self.head_fit = earlier.head_fit

    def _foreign(self, field: str | None, reason: str) -> UserError:
        step = 0 if self._keeper is None else self._keeper.step
        return UserError(
            f"the checkpoint of step {step} can't be gone on from: {reason}; remove the checkpoint-* folders there, "
            "and the run starts anew",
            file=self._folder,
            field=field,
        )

    def earlier_bits(self, experiment: ExperimentConfig) -> tuple[ChosenBits | None, dict[str, float]] | None:
        """Return the bits that an earlier attempt has chosen, and its seconds for it; None if there was none."""
        if self._earlier is None:
            return None
        record = self._earlier.bit_allocation
        qa_lora = experiment.section(QaLoraConfig)
        if record is None or qa_lora is None:
            return None, {}
        return ChosenBits.of_record(record, qa_lora), self._earlier.bits_s

    @property
    def goes_on(self) -> bool:
        """Return whether an earlier attempt has begun to train."""
        return self._earlier is not None

    @property
    def provenance(self) -> Provenance:
        """Return what the first attempt started from; known once it has begun."""
        assert self._provenance is not None
        return self._provenance

    def take_training(self) -> State | None:
        """Hand out the training's state, once: nothing of it is held here while the training goes on."""
        state, self._training = self._training, None
        return state

    # --- what is ----------------------------------------------------------------------------------------------------

    def watch_memory(self) -> MemoryWatch:
        """Begin to watch memory: before anything of the run is read, after the libraries that it needs."""
        self._memory = MemoryWatch()
        return self._memory

    def begin(self, provenance: Provenance, bits: ChosenBits | None, bits_s: dict[str, float]) -> Provenance:
        """Take note of what the training is about to start from.

        Returns:
            The provenance of the first attempt.

        Raises:
            UserError: if an earlier attempt started from something else.
        """
        self._bits, self._provenance = (bits, bits_s), provenance
        if self._earlier is None:
            return provenance
        first = self._earlier.provenance
        other = next((field for field in _THE_SAME if getattr(first, field) != getattr(provenance, field)), None)
        if other is not None:
            was, now = getattr(first, other), getattr(provenance, other)
            raise self._foreign(other, f"{was} when the run began, {now} now")
        if changes := _changes(first.model_dump(include=set(_ALIKE)), provenance.model_dump(include=set(_ALIKE))):
            step = 0 if self._keeper is None else self._keeper.step
            warnings.warn(
                f"the run went on from step {step} with {', '.join(changes)}; uninterrupted, its numbers may have "
                "rounded otherwise",
                CheckpointWarning,
                stacklevel=2,
            )
        self._provenance = first
        return first

    def between_steps(self, step: int, training: Callable[[], State]) -> None:
        """Keep a checkpoint if one is due, or if the run is to stop.

        Raises:
            Interrupted: if it is to stop.
            OSError: if the checkpoint can't be written.
        """
        stops = self._should_stop is not None and self._should_stop()
        if self._keeper is not None and step > 0 and (stops or self._keeper.is_due()):
            self._keeper.keep(step, lambda: State.of_parts(training=training(), run=State({}, self._left())))
        if stops:
            raise Interrupted(0 if self._keeper is None else self._keeper.step)

    def _left(self) -> dict[str, Any]:
        assert self._provenance is not None
        bits, bits_s = self._bits
        kept = Earlier(
            spec_digest=self._spec_digest,
            provenance=self._provenance,
            started_at=self.started_at,
            seconds=self.seconds,
            checkpoints_s=self.checkpoints_s,
            warnings=self.warnings,
            peak_memory_bytes=self.peak_memory_bytes,
            own_memory_bytes=self.own_memory_bytes,
            bit_allocation=None if bits is None else bits.record,
            bits_s=bits_s,
            registration=self.registration,
            head_fit=self.head_fit,
        )
        return kept.model_dump(mode="json")

    # --- what the record says of all attempts, as far as checkpoints tell ---------------------------------------------

    @property
    def gone_on_from(self) -> str:
        """Return what to add to an error that nobody has foreseen: where the attempt has gone on from, if it has."""
        if self._source is None:
            return ""
        return (
            f" (the run had gone on from {self._source}; if that was changed, remove the checkpoint-* folders there, "
            "and it starts anew)"
        )

    @property
    def started_at(self) -> str:
        """Return when the first attempt began, ISO 8601, UTC."""
        return self._started_at if self._earlier is None else self._earlier.started_at

    @property
    def registration(self) -> Registration | None:
        """Return the hypotheses that stood written down when the first attempt began; None: nobody looked."""
        return self._registration if self._earlier is None else self._earlier.registration

    @property
    def seconds(self) -> float:
        """Return the seconds up to now; what came after an attempt's last checkpoint is lost."""
        return time.perf_counter() - self._started + (0.0 if self._earlier is None else self._earlier.seconds)

    @property
    def checkpoints_s(self) -> float:
        """Return the seconds that checkpoints have taken."""
        now = 0.0 if self._keeper is None else self._keeper.seconds
        return now + (0.0 if self._earlier is None else self._earlier.checkpoints_s)

    @property
    def peak_memory_bytes(self) -> int:
        """Return the largest resident memory of the process up to now."""
        now = 0 if self._memory is None else self._memory.peak_bytes
        return max(now, 0 if self._earlier is None else self._earlier.peak_memory_bytes)

    @property
    def own_memory_bytes(self) -> int | None:
        """Return what of it the run itself has taken at most; None if it is not known of every attempt."""
        now = None if self._memory is None else self._memory.own_bytes
        if self._earlier is None or now is None:
            return now
        earlier = self._earlier.own_memory_bytes
        return None if earlier is None else max(now, earlier)

    @property
    def warnings(self) -> list[str]:
        """Return the warnings that belong into the record, each once: an attempt repeats those of the start.

        They may quote names of files, which may be any bytes, and a record is UTF-8.
        """
        now = [printable(str(entry.message)) for entry in self._heard if entry.category in RECORDED]
        return list(dict.fromkeys([*([] if self._earlier is None else self._earlier.warnings), *now]))


def _changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return what differs, as "name new in place of old"; mappings one level deep."""
    changes = []
    for name, new in after.items():
        old = before[name]
        if isinstance(new, dict) and isinstance(old, dict):
            changes += _changes(
                {key: old.get(key) for key in {**old, **new}}, {key: new.get(key) for key in {**old, **new}}
            )
        elif old != new:
            changes.append(f"{name} {new} in place of {old}")
    return changes
