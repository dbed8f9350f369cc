"""The chosen model in every form that can be written here, and the fastest that keeps within the limits."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from peft_vit.base.errors import UserError
from peft_vit.base.extras import missing_packages
from peft_vit.core.config import EXPORTS, QuantizationType
from peft_vit.core.records import BenchRow, Calibrated, Decision
from peft_vit.deploy.export import Comparison, OnnxOptions, model_to_write, write_model
from peft_vit.deploy.measures.bench import RANDOM_FLOAT32, bench
from peft_vit.runs.records.storage import RECORD_FILE, read_record

_AS_FAST = 1.1  # times the seconds of the fastest: less is within the scatter of medians
_TRIALS = ".forms-"


@dataclass(frozen=True)
class Form:
    """One way to write the model.

    Attributes:
        name: what it is.
        timed: its bytes, and what a call on one image takes with all processors; None: it was not written.
        comparison: with the run's model, in float; None: it was not written, or the images are not there.
        left_out: why it is not the one that was taken; empty: it is.
    """

    name: str
    timed: BenchRow | None = None
    comparison: Comparison | None = None
    left_out: str = ""


@dataclass(frozen=True)
class Exports:
    """What was written.

    Attributes:
        model: the file that was taken; of an .xml the .bin is beside it.
        forms: all that were tried.
        float32_s: median of a call of the same architecture in float32 by onnxruntime, on the same machine.
        missed: sentences on limits that no form meets.
    """

    model: Path
    forms: tuple[Form, ...]
    float32_s: float | None
    missed: tuple[str, ...]

    @property
    def taken(self) -> Form:
        """Return the form that was taken."""
        return next(form for form in self.forms if not form.left_out)

    @property
    def timed(self) -> BenchRow:
        """Return the bytes of the form that was taken, and its times."""
        assert self.taken.timed is not None
        return self.taken.timed


def export_fastest(
    run_dir: Path,
    folder: Path,
    *,
    meaning: Calibrated | Decision | None,
    bits: QuantizationType | None = None,
    max_bytes: int | None = None,
    max_latency_s: float | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Exports:
    """Write a run's model in the form that is usually the fastest; with a limit of latency in the one that is it here.

    Without a limit of latency the next form is written only where that one is too large, and nothing is timed beside
    it. With one every form is written and timed in turn, and the fastest within the limits is kept, ONNX first.

    Args:
        run_dir: holds record.json and adapter.safetensors.
        folder: gets model.onnx, or model.xml and model.bin; what is there under these names is replaced.
        meaning: what the file says that its outputs mean.
        bits: to which float weights are rounded; None: they are written as the run has them.
        max_bytes: of the model's files.
        max_latency_s: of one image, median.
        tell: gets what is done.

    Raises:
        UserError: if the run can't be restored, no form can be written, or none can be timed.
    """
    most_bytes = math.inf if max_bytes is None else max_bytes
    folder.mkdir(parents=True, exist_ok=True)
    for trials in folder.glob(f"{_TRIALS}*"):  # of a call that was killed
        shutil.rmtree(trials, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=_TRIALS) as place:
        packed = bits is not None or read_record(run_dir / RECORD_FILE).quantization is not None
        again = "the same command tries it again"
        try:
            source = model_to_write(run_dir, bits)
        except UserError as error:
            raise UserError(f"can't be exported ({error.message}); {again}", file=run_dir) from None
        forms: dict[Path, Form] = {}
        rows: dict[Path, BenchRow] = {}  # of those that were written
        ways, float32_s = list(_exact_ways(packed)), None
        for together in [[way] for way in ways] if max_latency_s is None else [ways]:
            written = []
            for name, format, options in together:
                file = Path(place, f"{len(forms)}{EXPORTS[format].ending}")
                try:
                    forms[file] = Form(name, comparison=write_model(source, file, format, options, meaning).comparison)
                    written.append(file)
                except UserError as error:  # a format that one of the runtimes has not
                    forms[file] = Form(name, left_out=error.message)
            if written:
                tell("timing " + ", ".join(forms[file].name for file in written))
                timed = {row.file: row for row in bench(written, alone=max_latency_s is None)}
                rows |= {file: timed[str(file)] for file in written}
                float32_s = timed[RANDOM_FLOAT32].median_s if RANDOM_FLOAT32 in timed else None
            if any(row.bytes <= most_bytes for row in rows.values()):
                break
        if not rows:
            reasons = "; ".join(f"{form.name}: {form.left_out}" for form in forms.values())
            raise UserError(f"can't be exported ({reasons}); {again}", file=run_dir)
        best, missed = _best(rows, most_bytes, max_latency_s or math.inf)
        for file, row in rows.items():
            why = "slower" if row.median_s > rows[best].median_s else "as fast, and larger"
            if file == best:
                why = ""
            elif row.bytes > max(most_bytes, rows[best].bytes):
                why = "it is larger than the limit"
            elif row.median_s < rows[best].median_s and file.suffix != best.suffix:
                why = "ONNX keeps within the limits, too, so the model keeps its name"
            forms[file] = replace(forms[file], timed=row, left_out=why)
        return Exports(model=_moved(best, folder), forms=tuple(forms.values()), float32_s=float32_s, missed=missed)


def _exact_ways(packed: bool) -> Iterable[tuple[str, str, OnnxOptions]]:
    """Yield name, format and options of the ways to write a model that change no prediction, usually fastest first."""
    if packed:
        yield "ONNX, codes expanded when it is loaded", "onnx", OnnxOptions("fast")
        yield "ONNX, codes packed in memory, too", "onnx", OnnxOptions("small")
    else:
        yield "ONNX", "onnx", OnnxOptions()
    if not missing_packages("openvino"):
        yield "OpenVINO", "openvino", OnnxOptions()


def _best(rows: Mapping[Path, BenchRow], most_bytes: float, longest_s: float) -> tuple[Path, tuple[str, ...]]:
    """Return the fastest form within the limit of bytes, or else the smallest, and which limits it misses.

    Of those that are as fast the smallest. Where ONNX keeps within both limits it is that, so that the model has the
    same name in each call, whatever a timing says.
    """
    within = {file: row for file, row in rows.items() if row.bytes <= most_bytes}
    in_time = {file: row for file, row in within.items() if row.median_s <= longest_s}
    within = {file: row for file, row in in_time.items() if file.suffix == ".onnx"} or in_time or within
    fastest = min((row.median_s for row in within.values()), default=0.0)
    as_fast = [file for file, row in within.items() if row.median_s <= _AS_FAST * fastest]
    best = min(as_fast or rows, key=lambda file: rows[file].bytes)
    missed = []
    if not within:
        missed.append(
            f"No form keeps within {most_bytes / 1e6:g} MB: the smallest takes {rows[best].bytes / 1e6:.2f} MB."
        )
    if (taken_s := rows[best].median_s) > longest_s:
        which = "No form that is small enough keeps" if within else "The smallest form does not keep"
        if min(row.median_s for row in rows.values()) > longest_s:
            which = "No form keeps"
        missed.append(
            f"{which} within {1e3 * longest_s:g} ms an image: it needs {1e3 * taken_s:.1f} ms. Faster: "
            "smaller images (--image-size), or peft-vit export --activations int8, which says what it loses."
        )
    return best, tuple(missed)


def _moved(file: Path, folder: Path) -> Path:
    """Put the model under its name, and take away what stood there of an earlier call."""
    for name in ("model.onnx", "model.xml", "model.bin"):
        (folder / name).unlink(missing_ok=True)
    model = folder / f"model{file.suffix}"
    if file.suffix == ".xml":
        os.replace(file.with_suffix(".bin"), model.with_suffix(".bin"))
    os.replace(file, model)
    return model
