"""A run whose record and adapter are written, as the driver of a study does it."""

import json
from pathlib import Path

from peft_vit.records import RECORD_FILE, RunRecord, RunSpec, read_record, run_folder, write_result
from peft_vit.runs.execute import run_one


def run_and_write(spec: RunSpec, folder: Path) -> RunRecord:
    """Do one run in this process, write what came out, and return its record."""
    finished = run_one(spec)
    write_result(folder, finished.record, finished.adapter)
    return finished.record


def read_without(field: str, record: RunRecord, folder: Path) -> RunRecord:
    """Take a field out of a written record, as if it were from before there was one, and read it."""
    file = run_folder(folder, record.spec) / RECORD_FILE
    older = json.loads(file.read_text())
    del older[field]
    file.write_text(json.dumps(older))
    return read_record(file)
