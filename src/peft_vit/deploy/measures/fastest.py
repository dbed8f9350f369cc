"""The chosen model in every form that can be written here, and the fastest that keeps within the limits."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from peft_vit.base.errors import UserError
from peft_vit.base.extras import missing_packages
from peft_vit.core.config import QuantizationType, exported_bytes
from peft_vit.core.records import BenchRow, Calibrated, Decision
from peft_vit.deploy import OnnxRuntime
from peft_vit.deploy.export import (
    LARGEST_LOSS,
    Comparison,
    ModelToWrite,
    OnnxOptions,
    compare_int8,
    model_to_write,
    write_model,
)
from peft_vit.deploy.measures.bench import MADE, bench
from peft_vit.runs.records.storage import RECORD_FILE, read_record

_INT8_FOLDS = 5  # runs on folds that tell what 8 bits lose, at most: each takes a calibration and an export
_AS_FAST = 1.1  # times the seconds of the fastest: less is within the scatter of medians
_TRIALS = ".forms-"
_EVERYTHING = 100.0  # points: what was lost on folds has decided already


_NONE = OnnxOptions()


@dataclass(frozen=True)
class Form:
    """One way to write the model.

    Attributes:
        name: what it is.
        options: with which `peft-vit export` writes it.
        bytes: of its files; None: it was not written.
        median_s: of a call on one image, with all processors; None: it was not timed.
        low_s: first quartile of the calls.
        high_s: third quartile.
        comparison: with the run's model, in float; None: it was not written, or the images are not there.
        left_out: why it is not the one that was taken; empty: it is.
    """

    name: str
    options: str
    bytes: int | None = None
    median_s: float | None = None
    low_s: float | None = None
    high_s: float | None = None
    comparison: Comparison | None = None
    left_out: str = ""


@dataclass(frozen=True)
class Exports:
    """What was written.

    Attributes:
        model: the file that was taken; of an .xml the .bin is beside it.
        forms: all that were tried.
        float32_s: median of a call of the same architecture in float32 by onnxruntime, on the same machine.
        processor: that all were timed on.
        int8_loss: share of accuracy that activations in 8 bits lose on folds; None: not measured.
        missed: sentences on limits that no form meets.
    """

    model: Path
    forms: tuple[Form, ...]
    float32_s: float | None
    processor: str
    int8_loss: float | None
    missed: tuple[str, ...]

    @property
    def taken(self) -> Form:
        """Return the form that was taken."""
        return next(form for form in self.forms if not form.left_out)


@dataclass(frozen=True)
class _Way:
    form: Form
    format: str
    options: OnnxOptions = _NONE

    @property
    def ending(self) -> str:
        return ".xml" if self.format == "openvino" else ".onnx"


def export_fastest(
    run_dir: Path,
    folder: Path,
    *,
    meaning: Calibrated | Decision | None,
    bits: QuantizationType | None = None,
    fold_runs: Sequence[Path] = (),
    max_bytes: int | None = None,
    max_latency_s: float | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Exports:
    """Write a run's model in every exact form, time them in turn, and keep the fastest that is within the limits.

    Activations in 8 bits make another model than the one that was compared and tested. They are tried only where no
    exact form keeps within `max_latency_s`, and taken only if they lose at most LARGEST_LOSS points on images of folds.

    Args:
        run_dir: holds record.json and adapter.safetensors.
        folder: gets model.onnx, or model.xml and model.bin; what is there under these names is replaced.
        meaning: what the file says that its outputs mean.
        bits: to which float weights are rounded; None: they are written as the run has them.
        fold_runs: folders of runs of the same method on folds; none: activations stay in float.
        max_bytes: of the model's files.
        max_latency_s: of one image, median.
        tell: gets what is done.

    Raises:
        UserError: if the run can't be restored, no form can be written, or none can be timed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_TRIALS}*"):  # by a call that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=_TRIALS) as place:
        packed, lost = bits is not None or read_record(run_dir / RECORD_FILE).quantization is not None, None
        forms: dict[Path, Form] = {}
        try:
            source = model_to_write(run_dir, bits)
        except UserError as error:
            raise UserError(
                f"can't be exported ({error.message}); the same command tries it again", file=run_dir
            ) from None
        write = partial(_written, source=source, meaning=meaning)
        try_ways = partial(_try_ways, forms=forms, write=write, place=Path(place), tell=tell)
        rows = try_ways(_exact_ways(packed, bits))
        if not rows:
            reasons = "; ".join(f"{form.name}: {form.left_out}" for form in forms.values())
            raise UserError(f"can't be exported ({reasons}); the same command tries it again", file=run_dir)
        if packed and bits is None and max_latency_s is not None and _fastest_s(forms, max_bytes) > max_latency_s:
            int8, lost = _int8(fold_runs, tell)
            rows |= try_ways([int8])
        written = {file: form for file, form in forms.items() if form.bytes is not None}
        best, missed = _best(written, max_bytes, max_latency_s)
        for file, form in written.items():
            if file != best:
                forms[file] = replace(form, left_out=_why_not(form, forms[best], max_bytes))
        return Exports(
            model=_moved(best, folder),
            forms=tuple(forms.values()),
            float32_s=rows[MADE].median_s if MADE in rows else None,
            processor=next(iter(rows.values())).processor,
            int8_loss=lost,
            missed=missed,
        )


