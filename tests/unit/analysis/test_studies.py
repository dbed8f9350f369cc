from pathlib import Path

import planted
import pytest

from peft_vit.analysis import load_studies
from peft_vit.errors import UserError

EXPERIMENTS = planted.experiments()


def test_all_runs_of_the_quickstart_are_found_in_order(tmp_path: Path) -> None:
    (study,) = load_studies(planted.write(tmp_path, planted.quickstart()))
    assert [e.name for e in study.experiments][:6] == [
        "linear_probe",
        "full_finetuning",
        "lora_r1",
        "lora_r2",
        "lora_r4",
        "lora_r8",
    ]
    assert len(study.runs) == 24
    assert study.seeds == (0, 1)
    assert (study.failed, study.missing, study.notices) == ((), (), ())


def test_failed_and_missing_runs_are_named() -> None:
    linear, lora = EXPERIMENTS["linear_probe"], EXPERIMENTS["lora_r8"]
    records = [
        planted.record(linear, 0, 0.7),
        planted.record(linear, 1, 0.7),
        planted.record(lora, 0, 0.8),
        planted.failed(EXPERIMENTS["lora_r4"], 0, "the loss is not finite at step 31"),
    ]
    study = planted.study_of(records)
    assert study.missing == (("lora_r4", 1), ("lora_r8", 1))
    assert "Failed: lora_r4, seed 0: the loss is not finite at step 31" in study.notices
    assert any("lora_r8 seed 1" in notice for notice in study.notices)
    assert study.of("lora_r4") == ()


def test_a_done_record_without_outcomes_counts_as_failed() -> None:
    hollow = planted.record(EXPERIMENTS["lora_r8"], 0, 0.8, changes={"test": None})
    study = planted.study_of([hollow])
    assert study.runs == ()
    assert "outcomes are missing" in study.notices[0]


def test_smoke_runs_and_real_runs_are_never_pooled() -> None:
    linear = EXPERIMENTS["linear_probe"]
    studies = planted.studies_of([planted.record(linear, 0, 0.7), planted.record(linear, 0, 0.5, smoke=True)])
    assert [study.label for study in studies] == ["quickstart", "quickstart (smoke)"]
    assert [len(study.runs) for study in studies] == [1, 1]
    assert studies[1].notices[0].startswith("Smoke runs")


def test_random_weights_are_named() -> None:
    random = {"random_weights": True, "weights_sha256": None}
    study = planted.study_of([planted.record(EXPERIMENTS["linear_probe"], 0, 0.5, provenance_changes=random)])
    assert study.notices[0].startswith("Random weights: the backbone of linear_probe")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threads": 4}, "2 different numbers of threads"),
        ({"weights_sha256": "e" * 64}, "2 different backbone weights"),
        ({"data_sha256": "e" * 64}, "2 different data sets"),
        ({"processor": "arm"}, "2 different machines"),
        ({"packages": {"torch": "2.6.0"}}, "2 different sets of package versions"),
    ],
)
def test_what_differs_between_runs_is_named(change: dict, words: str) -> None:
    linear = EXPERIMENTS["linear_probe"]
    study = planted.study_of(
        [planted.record(linear, 0, 0.7), planted.record(linear, 1, 0.7, provenance_changes=change)]
    )
    assert any(words in notice for notice in study.notices)


def test_warnings_are_named_once_a_text() -> None:
    factor, top_k = "gradient_scaling_factor 2.0 nearly cancels under AdamW", "top_k 72 takes every site"
    lora, adaptive = EXPERIMENTS["lora_r8"], EXPERIMENTS["adalora_top_k_fisher"]
    records = [planted.record(lora, seed, 0.8, changes={"warnings": [factor]}) for seed in (0, 1)]
    records += [planted.record(adaptive, 0, 0.8, changes={"warnings": [top_k, factor, factor]})]
    records += [planted.failed(adaptive, 1, "stopped").model_copy(update={"warnings": [top_k]})]
    study = planted.study_of(records)
    assert [notice for notice in study.notices if notice.startswith("Warning")] == [
        f"Warning: {top_k}. Runs: adalora_top_k_fisher, seeds 0, 1.",
        f"Warning: {factor}. Runs: adalora_top_k_fisher, seed 0; lora_r8, seeds 0, 1.",
    ]


def test_a_warning_about_the_images_speaks_for_itself() -> None:
    gap = "Images: no test image is of class 'few'"
    record = planted.record(EXPERIMENTS["lora_r8"], 0, 0.8, changes={"warnings": [gap]})
    study = planted.study_of([record])
    assert [notice for notice in study.notices if "few" in notice] == [f"{gap}. Runs: lora_r8, seed 0."]


def test_another_configuration_under_one_name_is_named() -> None:
    other = EXPERIMENTS["lora_r4"].model_copy(update={"name": "lora_r8"})
    study = planted.study_of([planted.record(EXPERIMENTS["lora_r8"], 0, 0.8), planted.record(other, 1, 0.8)])
    assert any("Configurations differ between the seeds of lora_r8" in notice for notice in study.notices)


def test_an_empty_or_missing_directory_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no record\.json"):
        load_studies(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_studies(tmp_path / "nowhere")
    with pytest.raises(UserError, match="does not exist"):
        load_studies(tmp_path / ("x" * 5000))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: is no directory"):
        load_studies(tmp_path / "file")
