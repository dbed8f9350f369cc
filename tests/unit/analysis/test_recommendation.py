"""Recommendations on planted records and planted arrays, whose truth is known."""

from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from peft_vit.base.errors import UserError
from peft_vit.base.statistics.estimates import ALPHA
from peft_vit.cli.study_commands import RecommendRequest
from peft_vit.core.config import bytes_of
from peft_vit.core.records import RunRecord
from peft_vit.lab.analysis.comparison import Cost, MethodResult
from peft_vit.lab.analysis.recommendation import MEASURES, Recommendation, needed_pairs, recommend
from peft_vit.lab.analysis.studies import choose_study

EXPERIMENTS = planted.experiments()
BEST, THIRD, TINY = "lora_r8", "qa_lora_8bit_int8_linear", "qa_lora_4bit_fp4_cosine"
N_TEST = 100_000  # so that a share of whole images is as good as the planted number
NOISE = (0.9, -1.1, 0.3, -0.6, 1.4, -0.8, 0.1, 0.7, -1.3, 0.4)  # mean 0, in the unit of the spread


def records(accuracy: dict[str, float], n: int = 10, *, spread: float = 0.006, **options: Any) -> list[RunRecord]:
    """Return runs whose differences to lora_r8 by seed are the planted ones plus `spread` times NOISE."""
    made = []
    for name, value in accuracy.items():
        for seed in range(n):
            test = value + 0.01 * seed / n + (0 if name == BEST else spread * (NOISE[seed] - np.mean(NOISE[:n])))
            changes = {"test": planted.metrics(float(test), N_TEST), "validation": planted.metrics(value, N_TEST)}
            made.append(planted.record(EXPERIMENTS[name], seed, value, changes=changes, **options))
    return made


def asked(made: list[RunRecord], limits: dict[Cost, float] | None = None, **options: Any) -> Recommendation:
    return recommend(planted.study_of(made), limits or {}, margin=0.01, **options)


def candidates(advice: Recommendation) -> list[MethodResult]:
    return [row for row in advice.rows if row.estimate is not None]


def verdicts(advice: Recommendation) -> list[tuple[str, str]]:
    return [(row.name, row.estimate.verdict) for row in candidates(advice)]


def test_equal_accuracy_at_a_third_of_the_bytes_is_recommended_with_ten_seeds() -> None:
    advice = asked(records({BEST: 0.80, THIRD: 0.7999}))
    assert (advice.best.name, advice.chosen.name) == (BEST, THIRD)
    assert advice.chosen.cost("stored_bytes") < advice.best.cost("stored_bytes") / 3
    (tested,) = candidates(advice)
    estimate = tested.estimate
    differences = np.round(list(estimate.by_seed.values()), 9)
    expected = stats.ttest_1samp(differences, -0.01, alternative="greater")
    assert estimate.significance.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    interval = stats.ttest_1samp(differences, 0).confidence_interval(0.9)
    assert (estimate.interval.low, estimate.interval.high) == pytest.approx((interval.low, interval.high), rel=1e-6)


@pytest.mark.parametrize(
    ("third", "options", "adjusted", "verdict"),
    [
        (0.7999, {"n": 3, "spread": 0.012}, True, "not decided"),  # three seeds of the same
        (0.78, {}, True, "refuted"),
        (0.7999, {"spread": 0.0}, False, "not decided"),
        (0.7999, {"n": 1}, False, "not decided"),
    ],
)
def test_what_is_not_shown_is_not_recommended(third, options, adjusted, verdict) -> None:
    advice = asked(records({BEST: 0.80, THIRD: third}, **options))
    assert advice.chosen is None
    (candidate,) = candidates(advice)
    assert (candidate.estimate.adjusted_p is not None, candidate.estimate.verdict) == (adjusted, verdict)
    assert not adjusted or candidate.estimate.adjusted_p > 0.05
    assert (candidate.estimate.interval.low is None) == (options.get("n") == 1)


def test_the_smallest_that_passes_is_named_and_not_the_first_tested_in_any_order_of_records() -> None:
    made = records({BEST: 0.80, THIRD: 0.7999, TINY: 0.75})
    advice, back = asked(made), asked(made[::-1])
    assert verdicts(advice) == [(TINY, "refuted"), (THIRD, "supported")]
    assert advice.chosen.name == THIRD
    assert [row.estimate for row in advice.rows] == [row.estimate for row in back.rows]


def test_a_best_that_is_the_smallest_needs_no_test() -> None:
    advice = asked(records({"linear_probe": 0.85, BEST: 0.80}))
    assert (candidates(advice), advice.chosen) == ([], advice.best)
    assert advice.best.name == "linear_probe"
    assert asked(records({BEST: 0.80, THIRD: 0.80})).best.name == THIRD, "a tie on validation is the smaller one's"


