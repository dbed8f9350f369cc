"""What was measured on this machine, in the user's cache by all that it depends on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from peft_vit.base.errors import first_fault, printable
from peft_vit.base.files import read_bytes, write_atomically
from peft_vit.base.packages import cache_dir

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
