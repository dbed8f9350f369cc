"""Columns and notes that the tables of a study share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from peft_vit.base.statistics.estimates import describe_test, recorded_interval, recorded_mean
from peft_vit.deploy.page.document import Column, Raw, own_interval_columns
from peft_vit.deploy.page.formatting import number_interval
from peft_vit.lab.analysis import Estimate, Run

OTHER_SEEDS = "what other seeds would change, on the same test images unless each seed has its own"

OVER_SEEDS = f"95 % t intervals in brackets: {OTHER_SEEDS}."

FAMILY_NOTE = (
    "The exact Wilcoxon signed-rank test at 5 % decides, with Holm's correction over the rows of "
    "this table; the 95 % t interval beside it describes what other seeds would change."
)

to_thousandths = partial(number_interval, decimals=3)

EXPERIMENT = Column("experiment", "experiment.name", data="experiment")


def mean_of(title: str, key: str, value: Callable[[Run], float | None], show: Callable[[Any], str] = str) -> Column:
    """Return the mean over the `runs` of a row of what each recorded."""
    return Column(title, lambda row: recorded_mean(map(value, row.runs)), show, key)


def interval_of(title: str, key: str, value: Callable[[Run], float | None], show: Callable[[Any], str]) -> Column:
    """Return that mean with its interval over seeds."""
    return Column(title, lambda row: recorded_interval(map(value, row.runs)), show, partial(own_interval_columns, key))


def comparison_values(comparison: Estimate) -> dict[str, Raw]:
    """Return what decided a comparison."""
    significance = comparison.significance
    return {
        "p_value": None if significance is None else significance.p_value,
        "p_holm": comparison.adjusted_p,
        "needed_n": None if significance is None else significance.minimum_n,
        "verdict": comparison.verdict,
        "note": comparison.note,
    }


def tested(comparison: Estimate) -> str:
    """Return what the test said, with its note."""
    return describe_test(comparison) + (f" ({comparison.note})" if comparison.note else "")
