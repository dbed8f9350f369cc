"""The project's own study: records to results/, and from there to docs/studies.md and figures.

    .venv/bin/python -m experiments.methods.scripts.study_evidence [DIR ...]

Each DIR holds the records of studies named study_*. Of a pilot, study_*_pilot, one row a run goes to results/*.csv,
without its test accuracy, which chooses nothing. Of a study all records go to results/*.tar.xz with its plan, as they
are; unpacked, they are a results directory for every command of peft-vit. Without DIR only the documents are made anew.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pandas as pd

from experiments.hypotheses.measures import Evidence
from experiments.hypotheses.registry import ALL_STUDIES, Findings, all_findings, find, load_registry
from experiments.methods.scripts.study_figures import write_figures
from experiments.methods.scripts.study_tables import DESCRIPTIVE, KINDS, SHORT, five_methods, pilot_table, study_blocks
from experiments.scripts.evidence import EXPERIMENTS, benchmark, merge, run
from peft_vit.base.errors import UserError
from peft_vit.base.files import folder_below, write_atomically
from peft_vit.core.records import RunRecord
from peft_vit.lab.analysis import Analysis, Study, analyze, load_studies
from peft_vit.runs.records.scan import read_records
from peft_vit.runs.records.storage import RECORD_FILE

FOLDER = Path(__file__).resolve().parents[1]
CONFIGS, RESULTS = FOLDER / "configs", FOLDER / "results"
HYPOTHESES = EXPERIMENTS / "hypotheses" / "hypotheses_study.yaml"
FINDINGS, EVERY_TEST = FOLDER / "docs" / "studies.md", FOLDER / "docs" / "every_test.md"
_KEPT = ("study.json", RECORD_FILE)


def keep(results_dir: Path) -> None:
    """Put what is below a directory into results/.

    Raises:
        UserError: if runs are of a smoke, of another study than these, or not all that were planned.
    """
    records = list(read_records(results_dir))
    names = {record.spec.study for record in records}
    if any(record.spec.smoke for record in records) or not names or any(not n.startswith("study_") for n in names):
        raise UserError(
            "expected real runs of study_*, found others; name the directory of a study's own runs", file=results_dir
        )
    for study in load_studies(results_dir):
        if open_ := [run for run in study.unfinished if run.state != "failed"]:
            raise UserError(
                f"{len(open_)} of {sum(study.counts().values())} runs of {study.name} are not done; run it to its end",
                file=results_dir,
            )
    for name in sorted(names):
        of_study = [record for record in records if record.spec.study == name]
        if name.endswith("_pilot"):
            _keep_pilot(name, of_study)
        else:
            write_atomically(RESULTS / f"{name}.tar.xz", packed(results_dir / name, name))


def _keep_pilot(name: str, records: list[RunRecord]) -> None:
    file = RESULTS / f"{name}.csv"
    rows = pd.DataFrame([pilot_row(record) for record in records])
    merged = merge(file.read_text(encoding="utf-8") if file.exists() else None, rows)
    write_atomically(file, merged.encode())
    for method, rate in chosen_rates(pd.read_csv(io.StringIO(merged))).items():
        print(f"{name}: {method}: learning_rate {rate:g}")


def pilot_row(record: RunRecord) -> dict[str, object]:
    """Return what is kept of a run that chooses a rate; nothing of the test images."""
    experiment = record.spec.experiment
    row: dict[str, object] = {
        "study": record.spec.study,
        "experiment": experiment.name,
        "method": method_of(experiment.name),
        "learning_rate": experiment.training.learning_rate,
        "seed": record.spec.seed,
        "status": record.status,
    }
    if record.status != "done" or record.validation is None or record.provenance is None:
        return row
    return row | {
        "validation_accuracy": record.validation.accuracy,
        "validation_nll": record.validation.nll,
        "majority_accuracy": record.majority_accuracy["validation"],
        "seconds": round(record.seconds, 1),
        "split": record.provenance.split_sha256[:12],
        "commit": (record.provenance.git_hash or "")[:12],
        "dirty": record.provenance.git_dirty,
    }


def method_of(experiment: str) -> str:
    """Return the experiment of the study that a pilot's experiment tried a rate for."""
    return experiment.partition("_lr_")[0]


