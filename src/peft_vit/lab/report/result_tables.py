"""Results as tables of pandas, with the values that records hold and reports compute, and as files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_vit.base.errors import UserError
from peft_vit.base.extras import require_extra
from peft_vit.core.records import history_rows
from peft_vit.deploy.page.document import interval_columns
from peft_vit.deploy.page.printed import check_rows_file, frame, write_rows
from peft_vit.lab.analysis import Run, Study, compare_with_references, load_studies, read_results
from peft_vit.lab.report.study_tables import comparison_values
from peft_vit.runs.records.run_rows import RUN_COLUMNS, run_row

if TYPE_CHECKING:
    from pandas import DataFrame

# Columns, with the types of those that may be empty, as RUN_COLUMNS are.
_STUDY = dict.fromkeys(("study", "smoke", "experiment"))
_RANK_COLUMNS: Mapping[str, str | None] = {
    **_STUDY,
    **dict.fromkeys(("seed", "site", "block", "matrix", "in_features", "out_features")),
    "rank": "Int64",
    "score": "float64",
}
_COMPARISON_COLUMNS: Mapping[str, str | None] = {
    **_STUDY,
    "reference": None,
    **dict.fromkeys(("difference", "difference_low", "difference_high"), "float64"),
    "n": None,
    **dict.fromkeys(("p_value", "p_holm"), "float64"),
    "needed_n": "Int64",
    **dict.fromkeys(("verdict", "note")),
}


@dataclass(frozen=True, eq=False, repr=False)
class ResultTables:
    """What studies came to. Shares are from 0 to 1; NaN or NA is where there is nothing.

    Attributes:
        runs: a row a run with a record, with the columns `study`, `experiment`, `method`, `seed`, `state` (done or
            failed), `test_accuracy`, `test_balanced_accuracy`, `test_nll` (nats), `parameters_final` (trainable, head
            included), `frozen_bytes`, `adapter_file_bytes`, `seconds`, ...
        ranks: a row a finished run and adapted site: its `rank` at the end, and the last `score` that decided on it.
        comparisons: a row an experiment and a reference: the mean `difference` in test accuracy of runs that share a
            seed with its 95 % interval, `n` pairs, the p-value before and after Holm's correction, and the verdict on
            "is more accurate". As in reports, references are the linear probe and LoRA.
        notices: what has to be known before a number is believed, a sentence each that begins with its study.
    """

    runs: DataFrame
    ranks: DataFrame
    comparisons: DataFrame
    notices: tuple[str, ...]

    def __repr__(self) -> str:
        return f"ResultTables: {len(self.runs)} runs, {len(self.ranks)} ranks, {len(self.comparisons)} comparisons"


def read_tables(directory: Path) -> ResultTables:
    """Read all results below a directory; warn of each file that may be a result and can't be read.

    Raises:
        UserError: if the directory does not exist, or if nothing in it can be read.
    """
    results = read_results(directory)
    for fault in results.problems:
        if fault.left_out:
            warnings.warn(fault.line(directory), stacklevel=3)
    runs, ranks, comparisons = [], [], []
    for study in results.studies:
        runs += [run_row(record) for record in (*(run.record for run in study.runs), *study.failed)]
        for run in study.runs:
            rows = _history(study, run)
            ranks += [row for row in rows if row["step"] == rows[-1]["step"]]
        comparisons += [
            {"study": study.name, "smoke": study.smoke, "experiment": c.name, "reference": c.reference}
            | interval_columns("difference", c.interval)
            | comparison_values(c)
            for c in compare_with_references(study)
        ]
    return ResultTables(
        runs=frame(runs, RUN_COLUMNS),
        ranks=frame(ranks, _RANK_COLUMNS),
        comparisons=frame(comparisons, _COMPARISON_COLUMNS),
        notices=tuple(f"{study.label}: {notice}" for study in results.studies for notice in study.notices),
    )


def _history(study: Study, run: Run) -> list[dict[str, Any]]:
    key = {"study": study.name, "smoke": study.smoke, "experiment": run.experiment.name, "seed": run.seed}
    record = run.record
    rows = history_rows(record.sites, record.rank_history, record.importance_history, record.probe_history)
    return [key | row for row in rows]


def history_table(results_dir: Path) -> list[dict[str, Any]]:
    """Return one row a run, step and site, with the columns of `records.history_rows`, of a results or a run's folder.

    Raises:
        UserError: if there is no record, if one can't be read, if a run occurs twice, or if no run has adapters.
    """
    rows = [row for study in load_studies(results_dir) for run in study.runs for row in _history(study, run)]
    if not rows:
        raise UserError("no finished run with adapters, so there is no history to write", file=results_dir)
    return rows


def export_history(results_dir: Path, file: Path, *, overwrite: bool = False) -> int:
    """Write that table as the file's ending says, and return its number of rows.

    Raises:
        UserError: as in `history_table`; for another ending, a file that is there, unless it is to be overwritten, if
            Parquet can't be written for lack of pyarrow, or if the file can't be written.
    """
    check_rows_file(file, (".parquet", ".json", ".csv"), overwrite=overwrite)
    if file.suffix.lower() == ".parquet":
        require_extra("parquet", file=file)
    rows = history_table(results_dir)
    write_rows(rows, file, dict.fromkeys(rows[0]) | {"rank": "Int64", "budget": "Int64", "score": "float64"})
    return len(rows)