def test_of_sizes_within_a_percent_validation_chooses() -> None:
    """A hundred bytes fewer are no reason to take what validation puts behind."""
    likelier, other = "adalora_proportional_magnitude", "adalora_top_k_fisher"
    made = records({BEST: 0.80, likelier: 0.7999, other: 0.7998})
    advice = asked([shrunk(run, other, by_bytes=100) for run in made])
    assert verdicts(advice) == [(other, "supported"), (likelier, "supported")]
    assert advice.chosen.name == likelier
    assert asked([shrunk(run, other, by_bytes=10**6) for run in made]).chosen.name == other
    alone = asked([shrunk(run, other, by_bytes=100) for run in made if run.spec.experiment.name != BEST])
    assert (candidates(alone), alone.chosen.name) == ([], likelier), "nor less than the best itself"


def shrunk(record: RunRecord, name: str, *, by_bytes: int) -> RunRecord:
    if record.spec.experiment.name != name:
        return record
    less = {"adapter_file_bytes": record.bytes.adapter_file_bytes - by_bytes}
    return record.model_copy(update={"bytes": record.bytes.model_copy(update=less)})


def test_validation_chooses_the_best_and_test_has_no_say() -> None:
    good = {"test": planted.metrics(0.9, N_TEST)}
    best, third = records({BEST: 0.80}), [run.model_copy(update=good) for run in records({THIRD: 0.79})]
    assert asked(best + third).best.name == BEST


def test_a_candidate_that_cannot_be_tested_counts_in_the_family() -> None:
    alone, without_spread = records({BEST: 0.80, THIRD: 0.7999}), records({TINY: 0.7999}, spread=0.0)
    unpaired = [candidate for candidate in records({TINY: 0.7999}, n=10) if candidate.spec.seed > 8]
    (p_value,) = (row.estimate.adjusted_p for row in candidates(asked(alone)))
    for other in (without_spread, [planted.asking(candidate, seed=99) for candidate in unpaired]):
        first, second = (row.estimate.adjusted_p for row in candidates(asked([*alone, *other])))
        assert (first, second) == (None, pytest.approx(2 * p_value))


def test_pairs_are_those_of_common_seeds_on_the_same_images() -> None:
    made = {(run.spec.experiment.name, run.spec.seed): run for run in records({BEST: 0.80, THIRD: 0.7999})}
    made[THIRD, 0] = made[THIRD, 0].model_copy(update={"provenance": planted.provenance(0, split_sha256="e" * 64)})
    del made[BEST, 4]
    (candidate,) = candidates(asked(list(made.values())))
    assert list(candidate.estimate.by_seed) == [1, 2, 3, 5, 6, 7, 8, 9]
    assert "1 pair(s) refused" in candidate.estimate.note
    advice = asked([run for (name, seed), run in made.items() if (name == BEST) == (seed < 5)])
    (candidate,) = candidates(advice)
    assert (advice.chosen, candidate.estimate.by_seed, candidate.estimate.interval) == (None, {}, None)
    assert candidate.estimate.note == "no pair of runs with the same seed"


def test_failed_runs_and_experiments_of_two_configurations_are_left_out_by_name() -> None:
    made = records({BEST: 0.80, THIRD: 0.7999})
    made[-1] = planted.asking(made[-1], precision="fp32")
    failed = planted.failed(EXPERIMENTS["lora_r1"], 0, "out of memory")
    reasons = {"lora_r1": "has no finished run", THIRD: "was configured differently from seed to seed"}
    assert asked([*made, failed]).left_out == reasons
    with pytest.raises(UserError, match="has no finished run"):
        asked([failed])


def test_what_is_beyond_a_limit_is_no_candidate() -> None:
    made = records({BEST: 0.80, THIRD: 0.7999, TINY: 0.75, "linear_probe": 0.7})
    advice = asked(made, {"stored_bytes": 20e6})
    assert (verdicts(advice), advice.chosen) == ([(TINY, "refuted")], None)
    assert advice.within_limits == (TINY,)
    assert asked(made, {"parameters": 770}).within_limits == ("linear_probe",)
    nothing = asked(made, {"stored_bytes": 20e6, "parameters": 770})
    assert (candidates(nothing), nothing.chosen, nothing.within_limits) == ([], None, ())


def test_a_limit_binds_the_largest_run_and_order_goes_by_the_mean() -> None:
    made = records({BEST: 0.80, THIRD: 0.7999})
    sizes = made[-1].bytes
    larger = sizes.model_copy(update={"adapter_file_bytes": sizes.adapter_file_bytes + 10**6})
    made[-1] = made[-1].model_copy(update={"bytes": larger})
    limit = float(sizes.frozen_bytes + sizes.adapter_file_bytes)
    advice = asked(made, {"stored_bytes": limit})
    assert advice.within_limits == ()
    assert advice.rows[0].cost("stored_bytes") == limit + 1e5
    assert asked(made, {"stored_bytes": limit + 2e5}).within_limits == ()
    assert asked(made, {"stored_bytes": limit + 10**6}).chosen.name == THIRD


def test_smallest_by_parameters() -> None:
    made = records({BEST: 0.80, "lora_r4": 0.7999, THIRD: 0.7999})
    assert [asked(made, measure=MEASURES[size]).chosen.name for size in ("bytes", "params")] == [THIRD, "lora_r4"]


