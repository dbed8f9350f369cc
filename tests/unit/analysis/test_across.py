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
from peft_vit.lab.analysis.across import POOL_KINDS, Across, compare_studies, differences, load_across, parse_pool
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
    assert across.refusals == ()
    (row,) = across.pooled
    assert (row.estimate.name, row.studies, row.ahead) == ("lora_r4", ("a", "b", "c"), 3)
    assert row.interval.estimate == pytest.approx(np.mean([np.mean(A), np.mean(B), np.mean(C)]), abs=1e-9)
    assert row.estimate.verdict == "supported"
    assert row.estimate.adjusted_p == row.estimate.significance.p_value, "a family of one"
    by_study = {row_.study: row_.comparison for row_ in across.rows if row_.name == "lora_r4"}
    for label, values in (("a", A), ("b", B), ("c", C)):
        comparison = by_study[label]
        assert list(comparison.by_seed.values()) == pytest.approx(values, abs=1e-9)


DIFFERING: dict[str, tuple[str, dict[str, Any], str]] = {
    "versions": ("versions", {"packages": {"torch": "2.12.0", "timm": "1"}}, "timm 1 in c; 1.0.31 in a and b"),
    "weights": (
        "weights",
        {"weights_sha256": "f" * 64},
        "vit_small_patch14_dinov2 aaaaaaaaaaaa in a and b; ffffffffffff in c",
    ),
    "random": (
        "weights",
        {"random_weights": True, "weights_sha256": None},
        "pretrained weights in a and b; random weights in c",
    ),
    "splits": ("splits", {"data_sha256": "b" * 64}, "a and c divide the same images differently"),
}


@pytest.mark.parametrize("case", DIFFERING)
def test_what_differs_is_not_pooled_unless_asked_by_name_and_then_told(three, case) -> None:
    kind, changes, reason = DIFFERING[case]
    refused = three(changes)
    assert refused.pooled == ()
    (refusal,) = refused.refusals
    assert (refusal.kind, refusal.experiments, refusal.studies) == (kind, ("lora_r4",), ("a", "b", "c"))
    assert reason in refusal.reason
    assert len(refused.rows) == 6, "each study's own numbers stand all the same"
    (row,) = three(changes, pool=parse_pool(kind, "--allow-mismatch")).pooled
    assert row.allowed == ((kind, refusal.reason),)


def test_seconds_of_other_hardware_are_not_pooled_but_accuracy_is(three) -> None:
    across = three({"processor": "other"})
    assert (len(across.pooled), across.times) == (1, ())
    (refusal,) = across.refusals
    assert refusal.kind == "timings"
    assert "cpu on other, 2 processors, 2 threads in c" in refusal.reason


def pair(tmp_path: Path, first: Any = None, second: Any = None, **differences: list[float]) -> dict[str, Study]:
    """Return studies a and b on other images, with lora_r4 unless other experiments are given, each changed."""
    made = [records(name, differences or {"lora_r4": A}, images=images) for name, images in ("ab", "bc")]
    changed = [
        [change(run) if change else run for run in own] for own, change in zip(made, (first, second), strict=True)
    ]
    return loaded(tmp_path, *([run for run in own if run is not None] for own in changed))


def slower(factor: float) -> Callable[[RunRecord], RunRecord]:
    """Return a change that gives lora_r4 so many times the seconds a step of the others."""
    return lambda run: run.model_copy(
        update={"seconds_per_step": 0.5 * (factor if run.spec.experiment.name == "lora_r4" else 1.0)}
    )


def test_time_is_a_ratio_to_the_reference(tmp_path) -> None:
    (row,) = compare_studies(pair(tmp_path, slower(2.0), slower(0.5))).times
    assert row.interval.estimate == pytest.approx(1.0)
    assert (row.interval.low, row.interval.n) == (None, 6)


