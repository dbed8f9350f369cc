"""Checkpoints: what a training depends on beside its settings, and the files that hold it.

A state is nested as torch's own `state_dict`s are: mappings, lists, tuples, plain values and tensors. A checkpoint is a
folder `checkpoint-<step>` in the run's folder::

    tensors.safetensors   the state's tensors, numbered
    state.json            the manifest: the state, each tensor as its number and its layout in memory, and the SHA-256
                          of both files

It is written under another name, flushed to disk and renamed, so that a kill at any instant leaves the one before; it
is checked before it is used and never unpickled. The last two are kept. The layout is kept too: a product may round
otherwise if a factor lies otherwise in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from peft_vit.base.errors import UserError, is_out_of_memory
from peft_vit.base.files import checkpoint_folders, flush, make_folder, read_bytes, remove_any, sha256_of, take_name
from peft_vit.core.adapters import check_tensors, current_ranks, set_ranks, trained_tensors
from peft_vit.core.config import CHECKPOINT_EVERY_S

TENSORS_FILE = "tensors.safetensors"
STATE_FILE = "state.json"
_FORMAT = 4
_KEPT = 2
_UNFINISHED = ".checkpoint-"  # begins the names of folders that are being written
_SHARE = 100  # of a run's time that checkpoints may take: one part in so many


# --- state ------------------------------------------------------------------------------------------------------------


class State(dict[str, Any]):
    """The state of a run between two steps. Its tensors may be those in use, valid until the next step.

    Attributes:
        source: the checkpoint that it was read from, for errors.
    """

    source: Path | None = None


def model_state(model: nn.Module) -> dict[str, Any]:
    """Return the trained tensors and buffers of a model, and the ranks, which give adapters their shapes."""
    return {"ranks": current_ranks(model), "tensors": trained_tensors(model) | dict(model.named_buffers())}


def load_model_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Bring a model that was prepared again to where it was; the state's tensors become its own."""
    set_ranks(model, state["ranks"])
    tensors, places = state["tensors"], model_state(model)["tensors"]
    check_tensors(places, tensors)
    parameters = dict(model.named_parameters())
    for name, place in places.items():
        # Not copied into the old place: how it lies in memory decides how products round.
        parameters.get(name, place).data = tensors[name].to(place.device)


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Bring an optimiser that was built again over the loaded model to where it was.

    Raises:
        ValueError: if the state is not this optimiser's: torch's fused kernels trust shapes and would leave memory.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, moments in state["state"].items():
        for key, value in moments.items():
            expected = torch.Size() if key == "step" else parameters[index].shape
            if isinstance(value, Tensor) and value.shape != expected:
                raise ValueError(f"{key} of parameter {index} has the shape {tuple(value.shape)}")
    optimizer.load_state_dict(dict(state))


