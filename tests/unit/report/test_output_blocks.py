"""The page of a model of several labels, or of numbers: what goes together, errors by size, and the worst images."""

import csv
from pathlib import Path

import numpy as np
import planted
import pytest
from chromium import check_page, needs_chromium
from test_model_page import PNG, record_of

from peft_vit.base.statistics import TemperaturePrior
from peft_vit.core.records import RunRecord
from peft_vit.core.records import TestedCalibration as Held
from peft_vit.core.tasks import MULTILABEL, REGRESSION, Task
from peft_vit.deploy.presentation import PRESENTED, LabelledOutputs
from peft_vit.lab.report import build_report

PRIOR = TemperaturePrior(median=1.5, spread=0.35)
LABELS, NUMBERS = ["crack", "dirt", "a label whose name is as long as this"], ["width", "height <mm>"]


def learned(task: Task, names: list[str], outputs, labels, **changes) -> RunRecord:
    """Return the record of a run that says so of test images, and that learned from as many others what that means."""
    decision = task.decide(outputs, labels, PRIOR)
    metric = next(iter(task.metrics))
    plain = record_of()
    training = plain.spec.experiment.training.model_copy(update={"metric": metric})
    experiment = plain.spec.experiment.model_copy(update={"training": training})
    data = plain.spec.data.model_copy(update={"task": task.name, "dataset": "csv", "path": "table.csv"})
    covered, sizes = task.covered(decision, outputs, labels)
    predictions = task.predictions(outputs.astype(np.float32), labels, np.arange(len(labels)), decision=decision)
    measured = task.measure(outputs, labels, decision)
    values = {
        "spec": plain.spec.model_copy(update={"experiment": experiment, "data": data}),
        "class_names": names,
        "class_counts": {},
        "predictions": predictions.model_copy(update={"files": [f"{place:02}.jpg" for place in range(len(labels))]}),
        "decision": decision,
        "test": measured,
        "validation": measured,
        "head_fit": None,
        "evaluations": [],
        "majority_accuracy": {},
        "tested_calibration": Held(nll=1.0, probability=[], covered=covered, set_size=sizes),
    }
    return plain.model_copy(update=values | changes)


def of_labels(**changes) -> RunRecord:
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 3)) < 0.4).astype(float)
    labels[:, 1] = np.where(labels[:, 0] == 1, 1.0, labels[:, 1])  # a crack is dirty
    outputs = np.where(labels == 1, 1.0, -1.0) + rng.normal(0, 1.2, (60, 3))
    labels[:4, 2] = np.nan
    return learned(MULTILABEL, LABELS, outputs, labels, **changes)


def of_numbers(**changes) -> RunRecord:
    rng = np.random.default_rng(1)
    numbers = rng.normal((10, 200), (2, 30), (60, 2))
    task = REGRESSION.fitted(numbers)
    outputs = (numbers - numbers.mean(0)) / numbers.std(0) + rng.normal(0, 0.4, (60, 2))
    return learned(task, NUMBERS, outputs, numbers, **changes)


def written(record: RunRecord, folder: Path, *, pictures: bool = True):
    """Return the folder of a model's page, and the positions of which pictures were asked for."""
    asked = []

    def thumbnails(_, positions) -> list[bytes]:
        asked.append(list(positions))
        return [PNG] * len(positions)

    planted.write(folder, [record])
    build_report(folder, folder / "report", thumbnails=thumbnails if pictures else None)
    return folder / "report", asked


def rows_in(folder: Path, name: str) -> list[dict[str, str]]:
    (file,) = [file for file in folder.rglob("*.csv") if file.stem.endswith(name)]
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_labels_that_go_together_are_counted_in_truth_and_as_told(tmp_path: Path) -> None:
    record = of_labels()
    folder, _ = written(record, tmp_path)
    labels = np.array([[value is not None and value for value in row] for row in record.predictions.labels]) == 1
    told = np.array(record.predictions.predicted) >= record.decision.thresholds
    rows = {(row["label"], row["with"]): row for row in rows_in(folder, "together")}
    assert len(rows) == 9
    for a, first in enumerate(LABELS):
        for b, second in enumerate(LABELS):
            row = rows[first, second]
            assert int(row["true"]) == (labels[:, a] & labels[:, b]).sum()
            assert int(row["predicted"]) == (told[:, a] & told[:, b]).sum()


