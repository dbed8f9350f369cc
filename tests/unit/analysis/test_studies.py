import planted
import pytest

from peft_vit.base.errors import UserError
from peft_vit.lab.analysis import load_studies

EXPERIMENTS = planted.experiments()


def test_all_runs_of_the_quickstart_are_found_in_order(tmp_path) -> None:
    (study,) = load_studies(planted.write(tmp_path, planted.quickstart()))
    names = ["linear_probe", "full_finetuning", "lora_r1", "lora_r2", "lora_r4", "lora_r8"]
    assert [experiment.name for experiment in study.experiments][:6] == names
    assert (len(study.runs), study.seeds) == (24, (0, 1))
    assert (study.failed, study.unfinished, study.notices) == ((), (), ())


def test_failed_hollow_and_missing_runs_are_named() -> None:
    linear, lora = EXPERIMENTS["linear_probe"], EXPERIMENTS["lora_r8"]
    records = [planted.record(linear, 0, 0.7), planted.record(linear, 1, 0.7), planted.record(lora, 0, 0.8)]
    records += [planted.failed(EXPERIMENTS["lora_r4"], 0, "the loss is not finite at step 31")]
    records += [planted.record(EXPERIMENTS["lora_r2"], 0, 0.8, changes={"test": None})]
    study = planted.study_of(records)
    assert [run.key for run in study.unfinished] == [("lora_r2", 1), ("lora_r4", 1), ("lora_r8", 1)]
    text = "\n".join(study.notices)
    for words in (
        "Failed: lora_r4, seed 0: the loss is not",
        "lora_r8 seed 1",
        "lora_r2, seed 0: the record says done, but outcomes are missing",
    ):
        assert words in text
    assert study.runs_of("lora_r4") == study.runs_of("lora_r2") == ()


def test_smoke_runs_and_real_runs_are_never_pooled() -> None:
    linear = EXPERIMENTS["linear_probe"]
    studies = planted.studies_of([planted.record(linear, 0, 0.7), planted.record(linear, 0, 0.5, smoke=True)])
    assert [study.label for study in studies] == ["quickstart", "quickstart (smoke)"]
    assert [len(study.runs) for study in studies] == [1, 1]
    assert studies[1].notices[0].startswith("Smoke runs")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"threads": 4}, "2 different numbers of threads"),
        ({"weights_sha256": "e" * 64}, "2 different backbone weights"),
        ({"data_sha256": "e" * 64}, "2 different data sets"),
        ({"processor": "arm"}, "2 different machines"),
        ({"packages": {"torch": "2.6.0"}}, "2 different sets of package versions"),
        ({"random_weights": True, "weights_sha256": None}, "The backbone of lora_r8"),
        ({}, "Configurations differ between the seeds of lora_r8"),
    ],
)
def test_what_differs_between_runs_is_named(changes, words) -> None:
    lora = EXPERIMENTS["lora_r8"]
    other = lora if changes else EXPERIMENTS["lora_r4"].model_copy(update={"name": "lora_r8"})
    records = [planted.record(lora, 0, 0.7), planted.record(other, 1, 0.7, provenance_changes=changes)]
    assert any(words in notice for notice in planted.study_of(records).notices)


def test_warnings_are_named_once_a_text() -> None:
    factor, top_k, gap = "a factor that cancels", "top_k 72 takes every module", "Images: no test image of class 'few'"
    lora, adaptive = EXPERIMENTS["lora_r8"], EXPERIMENTS["adalora_top_k_fisher"]
    records = [planted.record(lora, seed, 0.8, changes={"warnings": [factor]}) for seed in (0, 1)]
    records += [planted.record(adaptive, 0, 0.8, changes={"warnings": [top_k, factor, factor, gap]})]
    records += [planted.failed(adaptive, 1, "stopped").model_copy(update={"warnings": [top_k]})]
    assert {
        f"Warning: {top_k}. Runs: adalora_top_k_fisher, seeds 0, 1.",
        f"Warning: {factor}. Runs: adalora_top_k_fisher, seed 0; lora_r8, seeds 0, 1.",
        f"{gap}. Runs: adalora_top_k_fisher, seed 0.",
    } <= set(planted.study_of(records).notices)


@pytest.mark.parametrize(
    ("place", "words"),
    [(".", "holds no record.json"), ("x" * 5000, "does not exist"), ("file", "file: is not a folder")],
)
def test_an_empty_or_missing_directory_is_one_line(place, words, tmp_path) -> None:
    if place == "file":
        (tmp_path / place).touch()
    with pytest.raises(UserError, match=words):
        load_studies(tmp_path / place)
