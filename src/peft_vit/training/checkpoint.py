"""Checkpoints: what a training depends on beside its settings, and the files that hold it.

Files are written whole or not at all, checked before they are used, never unpickled. A checkpoint is a folder
`checkpoint-<step>` in the run's folder::

    tensors.safetensors   tensors
    state.json            plain values, the tensors' order and layout in memory, and the SHA-256 of all that

It is written under another name, flushed to disk and renamed, so that a kill at any instant leaves the one before. The
last two are kept. The layout is kept too: a product may round otherwise if a factor lies otherwise in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_vit.adapters import current_ranks, set_ranks, trained_tensors
from peft_vit.errors import UserError, first_fault, is_out_of_memory
from peft_vit.records import checkpoint_folders, flush, make_folder
from peft_vit.safe_io import read_bytes, sha256_of

TENSORS_FILE = "tensors.safetensors"
STATE_FILE = "state.json"
_FORMAT = 2
_KEPT = 2
_UNFINISHED = ".checkpoint-"  # begins the names of folders that are being written
_SHARE = 100  # of a run's time that checkpoints may take: one part in so many


# --- state ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What a part of a run needs to go on from between two steps.

    Attributes:
        tensors: by name. They may be the living ones, so they are good until the next step.
        values: plain values, ready for JSON.
        source: the checkpoint that it was read from, for errors.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    source: Path | None = None

    @classmethod
    def of_parts(cls, **parts: State) -> State:
        """Return one state that holds several, each under its name."""
        tensors = {f"{name}/{key}": tensor for name, part in parts.items() for key, tensor in part.tensors.items()}
        return cls(tensors, {name: part.values for name, part in parts.items()})

    def part(self, name: str) -> State:
        """Return one of the states that `of_parts` was given."""
        prefix = f"{name}/"
        tensors = {key.removeprefix(prefix): one for key, one in self.tensors.items() if key.startswith(prefix)}
        return State(tensors, self.values[name], self.source)

    def sha256(self) -> str:
        """Return the SHA-256 of all names, types, shapes and values, whatever their order and the tensors' layout."""
        digest = hashlib.sha256(json.dumps(self.values, sort_keys=True).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            dense = tensor.detach().cpu().contiguous()
            flat = dense.as_strided((dense.numel(),), (1,))  # where a size is 1, any stride counts as contiguous
            digest.update(flat.view(torch.uint8).numpy().data)  # numpy knows no bfloat16
        return digest.hexdigest()


def model_state(model: nn.Module) -> State:
    """Return what training changes in a model, and the ranks that give its adapters their shapes."""
    return State(_changing(model), {"ranks": current_ranks(model)})


def load_model_state(model: nn.Module, state: State) -> None:
    """Bring a model that was prepared anew to where it was; the state's tensors become its own.

    Raises:
        ValueError: if the state is not this model's.
    """
    set_ranks(model, state.values["ranks"])
    places = _changing(model)
    if places.keys() != state.tensors.keys():
        raise ValueError(f"{min(places.keys() ^ state.tensors.keys())} stands only on one side")
    parameters = dict(model.named_parameters())
    for name, place in places.items():
        tensor = state.tensors[name]
        if tensor.shape != place.shape or tensor.dtype != place.dtype:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {place.dtype} {tuple(place.shape)}")
        # Not copied into the old place: how it lies in memory decides how products round.
        parameters.get(name, place).data = tensor.to(place.device)


def _changing(model: nn.Module) -> dict[str, Tensor]:
    return trained_tensors(model) | dict(model.named_buffers())


def optimizer_state(optimizer: torch.optim.Optimizer) -> State:
    """Return moments, step counts and rates of an optimiser."""
    packed = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    others: dict[str, dict[str, Any]] = {}
    for index, entries in packed["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{key}"] = value
            else:
                others.setdefault(str(index), {})[key] = value
    groups = [{key: value for key, value in group.items() if key != "params"} for group in packed["param_groups"]]
    return State(tensors, {"others": others, "groups": groups})


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Bring an optimiser that was built anew over the loaded model to where it was.

    Raises:
        ValueError: if the state is not this optimiser's: torch's fused kernels trust shapes and would leave memory.
    """
    entries: dict[int, dict[str, Any]] = {int(index): _tuples(one) for index, one in state.values["others"].items()}
    for name, tensor in state.tensors.items():
        place, _, moment = name.partition("/")
        entries.setdefault(int(place), {})[moment] = tensor
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, kept in entries.items():
        for key, value in kept.items():
            expected = torch.Size() if key == "step" else parameters[index].shape
            if isinstance(value, Tensor) and value.shape != expected:
                raise ValueError(f"{key} of parameter {index} has the shape {tuple(value.shape)}")
    built = optimizer.state_dict()["param_groups"]
    groups = [
        {**_tuples(kept), "params": group["params"]} for kept, group in zip(state.values["groups"], built, strict=True)
    ]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


def _tuples(value: Any) -> Any:
    """Return a value out of JSON as torch and this package have it in optimisers: with tuples, not lists."""
    if isinstance(value, dict):
        return {key: _tuples(one) for key, one in value.items()}
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value


def generators_state() -> State:
    """Return where every global random generator stands: torch's on each device, numpy's and Python's."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda{index}": one for index, one in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        tensors["mps"] = torch.mps.get_rng_state()
    kind, key, *rest = np.random.get_state(legacy=True)
    assert isinstance(key, np.ndarray)
    return State(tensors, {"python": random.getstate(), "numpy": [kind, key.tolist(), *rest]})


def load_generators_state(state: State) -> None:
    """Set every global random generator that is there; a device that is gone keeps nothing."""
    torch.set_rng_state(state.tensors["cpu"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda{index}" in state.tensors:
                torch.cuda.set_rng_state(state.tensors[f"cuda{index}"], index)
    if torch.backends.mps.is_available() and "mps" in state.tensors:
        torch.mps.set_rng_state(state.tensors["mps"])
    random.setstate(_tuples(state.values["python"]))
    kind, key, *rest = state.values["numpy"]
    np.random.set_state((kind, np.array(key, dtype=np.uint32), *rest))


# --- files ------------------------------------------------------------------------------------------------------------


class CheckpointWarning(UserWarning):
    """A checkpoint was of no use, or of less than it should be; said loudly, and kept in the run's record."""


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """A run was stopped on request.

    Attributes:
        step: which its newest checkpoint holds; 0 if there is none.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(step)


@dataclass(frozen=True)
class Checkpoints:
    """Where checkpoints lie, and how often one is due.

    Attributes:
        folder: of the run; a checkpoint is a folder in it.
        every_s: seconds between two, unless they would cost more than a hundredth of the time; 0: after every step.
    """

    folder: Path
    every_s: float = 30.0


class CheckpointKeeper:
    """Keeps the last two checkpoints of a run.

    Args:
        checkpoints: where, and how often.
        clock: seconds; when a checkpoint is written has no influence on what is trained.
    """

    def __init__(self, checkpoints: Checkpoints, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = checkpoints.folder
        self._every_s = checkpoints.every_s
        self._clock = clock
        self._whole: list[int] = []  # steps of the checkpoints that are known to be whole, the newest last
        self._since = clock()
        self._costs_s: list[float] = []  # of the last two: one disk that stalls once puts nothing off

    @property
    def step(self) -> int:
        """Return which step the newest checkpoint holds; 0: there is none."""
        return self._whole[-1] if self._whole else 0

    def newest(self) -> State | None:
        """Return the newest state that is whole; None if there is none. One that is damaged is said in a warning."""
        for leftover in self._folder.glob(f"{_UNFINISHED}*"):
            _remove(leftover)
        folders = checkpoint_folders(self._folder)
        for step in sorted(folders, reverse=True):
            try:
                state = read_checkpoint(folders[step])
            except UserError as error:
                warnings.warn(f"a damaged checkpoint is left aside: {error}", CheckpointWarning, stacklevel=2)
                continue
            self._whole = [step]
            self._since = self._clock()
            return state
        if folders:
            warnings.warn(
                f"{self._folder}: no checkpoint is whole; the run starts from its beginning",
                CheckpointWarning,
                stacklevel=2,
            )
        return None

    def is_due(self) -> bool:
        """Say whether it is time for another one."""
        cost_s = min(self._costs_s, default=0.0)
        return self._every_s == 0 or self._clock() - self._since >= max(self._every_s, _SHARE * cost_s)

    def keep(self, step: int, state: Callable[[], State]) -> None:
        """Write a checkpoint, unless the newest one holds this step already, and remove what is older than two.

        Raises:
            OSError: if it can't be written; the ones before are still there.
        """
        if step == self.step:
            return
        started = self._clock()
        write_checkpoint(self._folder, step, state())
        self._whole = [*self._whole, step][-_KEPT:]
        for other, path in checkpoint_folders(self._folder).items():
            if other not in self._whole:
                _remove(path)
        self._since = self._clock()
        self._costs_s = [*self._costs_s, self._since - started][-2:]


# --- writing ----------------------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, step: int, state: State) -> None:
    """Write one checkpoint into a run's folder.

    Raises:
        OSError: if it can't be written; nothing of it is left then.
    """
    make_folder(folder)
    unfinished = Path(tempfile.mkdtemp(dir=folder, prefix=_UNFINISHED))
    try:
        os.chmod(unfinished, 0o755)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        try:
            save_file(tensors, unfinished / TENSORS_FILE)
        except SafetensorError as error:
            raise _as_os_error(error, unfinished / TENSORS_FILE) from None
        saved = {
            "format": _FORMAT,
            "step": step,
            "tensors_sha256": sha256_of(unfinished / TENSORS_FILE),
            "strides": {name: _strides(tensor) for name, tensor in state.tensors.items()},
            "values": state.values,
        }
        # Not sorted: what is added up in the order of a mapping must come back in that order.
        (unfinished / STATE_FILE).write_text(json.dumps({"sha256": _digest(saved), **saved}), encoding="utf-8")
        for written in (unfinished / TENSORS_FILE, unfinished / STATE_FILE, unfinished):
            flush(written)
        place = folder / f"checkpoint-{step}"
        _remove(place)  # a damaged one, or of another process that is about to end
        os.rename(unfinished, place)
        flush(folder)
    except BaseException:
        _remove(unfinished)
        raise


def _digest(saved: dict[str, Any]) -> str:
    """Return the SHA-256 of plain values; what JSON has carried has the same one."""
    return hashlib.sha256(json.dumps(saved).encode()).hexdigest()


def _strides(tensor: Tensor) -> list[int] | None:
    """Return how a copy of a tensor lies in memory; None: row by row, as nearly all do."""
    strides = torch.empty_like(tensor, device="meta").stride()
    return None if strides == torch.empty(tensor.shape, device="meta").stride() else list(strides)


def _as_os_error(error: SafetensorError, file: Path) -> OSError:
    """Return what the system has said: safetensors wraps it into a text, "... (os error 28)"."""
    number = re.search(r"os error (\d+)", str(error))
    if number is None:
        return OSError(None, str(error), str(file))
    return OSError(int(number[1]), os.strerror(int(number[1])), str(file))


def _remove(path: Path) -> None:
    """Remove a folder, or whatever stands in its place: of a link only the link, and a pipe is not waited for."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# --- reading ----------------------------------------------------------------------------------------------------------


class _Saved(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[2]
    step: Annotated[int, Field(ge=1)]
    tensors_sha256: str
    strides: dict[str, list[int] | None]  # by tensor, in the state's order; None: row by row
    values: dict[str, Any]


def read_checkpoint(path: Path) -> State:
    """Read one checkpoint from its folder, `checkpoint-<step>`.

    Raises:
        UserError: if it is damaged: something is missing, cut short or altered, or lies where a link leads.
    """
    for place in (path, path / STATE_FILE, path / TENSORS_FILE):
        if place.is_symlink():
            raise UserError("is a link; a checkpoint is never made of links", file=place)
    saved = _read_state(path / STATE_FILE)
    if path.name != f"checkpoint-{saved.step}":
        raise UserError(f"is of step {saved.step}", file=path / STATE_FILE, field="step")
    tensors = _read_tensors(path / TENSORS_FILE, saved.tensors_sha256)
    if tensors.keys() != saved.strides.keys():
        name = min(tensors.keys() ^ saved.strides.keys())
        raise UserError(f"names other tensors than {STATE_FILE}", file=path / TENSORS_FILE, field=name)
    try:
        laid_out = {name: _laid_out(tensors[name], strides) for name, strides in saved.strides.items()}
    except (ValueError, RuntimeError) as error:
        if is_out_of_memory(error):  # says nothing of the file
            raise
        raise UserError(f"holds an impossible layout ({error})", file=path / STATE_FILE, field="strides") from None
    return State(laid_out, saved.values, path)


def _read_state(file: Path) -> _Saved:
    try:
        saved = json.loads(read_bytes(file))
        if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
            raise UserError(f"is of another version of this program, expected format {_FORMAT}", file=file)
        if saved.pop("sha256", None) != _digest(saved):
            raise UserError("is not what was written: SHA-256 differs", file=file)
        return _Saved.model_validate(saved)
    except ValidationError as error:
        field, fault = first_fault(error)
        raise UserError(fault, file=file, field=field) from None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"is no readable JSON ({reason})", file=file) from None


def _read_tensors(file: Path, sha256: str) -> dict[str, Tensor]:
    try:
        if sha256_of(file) != sha256:
            raise UserError(f"is not what its {STATE_FILE} says: SHA-256 differs", file=file)
        return load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"is not a readable safetensors file ({reason})", file=file) from None


def _laid_out(tensor: Tensor, strides: list[int] | None) -> Tensor:
    """Return a copy that torch has placed itself, aligned as any tensor of a run, and lying in memory as it did."""
    if strides is None:
        return tensor.clone()
    moving = [stride for size, stride in zip(tensor.shape, strides, strict=True) if size > 1]
    if not all(0 < stride <= tensor.numel() for stride in moving):
        raise ValueError(f"strides {strides} for the shape {tuple(tensor.shape)}")
    layout = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device="meta")  # takes no memory
    if layout.untyped_storage().nbytes() != tensor.nbytes:
        raise ValueError(f"strides {strides} leave gaps or overlap for the shape {tuple(tensor.shape)}")
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)
