"""ELPV at the published protocol: runs of elpv_published*.yaml to results/, and from there docs/studies.md.

    .venv/bin/python -m experiments.methods.scripts.published [DIR ...]

A DIR holds runs of the pilot, of its factors or of the study; of each one row is kept, of a pilot without its test
accuracy, which chooses nothing; of the study all records as well. What the pilot's rule chooses is printed. Without DIR
only the tables are made anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from operator import itemgetter
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.methods.scripts.study_evidence import FINDINGS, RESULTS, chosen_rates, packed
from experiments.methods.scripts.study_tables import PUBLISHED
from experiments.scripts.evidence import each, name_of, origin, percent, row_of, run, table, with_runs
from peft_vit.base.files import write_atomically
from peft_vit.base.packages import ELPV_WHEEL, fetch_wheel
from peft_vit.base.statistics import mean_interval
from peft_vit.core.records import RunRecord
from peft_vit.data.files import open_tree
from peft_vit.deploy.page.formatting import percent_interval

ROWS, DOCUMENT = RESULTS / "elpv_published.csv", FINDINGS
PILOT, STUDY = "elpv_published_pilot", "elpv_published"
TEST_IMAGES = 656
STUDIES = re.compile(f"{STUDY}(_pilot|_factors|_factors_168|_factors_224|)")


def keep(folder: Path) -> None:
    """Put a row a run into results/, and the study's records as they are.

    Raises:
        UserError: if a run is of another study, of a smoke, or did not end.
    """
    write_atomically(ROWS, with_runs(folder, ROWS, STUDIES, row, finished=True).encode())
    if (folder / STUDY).is_dir():
        write_atomically(RESULTS / f"{STUDY}.tar.xz", packed(folder / STUDY, STUDY))


def row(record: RunRecord) -> dict[str, object]:
    """Return what is kept of a run; nothing of the test images where settings are chosen."""
    found = row_of(record, _columns)
    if record.spec.study != STUDY:
        return {name: found[name] for name in found if "test" not in name}
    return found | by_certainty(record, defect_probabilities())


def _columns(record: RunRecord) -> dict[str, object]:
    assert record.validation is not None
    assert record.parameters is not None
    assert record.provenance is not None
    return {
        "validation_nll": record.validation.nll,
        "image_size": record.spec.data.image_size,
        "steps": len(record.steps),
        "trained_values": record.parameters.final,
        "backbone_values": record.parameters.backbone_total,
        "threads": record.provenance.threads,
        "processor": record.provenance.processor,
    }


@cache
def defect_probabilities(path: Path | None = None) -> NDArray[np.float64]:
    """Return what labels.csv says of each image, (2624,): 0 or 1 where the experts were sure, else 1/3 or 2/3.

    Source: Buerhop-Lutz et al. (EU PVSEC 2018), https://github.com/zae-bayern/elpv-dataset.

    Args:
        path: the data set as a zip or folder; None fetches the wheel.
    """
    tree = open_tree(path or fetch_wheel(ELPV_WHEEL))
    return np.array([float(line.split()[1]) for line in tree.lines(tree.only("labels.csv"))])


def by_certainty(record: RunRecord, probabilities: NDArray[np.float64]) -> dict[str, object]:
    """Return how many test images the experts were sure of, and test accuracy on these and on the others."""
    found = record.predictions
    assert found is not None
    right = np.equal(found.labels, found.predicted)  # (test images,)
    sure = np.isin(probabilities[found.images], (0.0, 1.0))
    return {
        "sure_images": int(sure.sum()),
        "sure_test_accuracy": float(right[sure].mean()),
        "unsure_test_accuracy": float(right[~sure].mean()),
    }


def chosen_rate(runs: pd.DataFrame) -> float:
    """Return the rate of the pilot with the best mean validation accuracy; of equal ones that with the lower loss."""
    return chosen_rates(runs[(runs.study == PILOT) & (runs.method == "lora")])["lora"]


def plain(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the pilot's runs at the chosen rate, which every factor is compared with."""
    return runs[(runs.study == PILOT) & (runs.learning_rate == chosen_rate(runs))]


