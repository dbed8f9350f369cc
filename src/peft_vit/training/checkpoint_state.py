"""What a training depends on beside its settings, in a form that files can hold: model, optimiser, randomness."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peft_vit.adapters import current_ranks, set_ranks, trained_tensors


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
