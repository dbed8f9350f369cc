"""Exported files in their own runtimes, onnxruntime and OpenVINO, which need no torch: a first answer comes sooner."""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_vit.base.errors import UserError, foreign_fault, one_line, os_fault
from peft_vit.base.extras import load_openvino, require_extra
from peft_vit.base.files import read_bytes
from peft_vit.deploy.formats.header import AGAIN, HEADER, UNSIGNED, Classifier, ExportMetadata, Header

INPUT, OUTPUT, DISTANCE = "images", "logits", "distance"
OPSET = 20
# Products in float32, also where a CPU has bfloat16, and no activations in 8 bits.
SETTINGS = {"EXECUTION_MODE_HINT": "ACCURACY"}


def onnx_content(card: ExportMetadata, proto: Any) -> Iterator[bytes]:
    """Yield what is signed of a model: the card, and all but its other metadata, which are taken out of `proto`."""
    yield card.model_dump_json().encode()
    del proto.metadata_props[:]
    yield proto.SerializeToString(deterministic=True)


def open_onnx(file: Path) -> Classifier:
    """Return the classifier in a file, by onnxruntime.

    Raises:
        UserError: if the file is cut off, was changed after it was written, was not written by this package, or
            onnxruntime is missing or can't run it.
    """
    require_extra("onnx", packages=("onnx", "onnxruntime"), file=file)
    import onnx
    import onnxruntime

    try:
        content = read_bytes(file, None)
        proto = onnx.load_from_string(content)
        text = {entry.key: entry.value for entry in proto.metadata_props}.get(HEADER)
    except Exception as error:  # a damaged file can fail in any way; the user needs one line
        raise UserError(f"is not a readable ONNX file ({error}); {AGAIN}", file=file) from None
    header = Header.read(text, file, "onnx")
    if _names_other_files(proto):
        raise UserError(f"keeps numbers in other files, which could be any of this machine; {AGAIN}", file=file)
    header.check(onnx_content(header.card, proto), file)
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no public class
        raise UserError(f"onnxruntime {onnxruntime.__version__} can't run it ({one_line(error)})", file=file) from None
    return _classifier(lambda names, images: session.run(names, {INPUT: images}), header.card, file)


def _classifier(
    run: Callable[[list[str], np.ndarray], Sequence[np.ndarray]], card: ExportMetadata, file: Path
) -> Classifier:
    """Return a classifier of what computes a file's outputs by their names; that they fit its card is seen here."""
    shapes = {OUTPUT: (len(card.class_names),), DISTANCE: ()}  # of one image

    def outputs(names: list[str], images: np.ndarray) -> Sequence[np.ndarray]:
        with foreign_fault("can't be computed with", file, remedy=AGAIN):
            computed = run(names, images)
        for name, values in zip(names, computed, strict=True):
            if values.shape != (expected := (len(images), *shapes[name])):
                raise UserError(f"has {name} of shape {values.shape}, expected {expected}; {AGAIN}", file=file)
        return computed

    def both(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, distances = outputs([OUTPUT, DISTANCE], images)
        return logits, distances

    return Classifier(lambda images: outputs([OUTPUT], images)[0], card, None if card.unlike is None else both)


def _names_other_files(message: Any) -> bool:
    """Tell whether a tensor anywhere in a model lies outside of it."""
    from onnx import TensorProto

    if isinstance(message, TensorProto):
        return bool(message.data_location == TensorProto.EXTERNAL or message.external_data)
    for field, value in message.ListFields():
        if field.message_type is not None:
            parts = [value] if hasattr(value, "ListFields") else value
            if any(_names_other_files(part) for part in parts):
                return True
    return False


def openvino_content(description: bytes, weights: bytes) -> Iterator[bytes]:
    """Yield what is signed of the two files: their SHA-256, of the .xml, which has the header, with zeros for it."""
    for part in (description, weights):
        yield hashlib.sha256(part).digest()


def open_openvino(file: Path) -> Classifier:
    """Return the classifier in a .xml and .bin file, by OpenVINO on the CPU.

    Nothing of the file is given to OpenVINO before the hash is found right.

    Raises:
        UserError: if the .xml or .bin is cut off, was changed after it was written, was not written by this package, or
            OpenVINO is missing or can't run it.
    """
    require_extra("openvino", packages=("openvino",), file=file)
    beside = file.with_suffix(".bin")
    parts = []
    for part in (file, beside):
        with os_fault("can't be read", part, remedy=AGAIN):
            parts.append(read_bytes(part, None))
    description, weights = parts
    text = re.search(rb'<%b value="([^"]*)"' % HEADER.encode(), description)
    header = Header.read(text and html.unescape(text[1].decode(errors="replace")), file, "openvino")
    unsigned = description.replace(header.sha256.encode(), UNSIGNED.encode(), 1)
    header.check(openvino_content(unsigned, weights), file, beside)
    openvino = load_openvino()
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(description, weights), "CPU", SETTINGS)
    except Exception as error:  # OpenVINO's errors share no public class
        raise UserError(f"OpenVINO {openvino.__version__} can't run it ({one_line(error)})", file=file) from None

    def run(names: list[str], images: np.ndarray) -> list[np.ndarray]:
        outputs = compiled({INPUT: images})
        return [outputs[name] for name in names]

    return _classifier(run, header.card, file)
