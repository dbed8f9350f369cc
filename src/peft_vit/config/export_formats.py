"""The formats in which a run's whole model is written: a line each in `EXPORTS`, and functions in `deployment`.

Choices of commands, their reference, names of files, and what `predict`, `check` and `bench` take follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ExportFormat:
    """What commands have to know of a format without loading torch."""

    title: str
    what: str  # its file is
    module: str  # of `deployment`, whose FORMATS write and open it
    ending: str = ""  # of its file; "": it is a folder
    beside: tuple[str, ...] = ()  # endings of files that lie beside that
    runtime: str = "torch"  # the package that computes
    extra: str | None = None  # of pyproject.toml, that it needs

    @property
    def output(self) -> str:
        """Return what is written."""
        more = "".join(f", a {ending} comes beside it" for ending in self.beside)
        return f"a {self.ending} file{more}" if self.ending else "a new or empty folder"


EXPORTS: dict[str, ExportFormat] = {
    "onnx": ExportFormat(
        "ONNX", "the whole model for onnxruntime", "onnx_file", ".onnx", runtime="onnxruntime", extra="onnx"
    ),
    "openvino": ExportFormat(
        "OpenVINO", "the same for OpenVINO", "openvino_file", ".xml", (".bin",), runtime="openvino", extra="openvino"
    ),
    "safetensors": ExportFormat(
        "safetensors", "the whole model, quantized layers packed", "torch_files", ".safetensors"
    ),
    "pretrained": ExportFormat(
        "timm or transformers", "a folder that timm or transformers loads, all weights as floats", "torch_files"
    ),
}


def format_of(path: Path) -> str | None:
    """Return the format of a file by the ending of its name; None if it is none's."""
    return next((name for name, kind in EXPORTS.items() if kind.ending and kind.ending == path.suffix), None)


def file_bytes(model: Path) -> int:
    """Return the bytes of an exported model: of a folder all files, else with what lies beside the file."""
    if model.is_dir():
        return sum(part.stat().st_size for part in model.iterdir() if part.is_file())
    name = format_of(model)
    parts = [model, *map(model.with_suffix, () if name is None else EXPORTS[name].beside)]
    return sum(part.stat().st_size for part in parts)
