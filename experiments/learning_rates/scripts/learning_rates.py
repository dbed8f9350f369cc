"""What AdaLoRA bears of learning rates: records to compact tables in results/, and those to docs/learning_rates.md.

    .venv/bin/python -m experiments.learning_rates.scripts.learning_rates [RESULTS_DIR ...]

Every results directory that is named is condensed into results/<study>.csv, one row a run; rows that are there stay,
unless the same experiment and seed was run anew.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd

from experiments.ranks.scripts.allocation_evidence import columns, pilot
from experiments.scripts.evidence import (
    MARGIN,
    Cell,
    Comparison,
    accuracy_by_seed,
    by_experiment,
    compared,
    condense,
    counted,
    each,
    interval,
    mean_and_spread,
    origin,
    p,
    run,
    study_tables,
    table,
)

FOLDER = Path(__file__).resolve().parents[1]
RESULTS, DOCUMENT = FOLDER / "results", FOLDER / "docs" / "learning_rates.md"


def given_up(runs: pd.DataFrame) -> str:
    """Return test accuracy of choices that were given up."""
    columns: dict[str, Cell] = {
        "test accuracy, mean (sd), %": lambda part: mean_and_spread(accuracy_by_seed(runs, part)),
        "each seed": lambda part: each(accuracy_by_seed(runs, part)),
    }
    return by_experiment(runs, sorted(runs.experiment.unique()), columns)


def learning_rates(runs: pd.DataFrame) -> str:
    """Return accuracy by learning rate, and the comparisons that were announced."""
    rates = sorted(runs.learning_rate.unique())
    families = list(dict.fromkeys(name.rsplit("_lr_", 1)[0] for name in runs.experiment.unique()))
    values = {
        (family, rate): series
        for family in families
        for rate in rates
        if not (series := _series(runs, family, rate)).empty
    }
    versus = {
        (family, rate): compared(series, values["lora_r8", rate])
        for (family, rate), series in values.items()
        if family != "lora_r8" and ("lora_r8", rate) in values
    }
    columns: dict[str, Callable[[tuple[str, float]], str]] = {
        "method": lambda one: f"`{one[0]}`",
        "learning rate": lambda one: f"{one[1]:g}",
        "runs (failed)": lambda one: counted(_part(runs, *one)),
        "test accuracy, mean (sd), %": lambda one: mean_and_spread(values[one]),
        "worst seed": lambda one: f"{values[one].min():.1f}",
        "minus LoRA r=8 at the same rate [95 %]": lambda one: interval(versus.get(one, Comparison()).difference),
        f"p, not inferior by {MARGIN:g}": lambda one: p(versus.get(one, Comparison()).not_inferior),
    }
    return f"{table(values, columns)}\n\n{_across(runs, families, rates)}\n\n{origin(runs)}"


def _part(runs: pd.DataFrame, family: str, rate: float) -> pd.DataFrame:
    family_of = runs.experiment.str.rsplit("_lr_", n=1).str[0]
    return runs[(family_of == family) & (runs.learning_rate == rate)]


def _series(runs: pd.DataFrame, family: str, rate: float) -> pd.Series:
    return accuracy_by_seed(runs, _part(runs, family, rate))


def _across(runs: pd.DataFrame, families: list[str], rates: list[float]) -> str:
    """Return what each method loses between its best and its worst rate, and ours against PEFT's best."""
    lines = []
    means = {f: {r: _series(runs, f, r).mean() for r in rates if not _series(runs, f, r).empty} for f in families}
    lost: dict[str, pd.Series] = {}  # by seed
    for family, by_rate in means.items():
        if len(by_rate) > 2:
            ends = [choose(by_rate, key=by_rate.__getitem__) for choose in (max, min)]
            points = by_rate[ends[0]] - by_rate[ends[1]]
            lines.append(f"- `{family}` loses {points:.1f} points between its best and its worst rate.")
            best_end, worst_end = (_series(runs, family, rate) for rate in ends)
            lost[family] = (best_end - worst_end).dropna()
    if {"adalora", "lora_r8"} <= lost.keys():
        more = compared(lost["adalora"], lost["lora_r8"]).difference
        lines.append(f"- What `adalora` loses minus what `lora_r8` loses, by seed: {interval(more)}.")
    peft = means.get("peft_adalora", {})
    if peft:
        best = max(peft, key=lambda rate: peft[rate])
        lora_rate = 1e-3
        versus = compared(_series(runs, "adalora", lora_rate), _series(runs, "peft_adalora", best))
        lines.append(
            f"- `adalora` at {lora_rate:g} minus `peft_adalora` at its best rate, {best:g}: "
            f'{interval(versus.difference)}; p for "not inferior by {MARGIN:g} point": {p(versus.not_inferior)}.'
        )
    return "\n".join(lines)


TABLES: dict[str, Callable[[pd.DataFrame], str]] = {
    "learning_rate_pilot": pilot,
    "learning_rates_given_up": given_up,
    "learning_rates": learning_rates,
    "learning_rates_fresh_seeds": learning_rates,
}


def tables() -> dict[str, str]:
    """Return the tables of every study whose results are there."""
    return study_tables(TABLES, RESULTS)


if __name__ == "__main__":
    run(__doc__, partial(condense, columns=columns, kept=RESULTS), tables, DOCUMENT)
