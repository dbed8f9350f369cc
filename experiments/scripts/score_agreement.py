"""Whether scores of sites agree over seeds and foretell what a site is worth, with the probe's head and a random one.

    .venv/bin/python experiments/scripts/score_agreement.py [DIR ...]

A DIR holds runs of score_agreement_*.yaml; of each run that scores, or that says what sites are worth, one row is kept
in results/score_agreement.csv, a column a site. Then the table in docs/findings/adaptive_ranks.md is made anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path

import pandas as pd
from evidence import KEY, RESULTS, ROOT, interval, origin, run, table, with_runs

from peft_vit.records import RunRecord, write_atomically
from peft_vit.statistics import mean_interval, spearman

ROWS, DOCUMENT = RESULTS / "score_agreement.csv", ROOT / "docs" / "findings" / "adaptive_ranks.md"
TITLES = {"score_agreement_digits": "digits", "score_agreement_fashion": "Fashion-MNIST"}
STUDIES = re.compile("score_agreement_(digits|fashion)")
WORTH = "lora_r8"  # whose sites are left out in turn
HEADS = ("probe", "random")


def keep(folder: Path) -> None:
    """Put a row a run into results/.

    Raises:
        UserError: if a run is of another study, of a smoke, or did not end.
    """
    write_atomically(ROWS, with_runs(folder, ROWS, STUDIES, row, finished=True).encode())


def row(record: RunRecord) -> dict[str, object]:
    """Return what names a run, and by site its first score, or what the loss rises by when the site is left out."""
    assert record.provenance is not None
    name = record.spec.experiment.name
    if name == WORTH:
        assert record.removal is not None
        by_site = record.removal.site_loss_rise
    else:
        by_site = record.importance_history[0].scores
    return {
        "study": record.spec.study,
        "experiment": name,
        "seed": record.spec.seed,
        "status": record.status,
        "seconds": round(record.seconds, 1),
        "split": record.provenance.split_sha256[:12],
        "commit": (record.provenance.git_hash or "")[:12],
        **by_site,
    }


def orders(runs: pd.DataFrame, experiment: str) -> pd.DataFrame:
    """Return an experiment's numbers, a row a seed and a column a site."""
    sites = [column for column in runs if column not in {*KEY, "status", "seconds", "split", "commit"}]
    return runs[runs.experiment == experiment].set_index("seed").sort_index()[sites].astype(float)


def agreement(scores: pd.DataFrame) -> list[float]:
    """Return Spearman's rho between the sites' scores of two seeds, over pairs that share no seed."""
    pairs = zip(scores.index[::2], scores.index[1::2], strict=False)
    return [rho for left, right in pairs if (rho := spearman(scores.loc[left], scores.loc[right])) is not None]


def foretold(scores: pd.DataFrame, worth: pd.DataFrame) -> pd.Series:
    """Return by seed Spearman's rho between the sites' scores and what the sites are worth in that seed's LoRA."""
    shared = scores.index.intersection(worth.index)
    return pd.Series({seed: spearman(scores.loc[seed], worth.loc[seed]) for seed in shared}, dtype=float)


def score_table(runs: pd.DataFrame) -> str:
    """Return a row a task, score and head: agreement over seeds, correlation with worth, and what the head changes."""
    rows: list[tuple[str, str, str, list[float], list[float], list[float]]] = []
    for study, title in TITLES.items():
        part = runs[runs.study == study]
        if part.empty:
            continue
        worth = orders(part, WORTH)
        rows.append((title, "worth itself", "probe", agreement(worth), [], []))
        names = [name for name in part.experiment.unique() if name != WORTH]
        for score in dict.fromkeys(name.rpartition("_")[0] for name in names):
            by_head = {head: orders(part, f"{score}_{head}") for head in HEADS if f"{score}_{head}" in names}
            rhos = {head: foretold(scores, worth).dropna() for head, scores in by_head.items()}
            rise = (rhos["probe"] - rhos["random"]).dropna() if len(rhos) == len(HEADS) else []
            for head, scores in by_head.items():
                rows.append((title, f"`{score}`", head, agreement(scores), [*rhos[head]], [*rise]))
                rise = []  # stands in the first row
    titles = ("images", "score", "head", "ρ between two seeds", "ρ with worth", "probe minus random")
    columns: dict[str, Callable[[tuple], str]] = {
        title: itemgetter(place) if place < 3 else partial(_mean, place) for place, title in enumerate(titles)
    }
    return f"{table(rows, columns, left=3)}\n\n{origin(runs)}"


def _mean(place: int, of: tuple) -> str:
    return interval(mean_interval(of[place])) if of[place] else "–"


def tables() -> dict[str, str]:
    """Return the table, if there are rows."""
    return {"score_agreement": score_table(pd.read_csv(ROWS))} if ROWS.exists() else {}


if __name__ == "__main__":
    run(__doc__, keep, tables, DOCUMENT)
