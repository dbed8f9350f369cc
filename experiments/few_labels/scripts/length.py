"""Whether longer training is better: the runs of length_elpv.yaml to results/, and from there a page.

    .venv/bin/python -m experiments.few_labels.scripts.length [DIR ...]

A DIR holds the runs; of each one row is kept, without its test accuracy, which chooses nothing. Without DIR only the
table is made anew. A run's best validation is partly luck, so the accuracy at its last step stands beside it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd

from experiments.scripts import evidence
from experiments.scripts.evidence import EXPERIMENTS, with_runs
from peft_vit.base.files import write_atomically
from peft_vit.core.records import RunRecord

STUDY = "length_elpv"
FOLDER = EXPERIMENTS / "few_labels"
ROWS, DOCUMENT = FOLDER / "results" / f"{STUDY}.csv", FOLDER / "docs" / "few_labels.md"
TITLES = {"full": "full fine-tuning", "lora": "LoRA r=8", "qa_lora": "QA-LoRA r=8, nf4"}


def keep(folder: Path) -> None:
    """Put a row a run into results/.

    Raises:
        UserError: if a run is of another study, of a smoke, or did not end.
    """
    write_atomically(ROWS, with_runs(folder, ROWS, re.compile(STUDY), _row, finished=True).encode())


def _row(record: RunRecord) -> dict[str, object]:
    assert record.validation is not None
    assert record.provenance is not None
    return {
        "experiment": record.spec.experiment.name,
        "method": record.spec.experiment.method,
        "learning_rate": record.spec.experiment.training.learning_rate,
        "steps": len(record.steps),
        "seed": record.spec.seed,
        "best": record.validation.accuracy,
        "last": record.evaluations[-1].metrics.accuracy,
        "chosen_step": record.chosen_step,
        "seconds": round(record.seconds, 1),
        "split": record.provenance.split_sha256[:12],
        "processor": record.provenance.processor,
        "commit": (record.provenance.git_hash or "")[:12],
    }


def table() -> str:
    """Return means over seeds by method, rate and length, and what the longest gains over the shortest of its seed."""
    rows = pd.read_csv(io.StringIO(ROWS.read_text(encoding="utf-8")))
    lengths = sorted(rows.steps.unique())
    first, last = lengths[0], lengths[-1]

    def mean_of(part: pd.DataFrame, steps: int) -> str:
        of_length = part[part.steps == steps]
        return f"{100 * of_length.best.mean():.1f} / {100 * of_length['last'].mean():.1f}"

    def gains(part: pd.DataFrame) -> str:
        wide = (part.pivot(index="seed", columns="steps", values=kind) for kind in ("best", "last"))
        gained = (100 * (one[last] - one[first]) for one in wide)
        return " / ".join(f"{one.mean():+.1f} ({one.std():.1f})" for one in gained)

    def seconds(part: pd.DataFrame) -> str:
        medians = part.groupby("steps").seconds.median()
        return f"{medians[first]:.0f} and {medians[last]:.0f}"

    parts = [part for method in TITLES for _, part in rows[rows.method == method].groupby("learning_rate")]
    columns: dict[str, Callable[[pd.DataFrame], str]] = {
        "method": lambda part: TITLES[part.method.iloc[0]],
        "rate": lambda part: f"{part.learning_rate.iloc[0]:g}",
        **{f"{steps} steps": partial(mean_of, steps=steps) for steps in lengths},
        f"{last} minus {first} (sd)": gains,
        f"seconds, {first} and {last}": seconds,
    }
    seeds = ", ".join(str(seed) for seed in sorted(rows.seed.unique()))
    note = (
        f"Mean validation accuracy in %: the best of a run's validations / the last one. {len(rows)} runs, "
        f"seeds {seeds}. Commit {', '.join(sorted(rows.commit.unique()))}."
    )
    return f"{evidence.table(parts, columns)}\n\n{note}"


if __name__ == "__main__":
    evidence.run(__doc__, keep, lambda: {"length": table()}, DOCUMENT)
