"""What questions share that are answered in turn: pilots choose rates, studies follow at these, a few seeds at a time.

Whatever has its row is not done again, so a command that goes through all of them begins again where it was stopped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from experiments.scripts import evidence
from peft_vit.base.files import write_atomically

AT_ONCE = 2  # seeds


class _Plain(yaml.SafeDumper):
    """Writes what occurs twice twice: configurations take no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return whether a value is written out; all are."""
        return True


def as_yaml(head: Iterable[str], content: Mapping[str, Any]) -> str:
    """Return a configuration's text below lines that say what it is."""
    text = yaml.dump(dict(content), Dumper=_Plain, sort_keys=False, width=118, default_flow_style=None)
    return "".join(f"# {line}\n" for line in head) + "\n" + text


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Write configurations by name."""
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        write_atomically(folder / name, text.encode())


def do(file: Path, folder: Path, seeds: Sequence[int]) -> None:
    """Do the runs of a configuration that are not done yet, of these seeds, on one thread."""
    said = ["--seeds", ",".join(map(str, seeds)), "--workers", "1", "--output", str(folder)]
    command = [sys.executable, "-m", "peft_vit.cli", "run", str(file), *said]
    code = subprocess.run(command, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    if code not in (0, 1):  # 1: a run failed, and has a row that says so
        sys.exit(code)


def keep(file: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Put rows into a table; a run done anew replaces its old row."""
    present = file.read_text(encoding="utf-8") if file.exists() else None
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, evidence.merge(present, pd.DataFrame(rows)).encode())


def kept(file: Path) -> set[tuple[object, ...]]:
    """Return study, experiment and seed of all rows of a table."""
    return {tuple(key) for key in pd.read_csv(file)[[*evidence.KEY]].to_numpy()} if file.exists() else set()


def is_kept(file: Path, content: Mapping[str, Any], seeds: Sequence[int]) -> bool:
    """Return whether all of a configuration's runs of these seeds have their rows."""
    return {(content["name"], one["name"], seed) for one in content["experiments"] for seed in seeds} <= kept(file)


def mean_by_rate(rows: pd.DataFrame) -> pd.Series:
    """Return the mean validation accuracy over seeds by rate, rising; a run that failed has no image right."""
    filled = rows.fillna({"validation_accuracy": 0.0})
    return filled.groupby("learning_rate").validation_accuracy.mean().sort_index().round(9)


def rates_table(tried: Sequence[tuple[tuple[str, ...], pd.DataFrame, float | None]], titles: Sequence[str]) -> str:
    """Return validation accuracy by rate, a row each: what it is, its rows, and the rate that was taken, in bold."""
    rates = sorted({rate for _, own, _ in tried for rate in own.learning_rate})

    def cell(own: pd.DataFrame, chosen: float | None, rate: float) -> str:
        value = 100 * mean_by_rate(own).get(rate, np.nan)
        return "–" if np.isnan(value) else f"**{value:.1f}**" if rate == chosen else f"{value:.1f}"

    columns = {
        **{title: lambda row, place=place: row[0][place] for place, title in enumerate(titles)},
        **{f"{rate:g}": lambda row, rate=rate: cell(row[1], row[2], rate) for rate in rates},
    }
    return evidence.table(tried, columns, left=len(titles))


def up_to_a_gap(by_seed: pd.Series, seeds: Sequence[int]) -> list[float]:
    """Return the values of seeds in the order in which they were declared, up to the first that has none."""
    values = by_seed.dropna()
    present = [seed in values.index for seed in seeds]
    whole = len(seeds) if all(present) else present.index(False)
    return [float(values[seed]) for seed in seeds[:whole]]
