"""Exported models beside float32: each is timed in processes of its own, round after round."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from peft_vit.base.console import OnProgress, no_progress
from peft_vit.base.errors import UserError
from peft_vit.base.extras import require_extra
from peft_vit.core.backbones.catalog import create_skeleton
from peft_vit.core.config import EXPORTS, exported_bytes, exported_format
from peft_vit.core.records import BenchRow
from peft_vit.deploy import ExportMetadata, merge, open_exported, save_low_bit
from peft_vit.deploy.measures.timing import export_random, time_alone
from peft_vit.deploy.restore import restore_run
from peft_vit.runs.records.storage import RECORD_FILE, single_run, tuned_model
from peft_vit.runs.this_machine.machine import cpu_count, processor_name

RANDOM_FLOAT32 = "float32 made here"
_FLOAT32_BYTES = 4
_MOST_OF = 0.95  # of the bytes of all parameters in float32, which any file of float32 weights holds


class _Model(NamedTuple):
    """A model to be timed."""

    name: str  # what the user called it
    file: Path  # what is opened
    card: ExportMetadata
    run: str | None

    @property
    def format(self) -> str:
        format = exported_format(self.file)
        assert format is not None
        return format

    @property
    def is_float32(self) -> bool:
        """Tell whether its files hold all weights in float32, by their size: quantized ones take less."""
        plain = create_skeleton(self.card.architecture, self.card.image_size, len(self.card.class_names))
        return exported_bytes(self.file) >= _MOST_OF * _FLOAT32_BYTES * sum(p.numel() for p in plain.parameters())


def bench(
    models: Sequence[Path],
    *,
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (),
    rounds: int = 20,
    repeats: int = 3,
    alone: bool = False,
    on_progress: OnProgress = no_progress,
) -> list[BenchRow]:
    """Time models in `repeats` rounds of fresh processes, one at a time; return a row for each number of threads,
    batch size and model, in that order.

    Without a float32 model among them (.onnx, .xml or .safetensors), the architecture of the first is exported to ONNX
    with random weights, which take the same time as trained ones, and timed beside them.

    Args:
        models: what `peft-vit export` has written but for PEFT folders, or runs' folders, whose merged models are timed
            as .safetensors files.
        batches: images a call.
        threads: of a process; default: as many as processors.
        rounds: calls of each batch size in a process that are timed.
        repeats: processes of each model and number of threads.
        alone: time them once each, and nothing beside them.
        on_progress: gets how many processes have ended, and of how many.

    Raises:
        UserError: if a model can't be opened or timed, threads are more than processors, or float32 can't be made.
    """
    threads = tuple(threads) or (cpu_count(),)
    if max(threads) > cpu_count():
        raise UserError(f"expected at most {cpu_count()}, the processors here; got {max(threads)}", field="--threads")
    with tempfile.TemporaryDirectory() as folder:
        opened = [_opened(path, Path(folder)) for path in models]
        repeats = 1 if alone else repeats
        if not (alone or any(model.is_float32 for model in opened)):
            try:
                require_extra("onnx", "ONNX export")
            except UserError as error:
                message = f"no float32 model is named, and none can be made: {error.message}"
                raise UserError(message, file=opened[0].name) from None
            file, card = Path(folder, "float32.onnx"), opened[0].card
            export_random(card, file)
            opened = [_Model(RANDOM_FLOAT32, file, card, None), *opened]
        # Seconds and processor seconds of calls, by threads, batch size and place of the model.
        calls: dict[tuple[int, int, int], tuple[list[float], list[float]]] = {}
        order = [(count, place) for _ in range(repeats) for count in threads for place in range(len(opened))]
        for done, (count, place) in enumerate(order):
            on_progress(done, len(order))
            for batch, timings in time_alone(opened[place].file, batches, threads=count, rounds=rounds).items():
                seconds, processor_s = calls.setdefault((count, batch, place), ([], []))
                seconds += timings.seconds
                processor_s += timings.processor_s
        base = [place for place, model in enumerate(opened) if model.is_float32] or range(len(opened))
        quartiles = {key: np.quantile(seconds, (0.25, 0.5, 0.75)).tolist() for key, (seconds, _) in calls.items()}
        rows = []
        for count, batch, place in sorted(calls):
            model, (seconds, processor_s) = opened[place], calls[count, batch, place]
            low, median, high = quartiles[count, batch, place]
            base_s, base_name = min((quartiles[count, batch, other][1], opened[other].name) for other in base)
            runtime = EXPORTS[model.format].runtime
            rows.append(
                BenchRow(
                    file=model.name,
                    format=model.format,
                    bytes=exported_bytes(model.file),
                    run=model.run,
                    threads=count,
                    batch=batch,
                    calls=len(seconds),
                    median_s=median,
                    low_s=low,
                    high_s=high,
                    processor_s=statistics.median(processor_s),
                    ratio=median / base_s,
                    over=base_name,
                    images_per_s=batch / median,
                    processor=processor_name(),
                    runtime=f"{runtime} {metadata.version(runtime)}",
                )
            )
        return rows


def _opened(path: Path, folder: Path) -> _Model:
    """Open a model as `predict` does, which checks its hash, and merge a run's."""
    if exported_format(path) == "peft":
        raise UserError("is an adapter without its base; name its run's folder, whose merged model is timed", file=path)
    model = tuned_model(path) or path
    if not os.path.isfile(single_run(model) / RECORD_FILE):
        card = open_exported(model).card
        return _Model(str(path), model, card, card.run)
    run = restore_run(path)
    file = folder / f"{len(os.listdir(folder))}.safetensors"
    save_low_bit(merge(run.model, run.card).model, file, run.card, run.reference)
    return _Model(str(path), file, run.card, run.card.run)
