"""What was measured on this machine, in the user's cache by all that it depends on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json
from safetensors import SafetensorError
from safetensors.numpy import load, save

from peft_vit.base.errors import first_fault, printable
from peft_vit.base.files import read_bytes, write_atomically
from peft_vit.base.packages import cache_dir

Floats = NDArray[np.float32]
_LARGEST_BYTES = 1 << 28  # of one file of rows; more are computed, but not kept
_log = logging.getLogger(__name__)
_Value = TypeVar("_Value")


def cache_file(kind: str, depends_on: Mapping[str, Any], ending: str = "json") -> Path:
    """Return the cache file of a measurement, by all that it depends on."""
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return cache_dir() / kind / f"{digest[:32]}.{ending}"


def read_cached(file: Path, kind: type[_Value]) -> _Value | None:
    """Return what a file holds; None if there is none, or it can't be used, which is reported."""
    try:
        return TypeAdapter(kind).validate_json(read_bytes(file, 1 << 16))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = "{}: {}".format(*first_fault(error)) if isinstance(error, ValidationError) else printable(str(error))
        _log.warning("%s can't be used (%s); it is measured again", file, reason)
        return None


def write_cached(file: Path, value: object) -> None:
    """Write bytes as they are, or values as JSON; a cache that can't be written to only costs time."""
    try:
        write_atomically(file, value if isinstance(value, bytes) else to_json(value) + b"\n")
    except OSError as error:
        _log.warning("%s can't be written (%s); it is measured again", file, error.strerror)


def cached_rows(
    file: Path | None,
    wanted: NDArray[np.int64],
    compute: Callable[[NDArray[np.int64]], tuple[NDArray[np.int64], Floats]],
) -> tuple[NDArray[np.bool_], Floats]:
    """Return which rows there are, (N,), and these, (M, D), from a file of the cache, or computed and kept there.

    Args:
        file: that keeps rows by their numbers; None: they are computed again.
        wanted: their numbers, (N,).
        compute: gets places among these, and returns those that it can compute a row for, and the rows.
    """
    numbers, values = _read_rows(file)  # (K,), (K, D)
    missing = np.flatnonzero(~np.isin(wanted, numbers))
    if len(missing):
        done, computed = compute(missing)
        if len(done):
            numbers = np.concatenate([numbers, wanted[done]])
            values = np.concatenate([values, computed]) if len(values) else computed
            if file is not None and values.nbytes <= _LARGEST_BYTES:
                write_cached(file, save({"places": numbers, "values": np.ascontiguousarray(values)}))
    there, order = np.isin(wanted, numbers), np.argsort(numbers)
    return there, values[order[np.searchsorted(numbers, wanted[there], sorter=order)]]


def _read_rows(file: Path | None) -> tuple[NDArray[np.int64], Floats]:
    if file is not None:
        try:
            content = load(read_bytes(file, None))
            numbers, values = content["places"], content["values"]
            if len(numbers) != len(values) or values.dtype != np.float32 or not np.isfinite(values).all():
                raise ValueError("places and values do not fit")
            return numbers, values
        except FileNotFoundError:
            pass
        except (OSError, ValueError, LookupError, SafetensorError) as error:
            _log.warning("%s can't be used (%s); features are computed again", file, error)
    return np.empty(0, np.int64), np.empty((0, 0), np.float32)
