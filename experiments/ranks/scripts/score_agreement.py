"""Whether scores of sites agree over seeds and foretell what a site is worth, with the probe's head and a random one.

    .venv/bin/python -m experiments.ranks.scripts.score_agreement [DIR ...]

A DIR holds runs of score_agreement_*.yaml; of each run that scores, or that says what sites are worth, one row is kept
in results/score_agreement.csv, a column a site. What sites are worth at the best temperature is measured on the runs'
adapters, some minutes, and kept as a row more. Then the table in docs/adaptive_ranks.md is made anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path

import pandas as pd
import torch

from experiments.scripts.evidence import KEY, interval, merge, origin, run, table, with_runs
from peft_vit.base.files import write_atomically
from peft_vit.base.statistics import fit_temperature, mean_interval, spearman
from peft_vit.core.backbones import Backbone, apply_temperature
from peft_vit.core.records import RunRecord
from peft_vit.core.training import RuntimeConfig
from peft_vit.core.training.metrics import predict
from peft_vit.data import load_data
from peft_vit.deploy.restore import restore_run
from peft_vit.runs.measures.removal_and_latency import leave_out_updates, removal_images
from peft_vit.runs.records.scan import read_records

FOLDER = Path(__file__).resolve().parents[1]
ROWS, DOCUMENT = FOLDER / "results" / "score_agreement.csv", FOLDER / "docs" / "adaptive_ranks.md"
TITLES = {"score_agreement_digits": "digits", "score_agreement_fashion": "Fashion-MNIST"}
STUDIES = re.compile("score_agreement_(digits|fashion)")
WORTH = "lora_r8"  # whose sites are left out in turn
TEMPERED = f"{WORTH}_tempered"  # the same runs
HEADS = ("probe", "random")


def keep(folder: Path) -> None:
    """Put a row a run into results/.

    Raises:
        UserError: if a run is of another study, of a smoke, or did not end.
    """
    write_atomically(ROWS, with_runs(folder, ROWS, STUDIES, row, finished=True).encode())
    worth = [record for record in read_records(folder) if record.spec.experiment.name == WORTH]
    tempered = [
        row(record) | {"experiment": TEMPERED} | tempered_worth(folder / record.spec.run_id) for record in worth
    ]
    if tempered:
        write_atomically(ROWS, merge(ROWS.read_text(encoding="utf-8"), pd.DataFrame(tempered)).encode())


def tempered_worth(run_dir: Path) -> dict[str, float]:
    """Return by site what the loss rises by without its update, all logits divided by the whole model's temperature.

    A model that is too sure gains from anything that weakens it. At the temperature with the least loss it gains
    nothing by that alone. The temperature is fitted on the images that the rise is measured on.
    """
    restored = restore_run(run_dir)
    spec, model = restored.record.spec, restored.model
    assert spec.measures.removal_images is not None
    torch.set_num_threads(spec.threads)
    data = load_data(spec.data, spec.seed)
    runtime = RuntimeConfig(torch.device("cpu"), spec.precision, restored.backbone.mean, restored.backbone.std)
    images = removal_images(data.validation, spec.data.split_seed, spec.measures.removal_images)
    batches = images.ordered_batches(spec.experiment.training.batch_size, runtime.mean, runtime.std)
    logits, labels = predict(model, batches, precision=runtime.precision)
    with torch.no_grad():
        apply_temperature(Backbone(model).head, fit_temperature(logits, labels))
    found = leave_out_updates(model, data, spec, runtime)
    assert found is not None
    return found.site_loss_rise


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
    rows: list[tuple[str | list[float], ...]] = []
    rises = []
    for study, title in TITLES.items():
        part = runs[runs.study == study]
        if part.empty:
            continue
        worths = [orders(part, name) for name in (WORTH, TEMPERED)]
        for name, worth in zip(("worth", "worth, tempered"), worths, strict=True):
            rises.append(f"{title}, {name} {worth.stack().mean():+.4f} ({100 * (worth > 0).stack().mean():.0f} %)")
            rows.append((title, name, "probe", agreement(worth), [], [], [], []))
        names = [name for name in part.experiment.unique() if name not in (WORTH, TEMPERED)]
        for score in dict.fromkeys(name.rpartition("_")[0] for name in names):
            by_head = {head: orders(part, f"{score}_{head}") for head in HEADS if f"{score}_{head}" in names}
            rhos = [{head: foretold(scores, worth) for head, scores in by_head.items()} for worth in worths]
            gains = [(one["probe"] - one["random"]).dropna() if len(one) == len(HEADS) else [] for one in rhos]
            for head, scores in by_head.items():
                cells: list[str | list[float]] = [title, f"`{score}`", head, agreement(scores)]
                for one, gain in zip(rhos, gains, strict=True):
                    cells += [[*one[head].dropna()], [*gain] if head == HEADS[0] else []]  # once, in the first row
                rows.append(tuple(cells))
    minus = "probe minus random"
    titles = (
        "images",
        "score",
        "head",
        "ρ between two seeds",
        "ρ with worth",
        minus,
        "ρ with worth, tempered",
        f"{minus}, tempered",
    )
    columns: dict[str, Callable[[tuple], str]] = {
        title: itemgetter(place) if place < 3 else partial(_mean, place) for place, title in enumerate(titles)
    }
    said = f"Worth, mean over sites and seeds in nats, and the share of sites where it is above 0: {'; '.join(rises)}."
    return f"{table(rows, columns, left=3)}\n\n{said}\n\n{origin(runs[runs.experiment != TEMPERED])}"


def _mean(place: int, of: tuple) -> str:
    return interval(mean_interval(of[place])) if of[place] else "–"


def tables() -> dict[str, str]:
    """Return the table, if there are rows."""
    return {"score_agreement": score_table(pd.read_csv(ROWS))} if ROWS.exists() else {}


if __name__ == "__main__":
    run(__doc__, keep, tables, DOCUMENT)