def test_times_are_compared_on_one_machine_only() -> None:
    made = records({BEST: 0.80, THIRD: 0.7999})
    assert asked(made, {"seconds_per_step": 0.75}).chosen.name == THIRD
    assert asked(made, {"seconds_per_step": 0.65}).chosen is None
    unknown = made[0].model_copy(update={"seconds_per_step": 0.0})
    advice = asked([unknown, *made[1:]], {"seconds_per_step": 0.75})
    assert advice.within_limits == (THIRD,), "what is not known is no pass"
    moved = planted.provenance(9, processor="another")
    made[-1] = made[-1].model_copy(update={"provenance": moved})
    with pytest.raises(UserError, match="timed on several machines"):
        asked(made, {"seconds_per_step": 0.75})
    assert asked(made, {"stored_bytes": 30e6}).chosen.name == THIRD


def test_latency_where_it_was_measured() -> None:
    made = records({BEST: 0.80, THIRD: 0.7999})
    for options in ({"limits": {"latency_s": 0.02}}, {"measure": "latency_s"}):
        with pytest.raises(UserError, match="hold no latency"):
            asked(made, **options)
    slow = {BEST: {1: 0.01, 8: 0.03}, THIRD: {1: 0.02, 4: 0.03, 8: 0.05}}
    timed = [run.model_copy(update={"latency_s": slow[run.spec.experiment.name]}) for run in made]
    advice = asked(timed, {"latency_s": 0.015})
    assert (advice.chosen.name, advice.within_limits) == (BEST, (BEST,))
    half = [run.model_copy(update={"latency_s": {}}) if run.spec.experiment.name == THIRD else run for run in timed]
    assert asked(half, measure="latency_s").left_out == {THIRD: "has a run without latency"}


def test_one_study_is_chosen_by_name_or_label() -> None:
    real, smoke = records({BEST: 0.8}, n=1), records({BEST: 0.8}, n=1, smoke=True)
    other = records({BEST: 0.8}, n=1, study="other")
    both, three = (planted.studies_of(made) for made in (real + other, real + other + smoke))
    assert choose_study(both[:1], None, Path("results")).name == "other"
    assert choose_study(both, "quickstart", Path("results")).name == "quickstart"
    assert not choose_study(three, "quickstart", Path("results")).smoke
    assert choose_study(three, "quickstart (smoke)", Path("results")).smoke
    for name in (None, "third"):
        with pytest.raises(UserError, match="other, quickstart"):
            choose_study(both, name, Path("results"))


def limit(name: str, value: object) -> object:
    return getattr(RecommendRequest.of(results_dir="results", **{name: value}), name)


def test_limits_as_a_person_writes_them() -> None:
    sizes = {"5MB": 5_000_000, " 5 mb ": 5_000_000, "1.5GiB": 3 * 2**29, "0.5kB": 500, "12B": 12, "2KiB": 2048}
    assert {text: limit("max_bytes", text) for text in sizes} == sizes == {t: bytes_of(t) for t in sizes}
    assert [limit("max_params", text) for text in ("300k", "3e5", "0.3M", "300000")] == [3e5] * 4
    assert [limit("max_latency", text) for text in ("50ms", "0.05 s", 0.05)] == pytest.approx([0.05] * 3)
    assert limit("max_step_time", "2min") == 120


NO_SIZES = ("", "MB", "5 M", "-5MB", "0", "5000000", "0MB", "0.5B", "9" * 400 + "GB", "5,0MB", "5MB5", "٥MB")
NO_NUMBERS = (0.0, -1.0, float("nan"), float("inf"))
NO_TIMES = ("50", "0ms", "-5ms", "1h", "ms", "nan s", *NO_NUMBERS)
REFUSED: dict[str, tuple[Any, ...]] = {
    "max_bytes": NO_SIZES,
    "max_params": ("300MB", "0", "-3", "1e999"),
    "max_step_time": NO_TIMES,
    "max_latency": NO_TIMES,
    "margin": (*NO_NUMBERS, 100.0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_limits_are_refused_by_option_in_one_line(name) -> None:
    for value in REFUSED[name]:
        with pytest.raises(UserError) as raised:
            limit(name, value)
        assert (raised.value.field, "\n" in str(raised.value)) == (f"--{name.replace('_', '-')}", False)


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 0.01), (-0.005, 0.004), (0.004, 0.03)])
def test_needed_n_is_that_of_statsmodels(mean, spread) -> None:
    values = mean + spread * np.array([-1.0, 0.0, 1.0])  # standard deviation: the spread
    n = needed_pairs(values, 0.01, ALPHA / 3)
    power = TTestPower()
    effect = (mean + 0.01) / spread
    reached = [power.power(effect, nobs=k, alpha=ALPHA / 3, alternative="larger") for k in (n - 1, n)]
    assert reached[0] < 0.8 <= reached[1]


@pytest.mark.parametrize("values", [[-0.011, -0.012, -0.010], [0.0, 0.0], [0.0], [-1.0, 0.9799]])
def test_no_n_shows_what_is_not_so_or_takes_more_than_1000(values) -> None:
    assert needed_pairs(values, 0.01, ALPHA) is None
