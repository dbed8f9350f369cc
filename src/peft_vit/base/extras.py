"""Packages that only some features need: `pip install 'peft-vit[onnx]'`, and one line where they are missing.

The command needs peft-vit on no index: pip finds it installed, and reads what the extra names from its metadata.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from peft_vit.base.errors import UserError

_REPORT = {"matplotlib": "3.8", "jinja2": "3.1", "pandas": "2.2"}
_ONNX = {"torch": "2.8", "onnx": "1.16", "onnxscript": "0.5", "onnxruntime": "1.32"}

# Of each extra of pyproject.toml, by name: the oldest version of each package. Torch has had operators of other ONNX
# domains since 2.8; datasets before 4 runs a script that a data set may bring.
EXTRAS: Mapping[str, Mapping[str, str]] = {
    "report": _REPORT,
    "parquet": {"pandas": "2.2", "pyarrow": "14"},
    "onnx": _ONNX,
    "openvino": {"torch": "2.8", "onnx": "1.16", "onnxscript": "0.5", "openvino": "2026.4"},
    "tune": {**_ONNX, **_REPORT},
    "hf": {"datasets": "4"},
    "remote": {"s3fs": "2024.6", "aiohttp": "3.9"},
    "peft": {"peft": "0.17"},
    "transformers": {"transformers": "5"},
    "ray": {"ray": "2.40"},
    "heic": {"pillow_heif": "1"},
    "label": {"starlette": "0.40", "uvicorn": "0.30"},
}


def require_extra(
    extra: str,
    what: str = "",
    *,
    packages: Collection[str] | None = None,
    file: str | Path | None = None,
    field: str | None = None,
) -> None:
    """Refuse, before anything else is done, what needs packages that are not installed.

    Args:
        extra: its name in pyproject.toml.
        what: the feature that needs it; may be left out where `file` or `field` say it.
        packages: those of the extra that are needed; None: all.
        file: the file that needs it, if a file does.
        field: the setting or option that needs it.

    Raises:
        UserError: if one is missing or too old, with the command that installs it.
    """
    missing = missing_packages(extra, packages)
    if missing:
        *others, last = missing
        names = f"packages {', '.join(others)} and {last}" if others else f"package {last}"
        message = f"{what} needs the {names}; run: pip install 'peft-vit[{extra}]'"
        raise UserError(message, file=file, field=field)


def load_openvino() -> Any:
    """Return OpenVINO, imported without `openvino_telemetry`: with it each import is reported to Google Analytics."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # not importable: it has a stub for that
    import openvino

    return openvino


def missing_packages(extra: str, packages: Collection[str] | None = None) -> list[str]:
    """Return the packages of an extra that are not installed; of one that is too old also the two versions."""
    needed = EXTRAS[extra]
    faults = {name: _fault(name, needed[name]) for name in packages or needed}
    return [f"{name}{fault}" for name, fault in faults.items() if fault is not None]


def _fault(name: str, oldest: str) -> str | None:
    """Return what is to be said after a package's name, or None if it is installed and new enough."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # without origin it is a folder of this name where Python was started
        return ""
    from importlib import metadata

    from packaging.version import Version

    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:  # it comes from a distribution of another name, such as onnxruntime-gpu
        return None
    return None if Version(version) >= Version(oldest) else f" from version {oldest} (not {version})"
