"""Latency of a study's experiments, out of times of their exported models: which rows count, and what is refused."""

from pathlib import Path
from typing import Any

import planted
import pytest
from planted import bench_row as row

from peft_vit.base.errors import UserError
from peft_vit.core.records import BenchRow, RunRecord
from peft_vit.lab.analysis.comparison import Cost
from peft_vit.lab.analysis.recommendation import Recommendation, exported_latency, recommend
from peft_vit.lab.analysis.studies import Study

EXPERIMENTS = planted.experiments()
BEST, SMALL, WORSE = "lora_r8", "qa_lora_8bit_int8_linear", "qa_lora_4bit_fp4_cosine"
FILE = Path("bench.json")


def of(experiment: str, seed: int = 0) -> str:
    return f"quickstart/{experiment}/seed_{seed}"


def records() -> list[RunRecord]:
    """Return a study in which SMALL is as good as BEST, a little more or less by seed, and WORSE is not."""
    made = []
    for name, accuracy in ((BEST, 0.8), (SMALL, 0.7999), (WORSE, 0.7)):
        for seed in range(6):
            test = accuracy + (0 if name == BEST else 0.001 * (seed % 3 - 1))
            changes = {"test": planted.metrics(test, 100_000), "validation": planted.metrics(accuracy, 100_000)}
            made.append(planted.record(EXPERIMENTS[name], seed, accuracy, changes=changes))
    return made


@pytest.fixture(scope="module")
def study() -> Study:
    return planted.study_of(records())


def asked(study: Study, rows: list[BenchRow], limits: dict[Cost, float], **options: Any) -> Recommendation:
    return recommend(study, limits, margin=0.01, exported=exported_latency(study, rows, FILE), **options)


def test_of_each_run_its_fastest_model_counts_at_the_smallest_batch_that_all_have(study) -> None:
    rows = [
        row(of(BEST), 0.5, batch=1),
        row(of(BEST), 4.0, batch=8),
        row(of(BEST), 3.0, batch=8, threads=2),
        row(of(BEST, 1), 5.0, batch=8, format="openvino"),
        row(of(BEST), 0.1, batch=16),
        row(of(SMALL), 2.0, batch=8),
        row(None, 0.1, batch=8),
        row("another/study/seed_0", 0.1, batch=8),
    ]
    assert exported_latency(study, rows, FILE) == {BEST: 4.0, SMALL: 2.0}


def test_the_limit_is_applied_to_what_was_timed(study) -> None:
    rows = [row(of(BEST), 0.030), row(of(SMALL, 2), 0.012)]
    result = asked(study, rows, {"latency_s": 0.02})
    assert (result.chosen and result.chosen.name) == SMALL
    assert result.within_limits == (SMALL,)
    assert [each.cost("latency_s") for each in result.rows] == [None, pytest.approx(0.012), pytest.approx(0.030)]


def test_runs_of_several_machines_can_be_compared_by_models_timed_on_one(study) -> None:
    made = records()
    made[-1] = made[-1].model_copy(update={"provenance": planted.provenance(9, processor="another")})
    mixed = planted.study_of(made)
    rows = [row(of(name), seconds) for name, seconds in ((BEST, 0.03), (SMALL, 0.02), (WORSE, 0.01))]
    result = asked(mixed, rows, {"latency_s": 0.025}, measure="latency_s")
    assert result.chosen.name == SMALL
    with pytest.raises(UserError, match="timed on several machines"):
        asked(mixed, rows, {"latency_s": 0.025, "seconds_per_step": 1.0})


@pytest.mark.parametrize(
    "rows",
    [
        [row("other/lora_r8/seed_0", 1.0)],
        [row(of(BEST, 77), 1.0)],
        [row(None, 1.0)],
        [],
        [row(of(BEST), 1.0), row(of(SMALL), 1.0, processor="b")],
        [row(of(BEST), 1.0), row(of(SMALL), 1.0, batch=8)],
    ],
)
def test_what_says_nothing_of_the_study_is_refused(study, rows) -> None:
    with pytest.raises(UserError) as caught:
        exported_latency(study, rows, FILE)
    assert (caught.value.file, caught.value.field) == (str(FILE), "--bench")
