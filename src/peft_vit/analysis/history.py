"""Scores and ranks of every site at every update, of all runs in one tidy table, as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft_vit.analysis.results import load_studies
from peft_vit.errors import UserError
from peft_vit.extras import require_extra
from peft_vit.records import as_csv, history_rows, write_atomically

_ENDINGS = (".parquet", ".json", ".csv")


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
    ending = file.suffix.lower()
    if ending not in _ENDINGS:
        raise UserError(f"expected a name that ends in {', '.join(_ENDINGS)}", file=file)
    if ending == ".parquet":
        require_extra("parquet", file=file)
    rows = history_table(results_dir)
    try:
        write_atomically(file, _content(rows, ending))
    except OSError as error:
        raise UserError(f"can't be written ({error.strerror}); choose another file", file=file) from None
    return len(rows)


def _content(rows: list[dict[str, Any]], ending: str) -> bytes:
    if ending == ".csv":
        return as_csv(rows).encode()
    if ending == ".json":
        return (json.dumps(rows, indent=0) + "\n").encode()
    import pandas

    may_be_empty = {"rank": "Int64", "budget": "Int64", "score": "float64"}
    content: bytes = pandas.DataFrame(rows).astype(may_be_empty).to_parquet(engine="pyarrow", index=False)
    return content
