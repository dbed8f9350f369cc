"""Metrics of finished runs as event files that TensorBoard shows, made from records alone and as often as wanted."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from datetime import datetime
from itertools import accumulate
from pathlib import Path

from peft_vit.base.errors import UserError
from peft_vit.base.extras import require_extra
from peft_vit.base.files import folder_below, write_atomically
from peft_vit.core.records import Metrics, RunRecord
from peft_vit.runs.records.scan import read_records

EVENTS_FILE = "events.out.tfevents.peft-vit"  # TensorBoard looks for "tfevents"; one name, so that a file is replaced
_VERSION = "brain.Event:2"  # what an event file's first record says


def export_to_tensorboard(results_dir: Path, log_dir: Path) -> int:
    """Write one event file a finished run, below a folder of the run's name, and return the number of runs.

    A study that continues may be exported again: files are replaced, those of runs that were there stay as they are.

    Args:
        results_dir: a results directory, or one run's folder.
        log_dir: what `tensorboard --logdir` is given.

    Raises:
        UserError: if there is no record of a finished run, if one can't be read, if a run occurs twice, or if the
            package tensorboard is missing.
    """
    require_extra("tensorboard", field="--format tensorboard")
    names: set[str] = set()
    for record in read_records(results_dir):
        if not record.steps:
            continue
        name = record.spec.run_id
        if name in names:
            raise UserError(f"holds the run {name!r} twice; give the directory of one set of results", file=results_dir)
        names.add(name)
        file = folder_below(log_dir, name) / EVENTS_FILE
        try:
            write_atomically(file, event_bytes(record))
        except OSError as error:
            raise UserError(f"can't be written ({error.strerror}); choose another folder", file=file) from None
    if not names:
        raise UserError("no run is finished yet, so there is nothing to show", file=results_dir)
    return len(names)


def event_bytes(record: RunRecord) -> bytes:
    """Return the content of a run's event file: each step's scalars, at the time when it was made."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    started = datetime.fromisoformat(record.started_at).timestamp()
    seconds = accumulate(row.seconds for row in record.steps)
    ends = {row.step: end for row, end in zip(record.steps, seconds, strict=True)}
    content = io.BytesIO()
    writer = RecordWriter(content)
    writer.write(Event(wall_time=started, file_version=_VERSION).SerializeToString())
    for step, values in _scalars(record):
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        time = started + ends.get(step, 0.0)
        writer.write(Event(wall_time=time, step=step, summary=summary).SerializeToString())
    return content.getvalue()


def _scalars(record: RunRecord) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield a step and what is known of it, by tag; a step may come several times."""
    for row in record.steps:
        values = {
            "train/loss": row.loss,
            "train/learning_rate": row.learning_rate,
            "train/gradient_norm": row.gradient_norm,
            "train/seconds": row.seconds,
            **{f"train/penalty/{name}": value for name, value in row.penalties.items()},
        }
        if row.quantized_share is not None:
            values["train/quantized_share"] = row.quantized_share
        yield row.step, values
    for evaluation in record.evaluations:
        yield evaluation.step, _metrics("validation", evaluation.metrics)
    if record.test is not None and record.chosen_step is not None:
        yield record.chosen_step, _metrics("test", record.test)
    for entry in record.rank_history:
        ranks = {f"rank/{site}": float(rank) for site, rank in entry.ranks.items()}
        yield entry.step, {"rank/mean": sum(entry.ranks.values()) / len(entry.ranks), **ranks}
    weights = _weights(record)
    for bits in record.bits_history:
        stored = sum(count * weights[layer] for layer, count in bits.bits_per_weight.items())
        yield bits.step, {"bits/mean": stored / sum(weights[layer] for layer in bits.bits_per_weight)}


def _metrics(split: str, metrics: Metrics) -> dict[str, float]:
    numbers = metrics.model_dump(exclude={"n"})
    return {f"{split}/{name}": value for name, value in numbers.items() if value is not None and math.isfinite(value)}


def _weights(record: RunRecord) -> dict[str, int]:
    """Return the weights of each quantized layer; of a record that does not say it, one each."""
    size = None if record.quantization is None else record.quantization.size
    layers = {layer for entry in record.bits_history for layer in entry.bits_per_weight}
    return dict.fromkeys(layers, 1) if size is None else {name: layer.weights for name, layer in size.layers.items()}
