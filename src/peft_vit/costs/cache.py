"""What runs of a kind cost on this machine, measured once and kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peft_vit.errors import first_fault, printable
from peft_vit.packages import cache_dir
from peft_vit.records import RunSpec, write_atomically
from peft_vit.runs.machine import cpu_count, package_versions, processor_name

_log = logging.getLogger(__name__)


class Costs(BaseModel):
    """What a miniature took; a run's time is put together from these."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    start_s: float = Field(ge=0)  # everything that is done once, whatever the number of steps
    step_s: float = Field(gt=0)
    image_s: float = Field(ge=0)  # of evaluation
    peak_memory_bytes: int = Field(gt=0)
    images: int = Field(gt=0)  # in memory then


def known_costs(kind: RunSpec) -> Costs | None:
    """Return what runs of a kind cost, if it was measured on this machine with these versions.

    Args:
        kind: a run's miniature.
    """
    file, _ = _place(kind)
    try:
        content: Any = json.loads(file.read_bytes())
        return Costs.model_validate(content["costs"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        _log.warning("%s is of no use (%s); measured again when it is wanted", file, _reason(error))
        return None


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        field, fault = first_fault(error)
        return f"{field}: {fault}"
    return printable(str(error))


def keep_costs(kind: RunSpec, costs: Costs) -> None:
    """Keep what was measured, for later plans; a cache that can't be written to only makes them slower."""
    file, depends_on = _place(kind)
    content = json.dumps({"costs": costs.model_dump(), "depends_on": depends_on}, indent=1)
    try:
        write_atomically(file, content.encode() + b"\n")
    except OSError as error:
        _log.warning("%s can't be written (%s); the next plan measures again", file, error.strerror)


def _place(kind: RunSpec) -> tuple[Path, dict[str, Any]]:
    """Return the file that holds a kind's costs, and all that they depend on."""
    depends_on = {
        "run": kind.model_dump(mode="json"),
        "packages": package_versions(),
        "python": platform.python_version(),
        "machine": platform.node(),
        "processor": processor_name(),
        "cpu_count": cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return cache_dir() / "costs" / f"{digest[:32]}.json", depends_on
