"""Paired differences over draws, out of the kept rows.

    python -m experiments.floor.scripts.tables

Each line: the mean difference of accuracy in points and of NLL to what is there now, with standard errors over draws.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pandas as pd

from experiments.floor.scripts.images import RESULTS


def paired(rows: pd.DataFrame, by: str, reference: str, measures: list[str]) -> Iterator[str]:
    """Yield a line for each kind of model beside the reference, on the draws that have both."""
    wide = rows.pivot_table(index=["set", "draw"], columns=by, values=measures)
    for kind in dict.fromkeys(rows[by]):
        if kind == reference:
            continue
        cells = []
        for measure in measures:
            gains = (wide[measure][kind] - wide[measure][reference]).dropna()
            error = gains.std(ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else float("nan")
            cells.append(f"{gains.mean():+.2f} ± {error:.2f}")
        of_sets = gains_by_set(wide[measures[0]][kind] - wide[measures[0]][reference])
        yield f"| {kind} | {' | '.join(cells)} | {of_sets} | {len(gains)} |"


def gains_by_set(gains: pd.Series) -> str:
    """Return each draw's difference, set by set."""
    known = gains.dropna()
    return "; ".join(
        f"{name} {', '.join(f'{value:+.1f}' for value in own)}" for name, own in known.groupby(level="set", sort=True)
    )


def main() -> None:
    """Print all tables."""
    lines = []
    regressions = pd.read_csv(RESULTS / "regressions.csv")
    regressions["kind"] = regressions["features"] + ", " + regressions["scale"]
    for size, own in regressions.groupby("image_size"):
        lines += [f"regressions, {size} px, beside the class token standardized:"]
        lines += paired(own, "kind", "class, standardized", ["accuracy", "nll"])
    spending = pd.read_csv(RESULTS / "spending.csv")
    lines += ["spending, beside A:", *paired(spending, "way", "A", ["accuracy", "nll_1", "nll_best"])]
    means = spending.groupby("way", sort=False)[[c for c in spending if c.startswith(("nll_", "t_"))]].mean()
    lines += ["means over draws:", means.round(3).to_string()]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