def optimizer_sha256(optimizer: Optimizer) -> str:
    """Return the SHA-256 of moments, step counts and rates."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    others: dict[str, dict[str, Any]] = {}
    for index, moments in state["state"].items():
        for key, value in moments.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{key}"] = value
            else:
                others.setdefault(str(index), {})[key] = value
    groups = [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
    return tensors_sha256(tensors, {"others": others, "groups": groups})


def tensors_sha256(tensors: Mapping[str, Tensor], values: Mapping[str, Any] | None = None) -> str:
    """Return the SHA-256 of names, types, shapes and values, whatever the tensors' order and their layout."""
    digest = hashlib.sha256(json.dumps(values or {}, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        dense = tensor.detach().cpu().contiguous()
        flat = dense.as_strided((dense.numel(),), (1,))  # (n,); where a size is 1, any stride counts as contiguous
        digest.update(flat.view(torch.uint8).numpy().data)  # numpy knows no bfloat16
    return digest.hexdigest()


def generators_state() -> dict[str, Any]:
    """Return where torch's generators stand, from which dropout draws; all else draws from generators of its own."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def load_generators_state(state: Mapping[str, Any]) -> None:
    """Set torch's generators; a device that is gone keeps nothing."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        for index, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(generator, index)


# --- which checkpoints there are --------------------------------------------------------------------------------------


class CheckpointWarning(UserWarning):
    """A checkpoint could not be used, or not in full; shown as a warning, and kept in the run's record."""


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
    every_s: float = CHECKPOINT_EVERY_S


class CheckpointKeeper:
    """Keeps the last two checkpoints of a run.

    Args:
        checkpoints: where, and how often.
        clock: seconds; when a checkpoint is written has no influence on what is trained.
    """

    def __init__(self, checkpoints: Checkpoints, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._every_s, self._clock = checkpoints.folder, checkpoints.every_s, clock
        self._whole: list[int] = []  # steps of the checkpoints that are known to be whole, the newest last
        self._since = clock()
        self._costs_s: list[float] = []  # of the last two: one disk that stalls once puts nothing off

    @property
    def step(self) -> int:
        """Return which step the newest checkpoint holds; 0: there is none."""
        return self._whole[-1] if self._whole else 0

    def newest(self) -> State | None:
        """Return the newest state that can be read, None without one; a damaged one gives a warning."""
        for leftover in self._folder.glob(f"{_UNFINISHED}*"):
            remove_any(leftover)
        folders = checkpoint_folders(self._folder)
        for step in sorted(folders, reverse=True):
            try:
                state = read_checkpoint(folders[step])
            except UserError as error:
                text = f"a damaged checkpoint is left aside: {error}"
                warnings.warn(text, CheckpointWarning, stacklevel=2)
                continue
            self._whole = [step]
            self._since = self._clock()
            return state
        if folders:
            text = f"{self._folder}: no checkpoint is whole; the run starts from its beginning"
            warnings.warn(text, CheckpointWarning, stacklevel=2)
        return None

    def is_due(self) -> bool:
        """Say whether it is time for another one."""
        cost_s = min(self._costs_s, default=0.0)
        return self._every_s == 0 or self._clock() - self._since >= max(self._every_s, _SHARE * cost_s)

    def keep(self, step: int, state: Callable[[], State]) -> None:
        """Write a checkpoint, unless the newest one is of this step, and remove all but the last two.

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
                remove_any(path)
        self._since = self._clock()
        self._costs_s = [*self._costs_s, self._since - started][-2:]


# --- files ------------------------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    """Write one checkpoint into a run's folder.

    Raises:
        OSError: if it can't be written; nothing of it is left then.
    """
    make_folder(folder)
    unfinished = Path(tempfile.mkdtemp(dir=folder, prefix=_UNFINISHED))
    try:
        os.chmod(unfinished, 0o755)
        tensors: list[Tensor] = []
        packed = _packed(state, tensors)
        dense = {str(number): tensor.detach().cpu().contiguous() for number, tensor in enumerate(tensors)}
        try:
            save_file(dense, unfinished / TENSORS_FILE)
        except SafetensorError as error:  # it wraps what the system has said into a text, "... (os error 28)"
            number = re.search(r"os error (\d+)", str(error))
            code = None if number is None else int(number[1])
            raise OSError(code, str(error) if code is None else os.strerror(code), str(unfinished)) from None
        digest = sha256_of(unfinished / TENSORS_FILE)
        saved = {"format": _FORMAT, "step": step, "tensors_sha256": digest, "state": packed}
        # Not sorted: what is added up in the order of a mapping must come back in that order.
        (unfinished / STATE_FILE).write_text(json.dumps({"sha256": _digest(saved), **saved}), encoding="utf-8")
        for written in (unfinished / TENSORS_FILE, unfinished / STATE_FILE, unfinished):
            flush(written)
        place = folder / f"checkpoint-{step}"
        remove_any(place)  # a damaged one, or of another process that is about to end
        take_name(unfinished, place)
        flush(folder)
    except BaseException:
        remove_any(unfinished)
        raise


def read_checkpoint(path: Path) -> State:
    """Read one checkpoint from its folder, `checkpoint-<step>`.

    Raises:
        UserError: if it is damaged: something is missing, cut short or altered, or lies where a link leads.
    """
    file, tensors_file = path / STATE_FILE, path / TENSORS_FILE
    for place in (path, file, tensors_file):
        if place.is_symlink():
            raise UserError("is a link; a checkpoint is never made of links", file=place)
    with _readable(file, "state"):
        saved = json.loads(read_bytes(file))
        if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
            raise UserError(f"is of another version of this program, expected format {_FORMAT}", file=file)
        if saved.pop("sha256", None) != _digest(saved):
            raise UserError("is not what was written: SHA-256 differs", file=file)
        if path.name != f"checkpoint-{saved['step']}":
            raise UserError(f"is of step {saved['step']}", file=file, field="step")
        digest, packed = saved["tensors_sha256"], saved["state"]
    with _readable(tensors_file, "safetensors file"):
        if sha256_of(tensors_file) != digest:
            raise UserError(f"is not what its {STATE_FILE} says: SHA-256 differs", file=tensors_file)
        tensors = load_file(tensors_file)
    with _readable(file, f"state beside {TENSORS_FILE}"):
        state = State(_unpacked(packed, tensors))
    state.source = path
    return state


@contextmanager
def _readable(file: Path, kind: str) -> Iterator[None]:
    """Turn errors of reading a file into a UserError of one line, except out of memory."""
    try:
        yield
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"is not a readable {kind} ({reason})", file=file) from None


def _packed(value: Any, tensors: list[Tensor]) -> Any:
    """Return a state as JSON; tensors, tuples and odd mappings become a mapping of one key with a $."""
    if isinstance(value, Tensor):
        tensors.append(value)
        strides = torch.empty_like(value, device="meta").stride()  # of a copy
        plain = strides == torch.empty(value.shape, device="meta").stride()
        return {"$tensor": [len(tensors) - 1, None if plain else list(strides)]}
    if isinstance(value, dict):
        items = [(key, _packed(part, tensors)) for key, part in value.items()]
        plain = all(isinstance(key, str) and key[:1] != "$" for key in value)
        return dict(items) if plain else {"$dict": items}
    if isinstance(value, list | tuple):
        parts = [_packed(part, tensors) for part in value]
        return parts if isinstance(value, list) else {"$tuple": parts}
    return value


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        number, strides = value["$tensor"]
        return _laid_out(tensors[str(number)], strides)
    if "$tuple" in value:
        return tuple(_unpacked(value["$tuple"], tensors))
    items = value["$dict"] if "$dict" in value else value.items()
    return {key: _unpacked(part, tensors) for key, part in items}


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


def _digest(saved: dict[str, Any]) -> str:
    """Return the SHA-256 of plain values, equal before and after JSON."""
    return hashlib.sha256(json.dumps(saved).encode()).hexdigest()
