"""A run whose record and adapter are written, as the driver of a study does it."""

from pathlib import Path

from peft_vit.experiments.run import run_one
from peft_vit.records import RunRecord, RunSpec, write_result


def run_and_write(spec: RunSpec, folder: Path) -> RunRecord:
    """Do one run in this process, write what came out, and return its record."""
    finished = run_one(spec)
    write_result(folder, finished.record, finished.adapter)
    return finished.record
