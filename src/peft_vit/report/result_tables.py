"""Results as tables of pandas, with the values that records hold and reports compute; as HTML for a notebook."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_vit.analysis import Estimate, Study, compare_with_references, method_results, read_results
from peft_vit.records import RUN_COLUMNS, history_rows, run_row
from peft_vit.report.document import Table
from peft_vit.report.tables import accuracy_table, comparison_table, comparison_values, ends

if TYPE_CHECKING:
    from pandas import DataFrame

# Columns, with the types of those that may be empty, as RUN_COLUMNS are.
_STUDY = {"study": None, "smoke": None}
_RANK_COLUMNS: Mapping[str, str | None] = {
    **_STUDY,
    "experiment": None,
    "seed": None,
    "site": None,
    "block": None,
    "matrix": None,
    "in_features": None,
    "out_features": None,
    "rank": "Int64",
    "score": "float64",
}
_COMPARISON_COLUMNS: Mapping[str, str | None] = {
    **_STUDY,
    "experiment": None,
    "reference": None,
    "difference": "float64",
    "difference_low": "float64",
    "difference_high": "float64",
    "n": None,
    "p_value": "float64",
    "p_holm": "float64",
    "needed_n": "Int64",
    "verdict": None,
    "note": None,
}


@dataclass(frozen=True, eq=False, repr=False)
class ResultTables:
    """What studies came to. Shares are from 0 to 1; NaN or NA stands where there is nothing.

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
    _html: str

    def __repr__(self) -> str:
        return f"ResultTables: {len(self.runs)} runs, {len(self.ranks)} ranks, {len(self.comparisons)} comparisons"

    def _repr_html_(self) -> str:
        return self._html


def read_tables(directory: Path) -> ResultTables:
    """Read all results below a directory; warn of each file that may be a result and can't be read.

    Raises:
        UserError: if the directory does not exist, or if nothing in it can be read.
    """
    results = read_results(directory)
    for problem in results.problems:
        if problem.left_out:
            warnings.warn(problem.line(directory), stacklevel=3)
    compared = [(study, compare_with_references(study)) for study in results.studies]
    return ResultTables(
        runs=_frame((row for study in results.studies for row in _runs(study)), RUN_COLUMNS),
        ranks=_frame((row for study in results.studies for row in _ranks(study)), _RANK_COLUMNS),
        comparisons=_frame((_comparison(study, one) for study, own in compared for one in own), _COMPARISON_COLUMNS),
        notices=tuple(f"{study.label}: {notice}" for study in results.studies for notice in study.notices),
        _html="".join(part for study, own in compared for part in _as_html(study, own)),
    )


def _frame(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str | None]) -> DataFrame:
    from pandas import DataFrame

    types = {name: kind for name, kind in columns.items() if kind is not None}
    return DataFrame(list(rows), columns=list(columns)).astype(types)


def _of(study: Study) -> dict[str, Any]:
    return {"study": study.name, "smoke": study.smoke}


def _runs(study: Study) -> Iterator[dict[str, Any]]:
    yield from map(run_row, (*(run.record for run in study.runs), *study.failed))


def _ranks(study: Study) -> Iterator[dict[str, Any]]:
    for run in study.runs:
        record = run.record
        rows = history_rows(record.sites, record.rank_history, record.importance_history, record.probe_history)
        of = _of(study) | {"experiment": run.experiment.name, "seed": run.seed}
        yield from (of | row for row in rows if row["step"] == rows[-1]["step"])


def _comparison(study: Study, one: Estimate) -> dict[str, Any]:
    who = _of(study) | {"experiment": one.name, "reference": one.reference}
    return who | ends("difference", one.interval) | comparison_values(one)


def _as_html(study: Study, comparisons: Sequence[Estimate]) -> Iterator[str]:
    yield f"<h3>{escape(study.label)}</h3>"
    yield from (f"<p><strong>{escape(notice)}</strong></p>" for notice in study.notices)
    if study.runs:
        yield _table(accuracy_table(method_results(study)))
    yield from (_table(comparison_table(comparisons, name)) for name in dict.fromkeys(c.reference for c in comparisons))


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in table.rows)
    return (
        f"<table><caption>{escape(table.title)}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        f"<p><small>{escape(table.note)}</small></p>"
    )
