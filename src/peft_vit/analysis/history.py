"""Scores and ranks of every site at every update, of all runs in one tidy table, as a file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_vit.analysis.results import load_studies
from peft_vit.errors import UserError
from peft_vit.extras import require_extra
from peft_vit.records import history_rows, write_atomically


def history_table(results_dir: Path) -> list[dict[str, Any]]:
    """Return one row a run, step and site, with the columns of `records.history_rows`, of a results or a run's folder.

    Raises:
        UserError: if there is no record, if one can't be read, if a run stands twice, or if no run has adapters.
    """
    rows = [
        {"study": study.name, "smoke": study.smoke, "experiment": run.experiment.name, "seed": run.seed, **row}
        for study in load_studies(results_dir)
        for run in study.runs
        for record in [run.record]
        for row in history_rows(record.sites, record.rank_history, record.importance_history, record.probe_history)
    ]
    if not rows:
        raise UserError("no finished run with adapters, so there is no history to write", file=results_dir)
    return rows


def export_history(results_dir: Path, file: Path) -> int:
    """Write the table as the file's ending says, and return its number of rows.

    Parquet holds empty values as null; CSV leaves them empty; JSON is a list of objects.

    Raises:
        UserError: as in `history_table`; for another ending, if Parquet can't be written for want of pyarrow, or if
            the file can't be written.
    """
    write = _WRITERS.get(file.suffix.lower())
    if write is None:
        raise UserError(f"expected a name that ends in {', '.join(_WRITERS)}", file=file)
    if write is _as_parquet:
        require_extra("parquet", file=file)
    rows = history_table(results_dir)
    try:
        write_atomically(file, write(rows))
    except OSError as error:
        raise UserError(f"can't be written ({error.strerror}); choose another file", file=file) from None
    return len(rows)


def _as_parquet(rows: list[dict[str, Any]]) -> bytes:
    import pandas

    may_be_empty = {"rank": "Int64", "budget": "Int64", "score": "float64"}
    content: bytes = pandas.DataFrame(rows).astype(may_be_empty).to_parquet(engine="pyarrow", index=False)
    return content


def _as_json(rows: list[dict[str, Any]]) -> bytes:
    return (json.dumps(rows, indent=0) + "\n").encode()


def _as_csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


_WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".parquet": _as_parquet,
    ".json": _as_json,
    ".csv": _as_csv,
}
