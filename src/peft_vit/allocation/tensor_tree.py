"""Nested tensors as flat ones, by names that safetensors can store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Return copies of the tensors of nested mappings by their keys, joined with slashes; keys hold none."""
    flat: dict[str, Tensor] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value.clone()}
    return flat


def unflatten(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return copies of the tensors as the nested mappings that `flatten` was given, empty ones left out."""
    tree: dict[str, Any] = {}
    for name, tensor in flat.items():
        *path, last = name.split("/")
        branch = tree
        for key in path:
            branch = branch.setdefault(key, {})
        branch[last] = tensor.clone()
    return tree
