"""Studies of several labels and of numbers: what is recommended and compared, in the metric's unit.

Planted errors are the planted shares of wrong answers times the standard deviation. So what is said of them has
to be what is said of accuracies, number by number.
"""

import csv
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import planted
import pytest

from peft_vit.core.config import DataConfig
from peft_vit.core.records import Metrics, Predictions, RunRecord

pytestmark = pytest.mark.part("analyzer")
EXPERIMENTS = planted.experiments()
BEST, THIRD, WORSE = "lora_r8", "qa_lora_8bit_int8_linear", "qa_lora_4bit_fp4_cosine"
SD = 2.5
DATA = DataConfig(dataset="csv", path="numbers.csv", image_size=32, validation_images=9, test_images=9)
LABELS = [[SD], [-SD]]
SMALL: dict[str, Any] = {"steps": [], "sites": [], "rank_history": [], "bits_history": [], "quantization": None}
OF = {"regression": ("mae", "mean absolute error"), "multilabel": ("map", "mean average precision")}


def as_task(record: RunRecord, task: str) -> RunRecord:
    """Return the record of a run whose mean absolute error, or average precision, is its planted accuracy's."""
    metric, _ = OF[task]

    def measured(own: Metrics) -> Metrics:
        value = SD * (1 - own.accuracy) if metric == "mae" else own.accuracy
        return Metrics(n=own.n, nll=own.nll, more={metric: value})

    spec, images = record.spec, [0, 1]
    training = spec.experiment.training.model_copy(update={"metric": metric})
    experiment = spec.experiment.model_copy(update={"training": training})
    spec = spec.model_copy(update={"experiment": experiment, "data": DATA.model_copy(update={"task": task})})
    outcomes = {"test": measured(record.test), "validation": measured(record.validation), "majority_accuracy": {}}
    predictions = Predictions(images=images, labels=LABELS, predicted=LABELS, probability=[])
    own = {"spec": spec, "spec_digest": spec.digest(), "predictions": predictions, "class_names": ["heat"]}
    return record.model_copy(update=own | outcomes | {"evaluations": []})


def records(study: str, n: int = 10, images: str = "b") -> list[RunRecord]:
    """Return a study in which THIRD is as good as BEST and WORSE loses five points, give or take 0.8 a seed."""
    rng = np.random.default_rng([ord(study[0]), n])
    made = []
    for name, loss in ((BEST, 0.0), (THIRD, 0.0), (WORSE, 0.05)):
        noise = np.zeros(n) if name == BEST else 0.008 * rng.normal(size=n)
        for seed, value in enumerate(0.8 - loss + noise - noise.mean()):
            validated = planted.metrics(0.8 - loss - (0.001 if name == THIRD else 0.0), 1000)
            changes = SMALL | {"test": planted.metrics(float(value), 100_000), "validation": validated}
            own = {"data_sha256": images * 64, "split_sha256": images * 64}
            made.append(
                planted.record(EXPERIMENTS[name], seed, 0.8, study=study, changes=changes, provenance_changes=own)
            )
    return made


def of_task(task: str, study: str = "ten", images: str = "b") -> list[RunRecord]:
    return [as_task(record, task) for record in records(study, images=images)]


@pytest.fixture
def told(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setenv("COLUMNS", "160")
    return lambda *arguments: command(*arguments).out


@pytest.mark.parametrize(("task", "unit"), [("regression", "% of a standard deviation"), ("multilabel", "points")])
def test_what_is_recommended_is_what_accuracies_would_say(told, tmp_path, task, unit) -> None:
    planted.write(tmp_path / "accuracies", records("ten"))
    planted.write(tmp_path / "others", of_task(task))
    by_accuracy, said = (told("recommend", tmp_path / name) for name in ("accuracies", "others"))
    _, words = OF[task]
    margin = "1 point" if unit == "points" else f"1 {unit}"
    assert f"loses less than {margin} of test {words} against it" in said
    assert f"mean validation {words} {'80.0 %' if task == 'multilabel' else '0.5'}" in said
    (line,) = (line for line in said.splitlines() if line.startswith("Recommended: "))
    assert f"Recommended: {THIRD}. Test {words} against {BEST}: 0.0 [−0.4, +0.4] {unit}, n = 10 pairs" in line
    numbers = re.compile(r"[+−]?\d+\.\d+(?:e-\d+)?")
    tables = [
        text[text.index("Smallest first") : text.index("Test ", text.index("Smal"))] for text in (by_accuracy, said)
    ]
    assert numbers.findall(tables[0]) == numbers.findall(tables[1]) != []
    assert ("Above 0 the error is smaller" in said) == (task == "regression")


def test_data_sets_are_compared_in_their_metric_and_others_are_refused(told, command, tmp_path) -> None:
    for name, made in {
        "ten": of_task("regression"),
        "other": of_task("regression", "other", "c"),
        "classes": records("classes", images="d"),
    }.items():
        planted.write(tmp_path / name, made)
    said = told("compare", tmp_path / "ten", tmp_path / "other", "--output", tmp_path / "rows.csv")
    assert "test mean absolute error" in said
    assert f"Over studies: test mean absolute error against {BEST} (% of a standard deviation)" in said
    with (tmp_path / "rows.csv").open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    (own,) = (row for row in rows if (row["study"], row["experiment"]) == ("ten", WORSE))
    assert float(own["test_mae"]) == pytest.approx(SD * 0.25, abs=1e-3)
    assert float(own["test_mae_low"]) < float(own["test_mae"]) < float(own["test_mae_high"])
    (pooled,) = (row for row in rows if (row["study"], row["experiment"]) == ("ten; other", WORSE))
    assert float(pooled["difference"]) == pytest.approx(-0.05, abs=1e-3)
    assert pooled["verdict"] == "refuted"
    refused = command("compare", tmp_path / "ten", tmp_path / "classes", code=2).err
    assert "different metrics (accuracy, mean absolute error)" in refused


def test_figures_of_a_study_are_in_the_metrics_unit(told, tmp_path) -> None:
    planted.write(tmp_path / "ten", of_task("regression"))
    told("report", tmp_path / "ten", "--output", tmp_path / "page")
    summary = (tmp_path / "page" / "analysis_summary.md").read_text(encoding="utf-8")
    for title in ("Mean absolute error by method", f"How far from {BEST}"):
        assert title in summary
    (data,) = (tmp_path / "page").rglob("*accuracy_by_method.csv")
    with data.open(encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["experiment"] == WORSE]
    expected = {r.spec.seed: r.test.more["mae"] for r in of_task("regression") if r.spec.experiment.name == WORSE}
    assert {int(row["seed"]): float(row["test_mae"]) for row in rows} == pytest.approx(expected)
    (svg,) = (tmp_path / "page").rglob("*accuracy_by_method.svg")
    assert "test mean absolute error (heat)" in svg.read_text(encoding="utf-8")
    (svg,) = (tmp_path / "page").rglob("*differences_to_lora_r8.svg")
    text = svg.read_text(encoding="utf-8")
    assert "by how much the test mean absolute error is smaller than that of lora_r8" in text
    assert "(% of a standard deviation)" in text
