"""int8.md says what results/ holds, and results/ holds the runs that its studies ask for."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy

from experiments.int8.scripts import int8
from experiments.scripts import evidence
from peft_vit.base.statistics import mean_interval


def test_the_document_says_what_results_hold() -> None:
    text = int8.DOCUMENT.read_text()
    assert evidence.filled(text, int8.tables()) == text, "run experiments/int8/scripts/int8.py"


def test_a_changed_row_changes_the_table(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pd.read_csv(int8.ROWS)
    rows.loc[rows.form == "int8", "test_accuracy"] -= 0.01
    rows.to_csv(tmp_path / "rows.csv", index=False)
    monkeypatch.setattr(int8, "ROWS", tmp_path / "rows.csv")
    assert evidence.filled(int8.DOCUMENT.read_text(), int8.tables()) != int8.DOCUMENT.read_text()


def test_kept_runs_are_those_of_the_studies_each_once() -> None:
    rows = pd.read_csv(int8.ROWS)
    asked = {
        (name, experiment["name"], seed)
        for name, (study, _) in int8.studies().items()
        for experiment in study["experiments"]
        for seed in study["seeds"]
        if experiment["method"] != "linear"
    }
    kept = list(rows[["study", "experiment", "seed"]].itertuples(index=False, name=None))
    assert len(kept) == len(set(kept))
    assert set(kept) == asked
    assert set(rows[rows.form == "7bit"].bits) <= {7}
    assert set(rows[rows.form == "int8"].bits) <= {8}


def test_intervals_are_those_of_scipy() -> None:
    for row in int8.comparisons(pd.read_csv(int8.ROWS)).itertuples():
        if row.pairs > 1 and np.ptp(row.differences) > 0:
            low, high = scipy.stats.ttest_1samp(row.differences, 0).confidence_interval()
            interval = mean_interval(row.differences)
            assert (interval.low, interval.high) == pytest.approx((low, high))
