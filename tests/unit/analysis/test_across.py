"""Studies compared and pooled, on planted values whose answer comes from elsewhere."""

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import planted
import pytest

from peft_vit.base.errors import UserError
from peft_vit.core.records import RunRecord
from peft_vit.lab.analysis.across import Across, compare_studies, differences, load_across, parse_pool
from peft_vit.lab.analysis.studies import Run, Study

EXPERIMENTS = planted.experiments()
N_TEST = 100_000


def records(
    study: str, differences: dict[str, list[float]], *, images: str = "b", level: float = 0.7, **provenance: Any
) -> list[RunRecord]:
    """Return runs of lora_r8, and of others that lie the given differences above it, by seed."""
    most = max(len(values) for values in differences.values())
    made = []
    for name, values in {"lora_r8": [0.0] * most, **differences}.items():
        for seed, value in enumerate(values):
            changes = {"test": planted.metrics(level + 0.01 * seed + value, N_TEST)}
            own = {"data_sha256": images * 64, "split_sha256": images.upper() * 64, **provenance}
            made.append(
                planted.record(EXPERIMENTS[name], seed, 0.7, study=study, changes=changes, provenance_changes=own)
            )
    return made


A, B, C = [0.010, 0.014, 0.006], [0.030, 0.022, 0.026, 0.034], [-0.004, 0.004, 0.012]


def runs_of(made: list[RunRecord]) -> tuple[Run, ...]:
    return planted.study_of(made).runs


def loaded(tmp_path: Path, *studies: list[RunRecord]) -> dict[str, Study]:
    return load_across([planted.write(tmp_path / made[0].spec.study, made) for made in studies])


@pytest.fixture
def three(tmp_path: Path) -> Callable[..., Across]:
    def compare(changed: Any = MappingProxyType({}), **options: Any) -> Across:
        made = [
            records(name, {"lora_r4": values}, **{"images": images, "level": level, **(changed if name == "c" else {})})
            for name, values, images, level in (("a", A, "b", 0.7), ("b", B, "c", 0.6), ("c", C, "d", 0.85))
        ]
        return compare_studies(loaded(tmp_path, *made), **options)

    return compare


def test_pooled_where_only_the_images_differ(three) -> None:
    across = three()
    assert across.reference == "lora_r8"
    (pooled,) = across.pooled
    assert (pooled.name, pooled.studies, pooled.ahead) == ("lora_r4", ("a", "b", "c"), 3)
    assert pooled.differing == {}
    assert pooled.interval.estimate == pytest.approx(np.mean([np.mean(A), np.mean(B), np.mean(C)]), abs=1e-9)
    assert pooled.verdict == "supported"
    assert pooled.adjusted_p == pooled.significance.p_value, "a family of one"
    by_study = {row.study: row.estimate for row in across.rows if row.name == "lora_r4"}
    for label, values in (("a", A), ("b", B), ("c", C)):
        assert list(by_study[label].by_seed.values()) == pytest.approx(values, abs=1e-9)


DIFFERING: dict[str, tuple[str, dict[str, Any], str]] = {
    "versions": ("versions", {"packages": {"torch": "2.12.0", "timm": "1"}}, "timm: 1.0.31 in a, 1.0.31 in b, 1 in c"),
    "weights": (
        "weights",
        {"weights_sha256": "f" * 64},
        "vit_small_patch14_dinov2: aaaaaaaaaaaa in a, aaaaaaaaaaaa in b, ffffffffffff in c",
    ),
    "random": (
        "weights",
        {"random_weights": True, "weights_sha256": None},
        "weights: pretrained in a, pretrained in b, random in c",
    ),
    "splits": ("splits", {"data_sha256": "b" * 64}, "images bbbbbbbb: BBBBBBBB in a, DDDDDDDD in c"),
}


@pytest.mark.parametrize("case", DIFFERING)
def test_what_differs_is_not_pooled_unless_asked_by_name_and_then_told(three, case) -> None:
    kind, changes, reason = DIFFERING[case]
    across = three(changes)
    (refused,) = across.pooled
    assert (refused.by_seed, refused.interval, refused.verdict) == ({}, None, "not decided")
    assert refused.differing.keys() == {kind}
    assert reason in refused.differing[kind]
    assert len(across.rows) == 6, "each study's own numbers stand all the same"
    (pooled,) = three(changes, pool=parse_pool(kind, "--allow-mismatch")).pooled
    assert pooled.differing == refused.differing
    assert pooled.verdict == "supported"


def pair(tmp_path: Path, first: Any = None, second: Any = None, **differences: list[float]) -> dict[str, Study]:
    """Return studies a and b on other images, with lora_r4 unless other experiments are given, each changed."""
    made = [records(name, differences or {"lora_r4": A}, images=images) for name, images in ("ab", "bc")]
    changed = [
        [change(run) if change else run for run in own] for own, change in zip(made, (first, second), strict=True)
    ]
    return loaded(tmp_path, *([run for run in own if run is not None] for own in changed))


def test_precision_and_configuration_are_told_by_field(tmp_path) -> None:
    experiment = EXPERIMENTS["lora_r4"]
    longer = experiment.model_copy(update={"training": experiment.training.model_copy(update={"epochs": 9})})

    def changed(run: RunRecord) -> RunRecord:
        own = longer if run.spec.experiment.name == "lora_r4" else run.spec.experiment
        return planted.asking(run, precision="fp32", experiment=own)

    (refused,) = compare_studies(pair(tmp_path, None, changed)).pooled
    assert refused.differing == {
        "configurations": "lora_r4.training.epochs: 3 in a, 9 in b",
        "precision": "precision: bf16 in a, fp32 in b",
    }
    assert refused.by_seed == {}


