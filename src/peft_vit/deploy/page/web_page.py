"""The page in which a browser asks a model: drop, choose, paste or photograph an image, and nothing leaves the machine.

Beside or in the page are scripts that hand over bytes, gzip in base64, since a page that was opened from disk may not
fetch files:

    model.js      the ONNX file as `export` writes it
    runtime.js    the two files of onnxruntime-web; without it the page fetches them from a public copy, each by its
                  hash, so that no other file runs

The page's policy allows no other connection. Its script prepares images as `data.pixels` does.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import tarfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL
from markupsafe import Markup
from PIL import ImageColor

from peft_vit.base.errors import UserError, os_fault
from peft_vit.base.files import read_bytes, whole_folder, write_atomically
from peft_vit.base.packages import ONNXRUNTIME_WEB, fetch_npm
from peft_vit.core.tasks import TASKS
from peft_vit.data.pixels import LETTERBOX_COLOUR
from peft_vit.deploy.page.files import as_json, rendered, script_hash
from peft_vit.deploy.presentation import PRESENTED

if TYPE_CHECKING:
    from peft_vit.deploy.formats.header import ExportMetadata

PAGE_FILE, MODEL_FILE, RUNTIME_FILE = "index.html", "model.js", "runtime.js"
COVERAGE = 0.9  # of the sets that are shown
LARGEST_MB = 400  # of a model: browsers hold texts of half a gigabyte, and base64 makes four characters of three bytes
_NAME = f"{ONNXRUNTIME_WEB.package} {ONNXRUNTIME_WEB.version}"
_COPY = f"https://cdn.jsdelivr.net/npm/{ONNXRUNTIME_WEB.package}@{ONNXRUNTIME_WEB.version}/dist/"
_RUNTIME = {
    "ort.wasm.bundle.min.mjs": "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    "ort-wasm-simd-threaded.wasm": "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
}


def runtime_files(folder: Path | None) -> dict[str, bytes]:
    """Return what computes in a browser, by the names of its files.

    Args:
        folder: that holds them, or npm's package; None: the latter is fetched once into the cache.

    Raises:
        UserError: if they are not there, are others, or can't be fetched.
    """
    if folder is None:
        with tarfile.open(fetch_npm(ONNXRUNTIME_WEB)) as tar:
            members = {name: tar.extractfile(f"package/dist/{name}") for name in _RUNTIME}
            return {name: member.read() for name, member in members.items() if member is not None}
    files = {}
    remedy = f"give the folder of npm's {_NAME}, or leave it out"
    for name, integrity in _RUNTIME.items():
        file = next((file for file in (folder / "dist" / name, folder / name) if file.exists()), folder / name)
        with os_fault("can't be read", file, remedy=remedy, field="--runtime-files"):
            files[name] = read_bytes(file)
        if integrity != f"sha384-{base64.b64encode(hashlib.sha384(files[name]).digest()).decode()}":
            raise UserError(f"is not that of {_NAME}; {remedy}", file=file, field="--runtime-files")
    return files


def write_web_page(output: Path, model: bytes, card: ExportMetadata, runtime: Mapping[str, bytes] | None) -> Path:
    """Write the page of an ONNX file.

    Args:
        output: one file, if its name ends in .html, else a new or empty folder, or one whose place it takes.
        model: the file's content.
        card: what it says of itself.
        runtime: see `runtime_files`; None: the page fetches it.

    Returns:
        The page.

    Raises:
        UserError: if a browser can't hold the model, or the page can't be written.
    """
    if len(model) > LARGEST_MB * 10**6:
        size = f"{len(model) / 1e6:,.0f} MB"
        message = f"the model has {size}, and browsers hold {LARGEST_MB}; train with qa_lora, or a smaller model"
        raise UserError(message, file=output)
    single = output.suffix == ".html"
    parts = {MODEL_FILE: _script({"model.onnx": model})}
    if runtime is not None:
        parts[RUNTIME_FILE] = _script(runtime)
    coverage = None
    with suppress(UserError):  # it has no sets of this coverage
        if card.meaning is not None:
            card.meaning.threshold(COVERAGE)
            coverage = COVERAGE
    facts = {
        **PRESENTED[card.task].for_browser(card.meaning, coverage),
        "run": card.run,
        "model": card.model,
        "classes": card.class_names,
        "size": card.image_size,
        "channels": card.channels,
        "interpolation": card.interpolation,
        "resize": card.resize or "squash",
        "ground": np.ravel(ImageColor.getcolor(LETTERBOX_COLOUR, "L" if card.channels == 1 else "RGB")).tolist(),
        "pillow": int(PIL.__version__.partition(".")[0]),  # whose pixels the page's are, to the bit
        "mean": card.mean,
        "std": card.std,
        "unlike": None if card.unlike is None else card.unlike.threshold,
        "runtime": {"url": None if runtime else _COPY, "files": _RUNTIME},
    }
    text = rendered(
        "web.html.j2",
        "web.js",
        facts=facts,
        facts_json=as_json(facts),
        parts={name: Markup(part) for name, part in parts.items()},
        single=single,
        part_hashes=[script_hash(part) for part in parts.values()],
        connects="'none'" if runtime else " ".join(_COPY + name for name in _RUNTIME),
        outputs=TASKS[card.task].outputs.capitalize(),
        promise=PRESENTED[card.task].holds.format(100 * COVERAGE),
        model_mb=f"{len(model) / 1e6:.1f}",
        version=ONNXRUNTIME_WEB.version,
    )
    with os_fault("can't be written", output, remedy="choose another place"):
        if single:
            write_atomically(output, text.encode())
            return output
        with whole_folder(output) as made:
            for name, content in {PAGE_FILE: text, **parts}.items():
                (made / name).write_text(content, encoding="utf-8")
    return output / PAGE_FILE


def _script(files: Mapping[str, bytes]) -> str:
    """Return a script that hands over files by their names."""
    packed = {name: base64.b64encode(gzip.compress(content, mtime=0)).decode() for name, content in files.items()}
    return f"self.peftVit = {{ ...self.peftVit, ...{json.dumps(packed)} }};\n"