@pytest.mark.parametrize("broken", [0.0, None])  # a record with any other is refused when it is read
def test_a_time_that_is_none_is_no_time(tmp_path, broken) -> None:
    def changed(run: RunRecord) -> RunRecord:
        first = (run.spec.experiment.name, run.spec.seed) == ("lora_r8", 0)
        return run.model_copy(update={"seconds_per_step": broken}) if first else run

    (row,) = compare_studies(pair(tmp_path, changed)).times
    assert (row.interval.n, row.interval.estimate) == (5, 1.0)


def test_precision_and_configuration_are_told_by_field(tmp_path) -> None:
    experiment = EXPERIMENTS["lora_r4"]
    longer = experiment.model_copy(update={"training": experiment.training.model_copy(update={"epochs": 9})})

    def changed(run: RunRecord) -> RunRecord:
        own = longer if run.spec.experiment.name == "lora_r4" else run.spec.experiment
        return planted.asking(run, precision="fp32", experiment=own)

    across = compare_studies(pair(tmp_path, None, changed))
    assert {refusal.kind: refusal.reason for refusal in across.refusals} == {
        "configurations": "lora_r4.training.epochs: 3 in a, 9 in b",
        "precision": "bf16 in a; fp32 in b",
    }
    assert (across.pooled, across.times) == ((), ())


def test_the_same_split_by_seed_is_no_difference() -> None:
    a, b, c, d = (planted.record(EXPERIMENTS["lora_r4"], seed, 0.7) for seed in (0, 1, 1, 2))
    assert "splits" not in differences({"a": runs_of([a, b]), "b": runs_of([c, d])})
    per_seed = {
        label: runs_of(
            [
                run.model_copy(update={"provenance": planted.provenance(seed, split_sha256=f"{seed:064x}")})
                for run in own
                for seed in [run.spec.seed]
            ]
        )
        for label, own in {"a": [a, b], "b": [c, d]}.items()
    }
    assert "splits" not in differences(per_seed), "seed 1, which both have, is divided alike"
    apart = {"a": per_seed["a"], "b": per_seed["b"][1:]}
    assert differences(apart)["splits"] == "a and b divide the same images differently", "no seed tells that they agree"


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
    assert all(row.comparison is None for row in across.rows)
    against = compare_studies(studies, reference="full_finetuning")
    assert [row.estimate.name for row in against.pooled] == ["adalora_top_k_fisher"]
    with pytest.raises(UserError, match="--reference: 'lora_r8' has finished runs in fewer than two studies"):
        compare_studies(studies, reference="lora_r8")
    assert [(row["metric"], row["rho"]) for row in across.agreements] == [("fisher", pytest.approx(1.0))]


def test_pooled_p_values_are_corrected_over_the_table_in_which_a_row_without_a_test_counts(tmp_path) -> None:
    studies = pair(tmp_path, lora_r4=A, lora_r2=[0.01] * 3, lora_r1=C)
    rows = {row.estimate.name: row.estimate for row in compare_studies(studies).pooled}
    assert rows["lora_r4"].adjusted_p == pytest.approx(3 * rows["lora_r4"].significance.p_value)
    assert rows["lora_r1"].verdict == "not decided"
    assert rows["lora_r2"].adjusted_p is None, "no spread, no test"


def test_seeds_that_are_missing_leave_a_study_without_interval(tmp_path) -> None:
    made = [records("a", {"lora_r4": A}), records("b", {"lora_r4": [0.01]}, images="c")]
    failed = planted.failed(EXPERIMENTS["lora_r4"], 1, "out of memory", study="b")
    studies = loaded(tmp_path, made[0], [*made[1], failed])
    (row,) = compare_studies(studies).pooled
    assert (row.interval.low, row.estimate.verdict) == (None, "not decided")
    assert any("Failed" in notice and "out of memory" in notice for notice in studies["b"].notices)