def _try_ways(
    ways: Sequence[_Way],
    forms: dict[Path, Form],
    write: Callable[[_Way, Path], Form],
    place: Path,
    tell: Callable[[str], None],
) -> dict[str, BenchRow]:
    """Write the model in these ways, time them, and add them to the forms; return what was timed, by file."""
    for way in ways:
        file = place / f"{len(forms)}{way.ending}"
        forms[file] = write(way, file)
    new = [file for file, form in forms.items() if form.bytes is not None and form.median_s is None]
    if not new:
        return {}
    tell("timing " + ", ".join(forms[file].name for file in new))
    rows = {row.file: row for row in bench(new)}
    for file in new:
        row = rows[str(file)]
        forms[file] = replace(forms[file], median_s=row.median_s, low_s=row.low_s, high_s=row.high_s)
    return rows


def _exact_ways(packed: bool, bits: QuantizationType | None) -> list[_Way]:
    """Return the ways to write a model, of low bits or not, that change no prediction of it."""
    rounded = "" if bits is None else f" --bits {bits}"
    if packed:
        what: dict[OnnxRuntime, str] = {"small": "packed in memory, too", "fast": "expanded when it is loaded"}
        ways = [
            _Way(
                Form(f"ONNX, codes {said}", f"--format onnx --runtime {runtime}{rounded}"), "onnx", OnnxOptions(runtime)
            )
            for runtime, said in what.items()
        ]
    else:
        ways = [_Way(Form("ONNX", "--format onnx"), "onnx")]
    if not missing_packages("openvino"):
        ways.append(_Way(Form("OpenVINO", f"--format openvino{rounded}"), "openvino"))
    return ways


def _fastest_s(forms: Mapping[Path, Form], max_bytes: int | None) -> float:
    """Return the seconds of the fastest form within the limit of bytes."""
    within = [
        form.median_s
        for form in forms.values()
        if form.bytes is not None and form.median_s is not None and (max_bytes is None or form.bytes <= max_bytes)
    ]
    return min(within, default=math.inf)


def _int8(fold_runs: Sequence[Path], tell: Callable[[str], None]) -> tuple[_Way, float | None]:
    """Return the form with activations in 8 bits, left out if it loses too much on folds."""
    form = Form("ONNX, activations in 8 bits", "--format onnx --activations int8")
    if not fold_runs:
        return _Way(
            replace(form, left_out="its loss can't be measured, since there are no runs on folds"), "onnx"
        ), None
    tell("measuring what activations in 8 bits lose, on folds")
    try:
        found = [compare_int8(run) for run in fold_runs[:_INT8_FOLDS]]
    except UserError as error:
        return _Way(replace(form, left_out=error.message), "onnx"), None
    images = sum(one.images for one in found)
    lost = sum(one.images * one.lost_points for one in found) / images / 100
    if 100 * lost > LARGEST_LOSS:
        said = f"it loses {100 * lost:.1f} points on {images} images of folds, and {LARGEST_LOSS:g} are accepted"
        return _Way(replace(form, left_out=said), "onnx"), lost
    return _Way(form, "onnx", OnnxOptions(activations="int8", accept_loss=_EVERYTHING)), lost


def _written(way: _Way, file: Path, source: ModelToWrite, meaning: Calibrated | Decision | None) -> Form:
    if way.form.left_out:
        return way.form
    try:
        done = write_model(source, file, way.format, way.options, meaning)
    except UserError as error:  # a format that one of the runtimes has not
        return replace(way.form, left_out=error.message)
    return replace(way.form, bytes=exported_bytes(file), comparison=done.comparison)


def _best(forms: dict[Path, Form], max_bytes: int | None, max_latency_s: float | None) -> tuple[Path, tuple[str, ...]]:
    """Return the fastest form within the limit of bytes, or else the smallest, and which limits it misses.

    Of those that are as fast the smallest.
    """

    def seconds(file: Path) -> float:
        found = forms[file].median_s
        assert found is not None
        return found

    def size(file: Path) -> int:
        found = forms[file].bytes
        assert found is not None
        return found

    small = [file for file in forms if max_bytes is None or size(file) <= max_bytes]
    fastest = min(map(seconds, small), default=0.0)
    as_fast = _AS_FAST * fastest
    if max_latency_s is not None and fastest <= max_latency_s:
        as_fast = min(as_fast, max_latency_s)
    best = min((file for file in small or forms if not small or seconds(file) <= as_fast), key=size)
    missed = []
    if max_bytes is not None and size(best) > max_bytes:
        missed.append(f"No form keeps within {max_bytes / 1e6:g} MB: the smallest takes {size(best) / 1e6:.2f} MB.")
    if max_latency_s is not None and seconds(best) > max_latency_s:
        which = "No form that is small enough keeps" if small else "The smallest form does not keep"
        if min(map(seconds, forms)) > max_latency_s:
            which = "No form keeps"
        missed.append(f"{which} within {1e3 * max_latency_s:g} ms an image: it needs {1e3 * seconds(best):.1f} ms.")
    return best, tuple(missed)


def _why_not(form: Form, taken: Form, max_bytes: int | None) -> str:
    assert form.bytes is not None
    assert taken.bytes is not None
    if max_bytes is not None and max_bytes < form.bytes and form.bytes > taken.bytes:
        return "it is larger than the limit"
    assert form.median_s is not None
    assert taken.median_s is not None
    return "slower" if form.median_s > taken.median_s else "as fast, and larger"


def _moved(file: Path, folder: Path) -> Path:
    """Put the model under its name, and take away what stood there of an earlier call."""
    for name in ("model.onnx", "model.xml", "model.bin"):
        (folder / name).unlink(missing_ok=True)
    model = folder / f"model{file.suffix}"
    if file.suffix == ".xml":
        os.replace(file.with_suffix(".bin"), model.with_suffix(".bin"))
    os.replace(file, model)
    return model
