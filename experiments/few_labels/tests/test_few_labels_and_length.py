"""few_labels.md and studies.md, about length, say what results/ holds, and results/ holds every run asked for."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pandas as pd
import planted
import pytest

from experiments.few_labels.scripts import few_labels, length
from experiments.scripts import evidence
from peft_vit.base.errors import UserError
from peft_vit.core.config import load_study

CONFIGS = Path(__file__).parents[1] / "configs"

PAGES = pytest.mark.parametrize(
    ("document", "name", "script"),
    [(few_labels.DOCUMENT, "few_labels", few_labels), (length.DOCUMENT, "length", length)],
    ids=["few_labels", "length"],
)


@PAGES
def test_the_document_says_what_results_hold(document: Path, name: str, script: object) -> None:
    text = document.read_text()
    assert f"<!-- {name} -->" in text
    table = script.table()  # type: ignore[attr-defined]
    assert evidence.filled(text, {name: table}) == text, f"run experiments/scripts/{name}.py"


@PAGES
def test_a_changed_row_changes_the_table(
    document: Path, name: str, script: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pd.read_csv(script.ROWS)  # type: ignore[attr-defined]
    column = "test" if "test" in rows else "best"
    rows.loc[rows.method == "lora", column] += 0.01
    rows.to_csv(tmp_path / "rows.csv", index=False)
    monkeypatch.setattr(script, "ROWS", tmp_path / "rows.csv")
    assert evidence.filled(document.read_text(), {name: script.table()}) != document.read_text()  # type: ignore[attr-defined]


def test_few_labels_holds_five_draws_of_every_cell() -> None:
    rows = pd.read_csv(few_labels.ROWS)
    seeds = range(few_labels.FIRST_SEED, few_labels.FIRST_SEED + 5)
    asked = set(itertools.product(few_labels.DATA, few_labels.SHOTS, few_labels.METHODS, seeds))
    assert len(rows) == len(asked)
    assert set(rows[["dataset", "shots", "method", "seed"]].itertuples(index=False, name=None)) == asked


@pytest.mark.parametrize("dataset", few_labels.DATA)
def test_every_cell_is_a_study_of_what_train_does(dataset: str, tmp_path: Path) -> None:
    file = tmp_path / "few_labels.yaml"
    file.write_text(json.dumps(few_labels.study(dataset, 12, draws=2)))
    study = load_study(file)
    assert [experiment.method for experiment in study.experiments] == list(few_labels.METHODS)
    trained = [experiment.training for experiment in study.experiments if not experiment.is_probe]
    assert {training.head_start for training in trained} == {"probe"}
    assert len(study.seeds) == 2


def test_what_train_returns_is_not_below_the_probe_that_it_started_from_on_validation() -> None:
    rows = pd.read_csv(few_labels.ROWS)
    below = (rows.probe_validation - rows.validation) * few_labels.VALIDATION  # images
    assert below.max() <= 1 + 1e-9
    assert (below > 0.5).sum() <= 1, "few_labels.md speaks of one run: the start's head, scaled, rounds in bf16"


def test_length_holds_the_runs_that_its_configuration_asks_for_and_no_test_accuracy() -> None:
    rows = pd.read_csv(length.ROWS)
    study = load_study(CONFIGS / f"{length.STUDY}.yaml")
    asked = set(itertools.product((one.name for one in study.experiments), study.seeds))
    assert len(rows) == len(asked)
    assert set(rows[["experiment", "seed"]].itertuples(index=False, name=None)) == asked
    steps = {one.name: one.total_steps(study.data.train_images or 0) for one in study.experiments}
    assert (rows.steps == rows.experiment.map(steps)).all()
    assert (rows.best >= rows["last"]).all()
    assert not any("test" in column for column in rows)


def test_runs_of_another_study_are_not_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected real runs of length_elpv, all of them done"):
        length.keep(planted.write(tmp_path, planted.quickstart()))