def test_the_surest_false_alarms_and_misses_of_each_label_are_shown(tmp_path: Path) -> None:
    record = of_labels()
    _, asked = written(record, tmp_path)
    truth, scores = np.array(record.predictions.labels, dtype=float), np.array(record.predictions.predicted)
    outputs = LabelledOutputs(truth, scores, LABELS, record.decision)
    shown = list(PRESENTED["multilabel"].image_selections(outputs))
    assert [gallery.slug for gallery in shown] == ["false_alarms", "misses"]
    assert asked == [[place for _, images in gallery.groups for place, _ in images] for gallery in shown]
    alarms = scores >= record.decision.thresholds
    for gallery, there in zip(shown, (0.0, 1.0), strict=True):
        for title, images in gallery.groups:
            k = LABELS.index(title.rpartition(":")[0])
            wrong = np.flatnonzero((truth[:, k] == there) & (alarms[:, k] != there)).tolist()
            wrong.sort(key=lambda n: scores[n, k] * (1 if there else -1))
            assert [place for place, _ in images] == wrong[:4]
            assert title.endswith(f": {len(wrong[:4])} of {len(wrong)}")
            assert images[0][1][0] == f"{LABELS[k]}: {scores[wrong[0], k]:.1%}"


def test_errors_of_numbers_are_shown_by_size_with_the_worst_images(tmp_path: Path) -> None:
    record = of_numbers()
    folder, asked = written(record, tmp_path)
    truth, predicted = np.array(record.predictions.labels), np.array(record.predictions.predicted)
    rows = rows_in(folder, "residuals")
    assert [float(row["error"]) for row in rows] == pytest.approx((predicted - truth).T.ravel())
    reach = np.array([float(row["reach"]) for row in rows]).reshape(2, 60).T
    held = (np.abs(predicted - truth) <= reach).mean()
    assert record.tested_calibration.covered[0.9] == pytest.approx(held)
    parts = rows_in(folder, "errors_by_size")
    assert len(parts) == 2 * 5
    order = np.argsort(predicted[:, 0])[:12]
    assert float(parts[0]["Mean absolute error"]) == pytest.approx(np.abs(predicted - truth)[order, 0].mean())
    assert parts[0]["Intervals that hold"] == f"{100 * (np.abs(predicted - truth) <= reach)[order, 0].mean():.1f} %"
    sizes = (np.abs(predicted - truth) / record.decision.spread).mean(1)
    assert asked == [np.argsort(-sizes)[:12].tolist()]


@pytest.mark.parametrize("record", [of_labels, of_numbers])
def test_without_pictures_the_worst_are_a_table_and_what_is_not_there_is_left_out(tmp_path: Path, record) -> None:
    folder, _ = written(record(), tmp_path / "a", pictures=False)
    titles = {title.strip("*") for title in (folder / "card.md").read_text().splitlines() if title.startswith("**")}
    own, others = {"The surest misses", "Prediction sets"}, {"The largest errors", "Intervals"}
    if record is of_numbers:
        own, others = others, own
    assert own | {"Each of them", "All measures"} <= titles
    assert not titles & (others | {"Confusion matrix", "The most confident mistakes"})
    one = record().predictions
    few = {"predictions": one, "decision": None, "tested_calibration": None, "class_names": record().class_names}
    if record is of_numbers:  # nothing validated: there are no intervals
        bare = record().decision.model_copy(update={"images": 0, "coverages": (), "half_widths": (), "scale": ()})
        few |= {"decision": bare}
    page, _ = written(record(**few), tmp_path / "b")
    text = (page / "report.html").read_text()
    assert "Coverage asked" not in text
    assert "Intervals that hold" not in text


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("record", [of_labels, of_numbers])
def test_the_page_fits_the_screen_and_axe_finds_nothing(tmp_path: Path, record) -> None:
    check_page(written(record(), tmp_path)[0] / "report.html")