def test_what_stands_twice_is_refused_by_name(tmp_path) -> None:
    first, second = planted.write(tmp_path / "one", records("a", {"lora_r4": A})), tmp_path / "two"
    planted.write(second, records("b", {"lora_r4": B}, images="c"))
    with pytest.raises(UserError, match=r"one/\.\./one: is given twice"):
        load_across([first, first / ".." / "one"])
    with pytest.raises(UserError, match=r"one/a: holds the run 'a/.*', and .*one holds it too"):
        load_across([first, first / "a"])
    copied = records("b", {"lora_r4": A})  # another name, the same images, seeds and settings
    with pytest.raises(UserError, match=r"'b/lora_r4/seed_0'.* holds it as 'a/lora_r4/seed_0' too"):
        load_across([first, planted.write(tmp_path / "three", copied)])
    with pytest.raises(UserError, match=r"holds one study \(a\), and this needs two"):
        load_across([first])
    assert list(load_across([first, second])) == ["a", "b"]


def test_studies_of_one_name_are_told_apart_by_directory(tmp_path) -> None:
    first = planted.write(tmp_path / "one", records("a", {"adalora_top_k_fisher": A}))
    second = planted.write(tmp_path / "two", records("a", {"adalora_top_k_fisher": B}, images="c"))
    studies = load_across([first, second])
    assert list(studies) == [f"a ({first})", f"a ({second})"]
    assert len(compare_studies(studies).agreements) == 1


def test_a_study_without_a_finished_run_takes_no_reference_away(tmp_path) -> None:
    failed = planted.write(tmp_path / "c", [planted.failed(EXPERIMENTS["lora_r4"], 0, "out of memory", study="c")])
    pair(tmp_path)
    across = compare_studies(load_across([tmp_path / "a", tmp_path / "b", failed]))
    assert (across.reference, [row.studies for row in across.pooled]) == ("lora_r8", [("a", "b")])


def test_what_can_not_be_compared_is_refused(tmp_path) -> None:
    def only(name: str) -> Callable[[RunRecord], RunRecord | None]:
        return lambda run: run if run.spec.experiment.name == name else None

    with pytest.raises(UserError, match="a, b: no experiment has finished runs in two of them"):
        compare_studies(pair(tmp_path, only("lora_r8"), only("lora_r4")))
    smoke = planted.write(tmp_path / "smoke", [planted.record(EXPERIMENTS["lora_r4"], 0, 0.7, smoke=True)])
    with pytest.raises(UserError, match=r"quickstart \(smoke\) in .*smoke runs say nothing"):
        load_across([tmp_path / "a", smoke])
    places = []  # the same images in another folder are the same images
    for study, folder in (("c", "here"), ("d", "there")):
        made = records(study, {"lora_r4": A})
        data = made[0].spec.data.model_copy(update={"dataset": "image-folder", "path": folder})
        places.append(planted.write(tmp_path / folder, [planted.asking(run, data=data) for run in made]))
    with pytest.raises(UserError, match=r"holds the run 'd/.* holds it as 'c/"):
        load_across(places)


def test_what_may_be_pooled_is_named_strictly() -> None:
    assert parse_pool("", "--allow-mismatch") == frozenset()
    assert parse_pool(" versions, timings", "--allow-mismatch") == {"versions", "timings"}
    for text in ("all", "versions,", "Versions", ",", "versions timings"):
        with pytest.raises(UserError, match=r"--allow-mismatch: .* is not one of configurations"):
            parse_pool(text, "--allow-mismatch")
    assert set(POOL_KINDS) == {"configurations", "precision", "versions", "splits", "weights", "timings"}


def test_a_setting_of_one_side_only_is_a_difference(tmp_path) -> None:
    name = "adalora_top_k_fisher"
    section = EXPERIMENTS[name].adalora.model_copy(update={"top_k": 12})
    other = EXPERIMENTS[name].model_copy(update={"adalora": section})

    def changed(run: RunRecord) -> RunRecord:
        return planted.asking(run, experiment=other) if run.spec.experiment.name == name else run

    (refusal,) = compare_studies(pair(tmp_path, None, changed, **{name: A})).refusals
    assert refusal.reason == f"{name}.adalora.top_k: None in a, 12 in b"