@pytest.mark.parametrize("changes", [{"test_split": "per_seed"}, {"train_subset": "per_seed"}])
def test_a_split_of_each_seed_is_compared_with_that_of_the_same_seed(changes) -> None:
    def own(split: str, *seeds: int) -> tuple[Run, ...]:
        made = [planted.record(EXPERIMENTS["lora_r4"], seed, 0.7) for seed in seeds]
        made = [planted.asking(run, data=run.spec.data.model_copy(update=changes)) for run in made]
        return runs_of(
            [
                run.model_copy(
                    update={"provenance": planted.provenance(seed, split_sha256=f"{split}{seed}" + "0" * 62)}
                )
                for run, seed in zip(made, seeds, strict=True)
            ]
        )

    assert "splits" not in differences({"a": own("0", 0, 1), "b": own("0", 1, 2)})
    assert "splits" in differences({"a": own("0", 0, 1), "b": own("1", 1, 2)})


def test_only_common_experiments_are_compared_and_others_named(tmp_path) -> None:
    first, second = records("a", {"lora_r4": A, "lora_r1": A}), records("b", {"lora_r4": B, "lora_r2": B}, images="c")
    across = compare_studies(loaded(tmp_path, first, second))
    assert across.alone == {"lora_r1": "a", "lora_r2": "b"}
    assert {row.name for row in across.rows} == {"lora_r8", "lora_r4"}


def test_without_a_common_reference_there_are_no_differences(tmp_path) -> None:
    def without(run: RunRecord) -> RunRecord | None:
        return None if run.spec.experiment.name == "lora_r8" else run

    studies = pair(tmp_path, without, without, full_finetuning=A, adalora_top_k_fisher=B)
    across = compare_studies(studies)
    assert (across.reference, across.pooled) == (None, ())
    assert all(row.estimate is None for row in across.rows)
    against = compare_studies(studies, reference="full_finetuning")
    assert [row.name for row in against.pooled] == ["adalora_top_k_fisher"]
    with pytest.raises(UserError, match="--reference: 'lora_r8'"):
        compare_studies(studies, reference="lora_r8")


def test_pooled_p_values_are_corrected_over_the_table_in_which_a_row_without_a_test_counts(tmp_path) -> None:
    studies = pair(tmp_path, lora_r4=A, lora_r2=[0.01] * 3, lora_r1=C)
    rows = {row.name: row for row in compare_studies(studies).pooled}
    assert rows["lora_r4"].adjusted_p == pytest.approx(3 * rows["lora_r4"].significance.p_value)
    assert rows["lora_r1"].verdict == "not decided"
    assert rows["lora_r2"].adjusted_p is None, "no spread, no test"


def test_studies_of_one_name_are_told_apart_by_directory(tmp_path) -> None:
    first = planted.write(tmp_path / "one", records("a", {"adalora_top_k_fisher": A}))
    second = planted.write(tmp_path / "two", records("a", {"adalora_top_k_fisher": B}, images="c"))
    studies = load_across([first, second])
    assert list(studies) == [f"a ({first})", f"a ({second})"]


def test_a_study_without_a_finished_run_takes_no_reference_away(tmp_path) -> None:
    failed = planted.write(tmp_path / "c", [planted.failed(EXPERIMENTS["lora_r4"], 0, "out of memory", study="c")])
    pair(tmp_path, linear_probe=A)
    across = compare_studies(load_across([tmp_path / "a", tmp_path / "b", failed]))
    assert across.reference == "lora_r8", "before the probe, which both have too"
    assert [row.studies for row in across.pooled] == [("a", "b")]


def test_what_can_not_be_compared_is_refused(tmp_path) -> None:
    def only(name: str) -> Callable[[RunRecord], RunRecord | None]:
        return lambda run: run if run.spec.experiment.name == name else None

    with pytest.raises(UserError, match="a, b: no experiment has finished runs in two of them"):
        compare_studies(pair(tmp_path, only("lora_r8"), only("lora_r4")))
    smoke = planted.write(tmp_path / "smoke", [planted.record(EXPERIMENTS["lora_r4"], 0, 0.7, smoke=True)])
    with pytest.raises(UserError, match=r"quickstart \(smoke\): smoke runs say nothing"):
        load_across([tmp_path / "a", smoke])
    places = []  # the same images in another folder are the same images
    for study, folder in (("c", "here"), ("d", "there")):
        made = records(study, {"lora_r4": A})
        data = made[0].spec.data.model_copy(update={"dataset": "image-folder", "path": folder})
        places.append(planted.write(tmp_path / folder, [planted.asking(run, data=data) for run in made]))
    with pytest.raises(UserError, match=r"holds the run 'd/.* is 'c/") as caught:
        load_across(places)
    assert caught.value.file == str(places[1])


def test_what_may_be_pooled_is_named_strictly() -> None:
    assert parse_pool("", "--allow-mismatch") == frozenset()
    assert parse_pool(" versions, weights", "--allow-mismatch") == {"versions", "weights"}
    for text in ("all", "versions,", "Versions", ",", "versions weights", "timings"):
        with pytest.raises(UserError, match="--allow-mismatch: "):
            parse_pool(text, "--allow-mismatch")


def test_where_one_study_may_not_decide_nothing_pooled_is_decided(three, monkeypatch) -> None:
    monkeypatch.setattr(Study, "untested", property(lambda study: "seeds were added" if study.name == "b" else ""))
    across = three()
    (pooled,) = across.pooled
    assert (pooled.verdict, pooled.significance) == ("not decided", None)
    assert pooled.interval.low is not None
    tested = {row.study: row.estimate.significance is not None for row in across.rows if row.estimate}
    assert tested == {"a": True, "b": False, "c": True}