def rate_means(pilot: pd.DataFrame) -> pd.DataFrame:
    """Return mean validation accuracy and loss by method and rate; a failed run counts as the majority class."""
    runs = pilot.assign(
        validation_accuracy=pilot.validation_accuracy.fillna(pilot.majority_accuracy.max()),
        validation_nll=pilot.validation_nll.fillna(float("inf")),
    )
    means = runs.groupby(["method", "learning_rate"], sort=False)[["validation_accuracy", "validation_nll"]].mean()
    # Files have six digits, so equal shares of whole images stay equal to five.
    return means.reset_index().round({"validation_accuracy": 5, "validation_nll": 12})


def chosen_rates(pilot: pd.DataFrame) -> dict[str, float]:
    """Return each method's rate: best mean validation accuracy; of equal ones the lower mean validation loss."""
    ordered = rate_means(pilot).sort_values(["validation_accuracy", "validation_nll"], ascending=[False, True])
    best = ordered.drop_duplicates("method")
    return {str(row.method): float(row.learning_rate) for row in best.sort_index().itertuples()}  # type: ignore[arg-type]


def packed(study: Path, name: str) -> bytes:
    """Return a study's plan and records as .tar.xz; the same files give the same bytes."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:xz", preset=9) as archive:
        for file in sorted(file for file in study.rglob("*") if file.name in _KEPT):
            entry = tarfile.TarInfo(f"{name}/{file.relative_to(study).as_posix()}")
            entry.size = file.stat().st_size
            with file.open("rb") as handle:
                archive.addfile(entry, handle)
    return content.getvalue()


@contextmanager
def unpacked(name: str) -> Iterator[Path]:
    """Unpack a study into a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(RESULTS / f"{name}.tar.xz") as archive:
            for entry in archive:
                if (content := archive.extractfile(entry)) is not None:
                    file = folder_below(Path(folder), entry.name)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(content.read())
        yield Path(folder)


def kept_studies() -> list[str]:
    """Return the studies that results/ holds, in the order in which they are told."""
    return [name for name in SHORT if (RESULTS / f"{name}.tar.xz").exists()]


@cache
def analysis_of(name: str) -> Analysis:
    """Analyze a study out of results/."""
    with unpacked(name) as folder:
        (study,) = load_studies(folder)
        return with_hypotheses(study)


def with_hypotheses(study: Study) -> Analysis:
    """Analyze a study, with findings on the registry's hypotheses in place of the report's sentences."""
    findings = find([Evidence(study)], load_registry(HYPOTHESES), study.label)
    return replace(analyze(study), findings=findings)


def over_all(analyses: Mapping[str, Analysis]) -> Findings:
    """Return what the tested studies say together about hypotheses that are about several; nothing of a single one."""
    studies = [analysis.study for name, analysis in analyses.items() if name != DESCRIPTIVE]
    return all_findings(studies, load_registry(HYPOTHESES)).get(ALL_STUDIES, ()) if len(studies) > 1 else ()


def blocks() -> dict[str, str]:
    """Return everything in the documents that is generated, by the name of its marks."""
    analyses = {name: analysis_of(name) for name in kept_studies()}
    pilots = {
        name: pd.read_csv(file)
        for name in (f"{study}_pilot" for study in SHORT)
        if (file := RESULTS / f"{name}.csv").exists()
    }
    rates = {name: pilot_table(runs, rate_means(runs), chosen_rates(runs)) for name, runs in pilots.items()}
    own = (
        {"five_methods": five_methods(analyses, benchmark("memory")["rows"])} if analyses.keys() >= KINDS.keys() else {}
    )
    return study_blocks(analyses, over_all(analyses), pilots) | rates | own


if __name__ == "__main__":
    run(__doc__, keep, blocks, FINDINGS, EVERY_TEST)
    write_figures({name: analysis_of(name) for name in kept_studies()})
