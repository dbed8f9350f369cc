"""Bounds that settings share, and sizes, times and numbers as a person writes them: 16MB, 50ms, 300k."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from peft_vit.base.settings import Option

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SECONDS = {"ms": 1e-3, "s": 1.0, "min": 60.0}
_COUNTS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


def _in_units(units: Mapping[str, float], what: str, text: Any) -> Any:
    """Return the number that a text says in units; what is no text stays as it is."""
    if not isinstance(text, str):
        return text
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?) ?([a-z]*)", text.strip(), re.IGNORECASE | re.ASCII)
    unit = None if match is None else next((unit for unit in units if unit.lower() == match[2].lower()), None)
    value = math.nan if match is None or unit is None else float(match[1]) * units[unit]
    if not 0 < value < math.inf:
        raise ValueError(f"{text!r} is not {what}")
    return value


def bytes_of(size: str) -> int:
    """Return the bytes of a size with its unit: 1GB is 10^9, 1GiB 2^30.

    Raises:
        ValueError: if it is none.
    """
    what = f"a size above 0 with its unit, {', '.join(_BYTES)}; write it as in 1GB"
    if (count := _in_units(_BYTES, what, size)) < 1:
        raise ValueError(f"{size!r} is not {what}")
    return int(count)


_seconds = partial(_in_units, _SECONDS, f"a time above 0 with its unit, {', '.join(_SECONDS)}; write it as in 50ms")
_number = partial(_in_units, _COUNTS, "a number above 0; write it as in 300000, 3e5 or 300k")


def written_size(value: Any) -> Any:
    """Refuse what is not a size with its unit (ValueError)."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f"{value} has no unit; write it with one of {', '.join(_BYTES)}, as in 1GB")
    if isinstance(value, str):
        bytes_of(value)
    return value


def several(values: Any) -> Any:
    """Return a tuple of one value or several, which texts may hold with commas between them."""
    if isinstance(values, str | int):
        values = (values,)
    if not isinstance(values, list | tuple):
        return values
    parts = (map(str.strip, value.split(",")) if isinstance(value, str) else (value,) for value in values)
    return tuple(itertools.chain.from_iterable(parts))


def _bytes(value: Any) -> Any:
    return bytes_of(value) if isinstance(value, str) else value


# What an option takes as text with its unit, and Python also as a number of bytes, seconds or values; None: no limit.
Size = Annotated[int | None, BeforeValidator(_bytes), Option(typed=str, metavar="SIZE")]
Time = Annotated[float | None, BeforeValidator(_seconds), Option(typed=str, metavar="TIME")]
Number = Annotated[float | None, BeforeValidator(_number), Option(typed=str, metavar="NUMBER")]
WrittenSize = Annotated[str | None, BeforeValidator(written_size), Option(metavar="SIZE")]