def factors(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs that differ from the plain ones in one setting."""
    return runs[~runs.study.isin([PILOT, STUDY]) & (runs.method != "linear")]


def taken(runs: pd.DataFrame) -> tuple[str, ...]:
    """Return the factors whose mean validation accuracy is above that of the plain runs."""
    bar = plain(runs).validation_accuracy.mean()
    means = factors(runs).groupby("experiment", sort=False).validation_accuracy.mean()
    return tuple(str(name) for name in means.index[means > bar + 1e-9])


def chosen_size(runs: pd.DataFrame) -> int | None:
    """Return the images' edge in pixels: 168, or 224 if a probe gains more than a point of validation from it.

    None as long as one of both has no runs.
    """
    probes = runs[(runs.study != STUDY) & (runs.method == "linear")].groupby("image_size").validation_accuracy.mean()
    if not {168, 224} <= {*probes.index}:
        return None
    return 224 if probes[224] - probes[168] > 0.01 + 1e-9 else 168


def pilot_table(runs: pd.DataFrame) -> str:
    """Return a row a setting: validation accuracy, what a factor adds at the plain rate, and what a run takes."""
    pilots = runs[runs.study != STUDY].sort_values(["study", "learning_rate", "seed"], ascending=[False, True, True])
    bar, compared = plain(runs), {*factors(runs).experiment}
    chosen = {*bar.experiment, *taken(runs), f"linear_probe_{chosen_size(runs)}"}
    columns: dict[str, Callable[[pd.DataFrame], str]] = {
        "setting": lambda part: f"**`{name_of(part)}`**" if name_of(part) in chosen else f"`{name_of(part)}`",
        "px": lambda part: f"{part.image_size.iloc[0]}",
        "steps": lambda part: f"{part.steps.iloc[0]}",
        "validation accuracy, %": lambda part: f"{100 * part.validation_accuracy.mean():.1f}",
        "each seed": lambda part: each(percent(part.validation_accuracy)),
        "validation loss": lambda part: f"{part.validation_nll.mean():.3f}",
        "minus plain, points": lambda part: (
            f"{100 * (part.validation_accuracy.mean() - bar.validation_accuracy.mean()):+.1f}"
            if name_of(part) in compared
            else "–"
        ),
        "minutes a run": lambda part: f"{part.seconds.mean() / 60:.1f}",
    }
    parts = [part for _, part in pilots.groupby("experiment", sort=False)]
    said = "Bold: what was taken."
    return f"{table(parts, columns)}\n\n{said} {origin(pilots)}"


def study_table(runs: pd.DataFrame) -> str:
    """Return the study's experiments beside what was published; described, nothing is tested."""
    study = runs[runs.study == STUDY].sort_values("seed")
    rows = [
        (
            f"`{name_of(part)}`",
            percent_interval(mean_interval(part.test_accuracy)),
            each(percent(part.test_accuracy)),
            f"{100 * part.sure_test_accuracy.mean():.1f}",
            f"{100 * part.unsure_test_accuracy.mean():.1f}",
            f"{100 * part.trained_values.iloc[0] / part.backbone_values.iloc[0]:.2f}",
            f"{(part.seconds * part.threads).sum() / 3600:.1f}",
            "this study",
        )
        for _, part in study.groupby("experiment", sort=False)
    ]
    rows += [(what, f"{accuracy} %", *["–"] * 5, source) for what, accuracy, source in PUBLISHED]
    titles = (
        "method",
        "test accuracy [95 % over splits]",
        "by split, %",
        "experts sure, %",
        "not sure, %",
        "values trained, % of the backbone's",
        "core hours, all splits",
        "source",
    )
    columns: dict[str, Callable[[tuple[str, ...]], str]] = {
        title: itemgetter(place) for place, title in enumerate(titles)
    }
    said = (
        f"The experts were sure (defect probability 0 or 1, not 1/3 or 2/3) of {study.sure_images.mean():.0f} of "
        f"{TEST_IMAGES} test images, mean over splits."
    )
    return f"{table(rows, columns)}\n\n{said} {origin(study)}"


def tables() -> dict[str, str]:
    """Return the tables for which there are rows."""
    if not ROWS.exists():
        return {}
    runs = pd.read_csv(ROWS)
    found = {PILOT: pilot_table(runs)}
    return found | {STUDY: study_table(runs)} if (runs.study == STUDY).any() else found


if __name__ == "__main__":
    run(__doc__, keep, tables, DOCUMENT)
    if ROWS.exists():
        kept = pd.read_csv(ROWS)
        print(f"rate {chosen_rate(kept):g}; {chosen_size(kept)} px; factors: {', '.join(taken(kept)) or 'none'}")
