"""studies.md says of the published protocol what results/ holds, and the study runs what the pilot's rule chose."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import planted
import pytest
from scipy import stats

from experiments.methods.scripts import published
from experiments.scripts import evidence
from peft_vit.base.errors import UserError
from peft_vit.core.config import load_study
from peft_vit.core.records import Predictions

CONFIGS = Path(__file__).parents[1] / "configs"


def rows(study: str, experiment: str, validation: list[float], **columns: object) -> pd.DataFrame:
    """Return planted rows, a seed each from 310 on."""
    filled = {"validation_nll": 0.3, "image_size": 112, "steps": 392, "seconds": 400.0, "threads": 1, "status": "done"}
    filled |= {
        "method": "lora",
        "learning_rate": 3e-4,
        "trained_values": 330,
        "backbone_values": 20_000,
        "commit": "abc",
        "majority_accuracy": 0.6875,
    }
    seeds = {"study": study, "experiment": experiment, "seed": range(310, 310 + len(validation))}
    return pd.DataFrame({**seeds, "validation_accuracy": validation, **filled, **columns})


def probe(study: str, experiment: str, validation: float, size: int) -> pd.DataFrame:
    """Return two planted rows of a linear probe."""
    changes = {"image_size": size, "method": "linear", "learning_rate": np.nan}
    return rows(study, experiment, [validation] * 2, **changes)


def pilot(*factors: pd.DataFrame) -> pd.DataFrame:
    """Return a pilot whose best rate is 3e-4, by loss, and factors."""
    return pd.concat(
        [
            probe(published.PILOT, "linear_probe", 0.99, 112),
            probe("elpv_published_factors_168", "linear_probe_168", 0.90, 168),
            probe("elpv_published_factors_224", "linear_probe_224", 0.91, 224),
            rows(published.PILOT, "plain_lr_1e-4", [0.88, 0.90], learning_rate=1e-4, validation_nll=0.4),
            rows(published.PILOT, "plain_lr_3e-4", [0.90, 0.88]),
            rows(published.PILOT, "plain_lr_1e-3", [0.85, 0.86], learning_rate=1e-3),
            *factors,
        ]
    )


def test_the_rule_takes_the_best_rate_and_every_factor_above_it() -> None:
    found = pilot(
        rows("elpv_published_factors", "mixup", [0.90, 0.8825]),
        rows("elpv_published_factors", "int4", [0.88, 0.90]),  # as good is not better
        rows("elpv_published_factors", "epochs_24", [0.95, 0.95], steps=1176),
    )
    assert published.chosen_rate(found) == 3e-4
    assert published.taken(found) == ("mixup", "epochs_24")
    table = published.pilot_table(found)
    assert "| **`mixup`** | 112 | 392 | 89.1 | 90.0, 88.2 | 0.300 | +0.1 |" in table
    assert "| **`plain_lr_3e-4`** |" in table
    assert "| `int4` |" in table
    assert "| `plain_lr_1e-4` | 112 | 392 | 89.0 | 88.0, 90.0 | 0.400 | – |" in table


@pytest.mark.parametrize(("validation", "size"), [(0.91, 168), (0.9125, 224), (0.89, 168)])
def test_larger_images_are_taken_for_more_than_a_point(validation: float, size: int) -> None:
    found = pilot()
    found.loc[found.image_size == 224, "validation_accuracy"] = validation
    assert published.chosen_size(found) == size
    assert f"**`linear_probe_{size}`**" in published.pilot_table(found)
    assert published.chosen_size(found[found.image_size != 224]) is None


def test_the_study_stands_beside_what_was_published_with_students_interval() -> None:
    test = [0.90, 0.91, 0.89, 0.92, 0.90]
    by_certainty = {"sure_images": 560, "sure_test_accuracy": 0.95, "unsure_test_accuracy": [0.6, 0.6, 0.6, 0.6, 0.65]}
    study = rows(published.STUDY, "lora_r4", [0.9] * 5, test_accuracy=test, **by_certainty)
    probes = rows(published.STUDY, "linear_probe", [0.8] * 5, test_accuracy=0.8, **by_certainty, trained_values=0)
    found = pd.concat([pilot(), pd.concat([study, probes]).sort_values("experiment")])
    low, high = stats.t.interval(0.95, 4, 90.4, np.std(test, ddof=1) * 100 / np.sqrt(5))
    line = next(line for line in published.study_table(found).splitlines() if "lora_r4" in line)
    assert line.startswith(
        f"| `lora_r4` | 90.4 % [{low:.1f}, {high:.1f}] | 90.0, 91.0, 89.0, 92.0, 90.0 | 95.0 | 61.0 | 1.65 | 0.6 |"
    )
    assert "ResNet-152, oversampling | 90.1 %" in published.study_table(found)
    assert "| `linear_probe` | 80.0 % [80.0, 80.0] |" in published.study_table(found)
    assert "of 560 of 656 test images" in published.study_table(found)


def test_accuracy_is_split_by_what_the_experts_were_sure_of(tmp_path: Path) -> None:
    lines = ("a.png  0.0 mono", "b.png  0.3333333333333333   poly", "c.png  0.6666666666666666 mono", "d.png  1.0 poly")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    probabilities = published.defect_probabilities(tmp_path)
    np.testing.assert_allclose(probabilities, [0, 1 / 3, 2 / 3, 1])
    predictions = Predictions(
        images=[3, 2, 1, 0, 3], labels=[1, 1, 0, 0, 1], predicted=[1, 1, 1, 0, 0], probability=[0.9] * 5
    )
    record = planted.record(planted.experiments()["lora_r8"], 312, 0.7, changes={"predictions": predictions})
    assert published.by_certainty(record, probabilities) == {
        "sure_images": 3,
        "sure_test_accuracy": 2 / 3,
        "unsure_test_accuracy": 1 / 2,
    }


def test_test_accuracy_is_kept_of_the_study_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "RESULTS", tmp_path)
    monkeypatch.setattr(published, "ROWS", tmp_path / "rows.csv")
    lora = planted.experiments()["lora_r8"]
    published.keep(planted.write(tmp_path / "a", [planted.record(lora, 310, 0.7, study=published.PILOT)]))
    assert not any("test" in column for column in pd.read_csv(published.ROWS))
    assert not [*tmp_path.glob("*.tar.xz")]
    monkeypatch.setattr(published, "defect_probabilities", lambda: np.tile([0.0, 1 / 3], 1312))
    predictions = Predictions(images=[0, 1], labels=[1, 1], predicted=[1, 0], probability=[0.9, 0.6])
    study = planted.record(lora, 312, 0.7, study=published.STUDY, changes={"predictions": predictions})
    published.keep(planted.write(tmp_path / "b", [study]))
    kept = pd.read_csv(published.ROWS).set_index("study")
    assert kept.filter(regex="sure").loc[published.STUDY].to_list() == [1, 1, 0]
    assert kept.test_accuracy.notna().to_dict() == {published.PILOT: False, published.STUDY: True}
    with tarfile.open(tmp_path / "elpv_published.tar.xz") as archive:
        assert [Path(name).name for name in archive.getnames()] == ["record.json"]
    with pytest.raises(UserError, match=r"expected real runs of elpv_published\*, all of them done"):
        published.keep(planted.write(tmp_path / "c", planted.quickstart()[:1]))


def test_the_document_says_what_results_hold() -> None:
    text = published.DOCUMENT.read_text(encoding="utf-8")
    made = published.tables()
    assert made
    assert all(f"<!-- {name} -->" in text for name in made)
    assert evidence.filled(text, made) == text, "run experiments/methods/scripts/published.py"


def test_results_hold_the_runs_that_the_configurations_ask_for() -> None:
    kept = pd.read_csv(published.ROWS)
    for study in kept.study.unique():
        asked = load_study(CONFIGS / f"{study}.yaml")
        runs = {(one.name, seed) for one in asked.experiments for seed in asked.seeds}
        found = kept[kept.study == study]
        assert set(found[["experiment", "seed"]].itertuples(index=False, name=None)) == runs, study


def test_the_study_takes_what_the_rule_chose() -> None:
    kept = pd.read_csv(published.ROWS)
    study = load_study(CONFIGS / f"{published.STUDY}.yaml")
    (experiment,) = (one for one in study.experiments if one.method != "linear")
    factors = published.taken(kept)
    pilots = load_study(CONFIGS / f"{published.PILOT}.yaml")
    assert experiment.training.learning_rate == published.chosen_rate(kept)
    assert study.data.image_size == published.chosen_size(kept)
    assert (experiment.method == "qa_lora") == ("int4" in factors)
    assert experiment.training.epochs == (24 if "epochs_24" in factors else 8)
    assert experiment.training.class_weights == ("balanced" if "class_weights" in factors else "none")
    assert any(one.mixes for one in experiment.training.augmentation) == ("mixup" in factors)
    assert not {*study.seeds} & {*pilots.seeds}


def test_what_the_text_says_of_each_class_is_in_the_kept_records() -> None:
    right: dict[str, list[list[float]]] = {"lora_r4_int4": [], "linear_probe": []}
    with tarfile.open(published.RESULTS / "elpv_published.tar.xz") as archive:
        for entry in (entry for entry in archive.getmembers() if entry.name.endswith("record.json")):
            handle = archive.extractfile(entry)
            assert handle is not None
            record = json.load(handle)
            labels, predicted = (np.array(record["predictions"][name]) for name in ("labels", "predicted"))
            recalls = [float((predicted[labels == label] == label).mean()) for label in (0, 1)]
            right[record["spec"]["experiment"]["name"]].append(recalls)
    assert {name: len(runs) for name, runs in right.items()} == {"lora_r4_int4": 5, "linear_probe": 5}
    lora, linear = (100 * np.mean(runs, axis=0) for runs in right.values())
    text = published.DOCUMENT.read_text(encoding="utf-8")
    assert f"it names {lora[0]:.0f} % of functional cells rightly, {lora[1]:.0f} % of the defective" in text
    assert f"the probe {linear[0]:.0f} and {linear[1]:.0f})" in text
