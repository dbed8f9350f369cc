"""Each measure on planted records, beside values worked out by hand or by another way of computing them."""

import math
from typing import Any

import numpy as np
import planted
import pytest

from experiments.hypotheses.measures import Evidence
from experiments.hypotheses.registry import find, load_registry
from experiments.scripts.concentration import gini, normalized_entropy
from peft_vit.core.config import ExperimentConfig
from peft_vit.core.records import AdapterRemoval, ImportanceEntry, RankEntry, RunRecord
from peft_vit.lab.analysis.convergence import late_loss_deviation, roughness
from peft_vit.lab.analysis.findings import Finding

pytestmark = pytest.mark.part("analyzer")

EXPERIMENTS = planted.experiments()
ADALORA = EXPERIMENTS["adalora_proportional_magnitude"]
SITES = planted.sites()


def findings_of(records: list[RunRecord]) -> tuple[Finding, ...]:
    return find([Evidence(planted.study_of(records))], load_registry(), "planted", several=False)


def found(records: list[RunRecord], sentence: str) -> list[Finding]:
    return [finding for finding in findings_of(records) if finding.sentence.id == sentence]


def values(finding: Finding) -> tuple[float, ...]:
    return tuple(finding.by_seed.values())


def only(records: list[RunRecord], sentence: str) -> Finding:
    (finding,) = found(records, sentence)
    return finding


def run(experiment: ExperimentConfig, seed: int = 0, accuracy: float = 0.8, **changes: Any) -> RunRecord:
    return planted.record(experiment, seed, accuracy, changes=changes)


def ranks(**by_matrix: int) -> list[RankEntry]:
    return [RankEntry(step=0, budget=None, ranks={site.name: by_matrix[site.matrix] for site in SITES})]


def scores(values: dict[str, float]) -> list[ImportanceEntry]:
    return [ImportanceEntry(step=1, scores=dict.fromkeys(values, 1.0)), ImportanceEntry(step=2, scores=values)]


def qa(name: str, **changes: Any) -> dict[str, Any]:
    section = {
        "quantization_bits": 4,
        "quantization_type": "nf4",
        "quantization_schedule": "constant",
        "gradient_scaling_factor": 1.0,
        "use_group_quantization": True,
        "rank": 8,
    }
    return {"name": name, "method": "qa_lora", "qa_lora": {**section, **changes}}


# --- scores, ranks, harm ----------------------------------------------------------------------------------------------


def test_attention_over_mlp() -> None:
    finding = only([run(ADALORA, seed) for seed in range(6)], "attention-over-mlp")
    assert values(finding) == pytest.approx([2.0] * 6), "planted: four times as high at the last decision"
    assert (finding.verdict, finding.sentence.unit) == ("supported", "log2 ratio")


def test_ranks_by_chance_are_described_and_say_nothing_of_scores() -> None:
    adalora = ADALORA.adalora.model_copy(update={"importance_metric": "random"})
    by_chance = ADALORA.model_copy(update={"name": "by_chance", "adalora": adalora})
    experiments = (ADALORA, by_chance, EXPERIMENTS["lora_r4"])
    records = [run(experiment, seed) for experiment in experiments for seed in range(2)]
    subjects: dict[str, set[str]] = {}
    for finding in findings_of(records):
        if finding.by_seed:
            subjects.setdefault(finding.sentence.id, set()).add(finding.subject.partition(" against ")[0])
    for name in ("attention-over-mlp", "query-most-rank", "query-more-than-mean", "seeds-agree"):
        assert subjects[name] == {ADALORA.name}
    for name in ("spread-gini", "spread-entropy"):
        assert subjects[name] == {ADALORA.name, "by_chance"}
    assert subjects["above-majority"] == {ADALORA.name, "by_chance", "lora_r4"}


def test_query_lead() -> None:
    planted_ranks = ranks(query=5, key=3, value=2, out=2, fc1=1, fc2=1)
    records = [run(ADALORA, seed, rank_history=planted_ranks) for seed in range(2)]
    assert values(only(records, "query-most-rank")) == (2.0, 2.0)
    assert values(only(records, "query-more-than-mean")) == pytest.approx((5 - 9 / 5,) * 2)
    fewer = [run(ADALORA, seed, rank_history=ranks(query=3, key=4, value=2, out=0, fc1=0, fc2=0)) for seed in range(8)]
    assert only(fewer, "query-most-rank").verdict == "refuted"
    assert only(fewer, "query-more-than-mean").verdict == "supported"


def noisy_ranks(rng: np.random.Generator, **by_matrix: float) -> list[RankEntry]:
    return ranks(**{matrix: round(1000 * (mean + rng.normal())) for matrix, mean in by_matrix.items()})


def test_the_most_of_all_types_is_not_judged_by_each_seeds_luckiest_type() -> None:
    rng = np.random.default_rng(0)
    equal = dict.fromkeys(("query", "key", "value", "out", "fc1", "fc2"), 10.0)
    for lead, wanted in ((0.0, "not decided"), (0.5, "not decided"), (5.0, "supported"), (-5.0, "refuted")):
        by_matrix = {**equal, "query": 10 + lead}
        records = [run(ADALORA, seed, rank_history=noisy_ranks(rng, **by_matrix)) for seed in range(10)]
        finding = only(records, "query-most-rank")
        assert finding.verdict == wanted, "half a deviation ahead, another type is above query in most seeds by chance"
        assert "against" in finding.note


def test_one_type_that_gets_more_than_query_refutes_it_whatever_the_others_do() -> None:
    planted_ranks = ranks(query=4, key=5, value=0, out=0, fc1=0, fc2=0)
    few, many = ([run(ADALORA, seed, rank_history=planted_ranks) for seed in range(n)] for n in (7, 8))
    finding = only(many, "query-most-rank")
    assert (finding.verdict, values(finding)) == ("refuted", (-1.0,) * 8)
    assert finding.adjusted_p == pytest.approx(5 * 2 / 2**8), "any of five rivals would have refuted it"
    assert finding.note == "estimate and interval against key, the most of fc1, fc2, key, out, value"
    assert only(few, "query-most-rank").outcome == "not decidable with n = 7, needs at least 8"


def test_spread_of_ranks() -> None:
    by_matrix = {"query": 5, "key": 3, "value": 2, "out": 2, "fc1": 1, "fc2": 0}
    records = [run(ADALORA, rank_history=ranks(**by_matrix))]
    amounts = np.repeat(list(by_matrix.values()), planted.BLOCKS)
    for name, measure in (("spread-gini", gini), ("spread-entropy", normalized_entropy)):
        finding = only(records, name)
        assert (values(finding), finding.verdict) == ((measure(amounts),), "not decided")


def test_strategies_are_paired_where_nothing_else_differs() -> None:
    section = {"total_rank_budget": 288, "importance_metric": "magnitude", "update_frequency": 6}
    names = ("top_k_12", "proportional_12", "threshold_12", "top_k_18")
    made = planted.experiments_of(
        *(
            {
                "name": name,
                "method": "adalora",
                "adalora": {**section, "warmup_steps": int(name[-2:]), "allocation_strategy": name[:-3]},
            }
            for name in names
        )
    )
    even, uneven = dict.fromkeys(planted.MATRICES, 2), {**dict.fromkeys(planted.MATRICES, 0), "query": 12}
    history = {name: ranks(**(uneven if "top_k" in name else even)) for name in names}
    records = [run(made[name], rank_history=history[name]) for name in names]
    top_k = only(records, "top-k-concentrates")
    assert top_k.subject == "top_k_12 against proportional_12", "top_k_18 has no partner with as many steps"
    assert values(top_k) == pytest.approx((5 / 6,)), "one matrix of six has everything"
    assert values(only(records, "threshold-concentrates")) == (0.0,)


def test_agreement_of_seeds_over_disjoint_pairs() -> None:
    names = [site.name for site in SITES[:5]]
    orders = [(1, 2, 3, 4, 5), (2, 1, 3, 4, 5), (5, 4, 3, 2, 1), (5, 4, 3, 1, 2), (1, 2, 3, 4, 5)]
    records = [
        run(ADALORA, seed, importance_history=scores(dict(zip(names, o, strict=True)))) for seed, o in enumerate(orders)
    ]
    finding = only(records, "seeds-agree")
    assert list(finding.by_seed) == ["0-1", "2-3"]
    assert values(finding) == pytest.approx((1 - 6 * 2 / (5 * 24),) * 2), "1 - 6 sum d^2 / (n (n^2 - 1))"
    assert finding.note == "seed 4 has no partner"


def test_seeds_on_other_images_are_no_pair_and_two_sites_no_order() -> None:
    history = scores({site.name: float(place) for place, site in enumerate(SITES)})
    records = [run(ADALORA, seed, importance_history=history) for seed in range(4)]
    other = records[3].provenance.model_copy(update={"split_sha256": "f" * 64})
    finding = only([*records[:3], records[3].model_copy(update={"provenance": other})], "seeds-agree")
    assert (list(finding.by_seed), finding.note) == (["0-1"], "1 pair(s) refused: other weights, images or splits")
    drawn = [
        planted.asking(record, data=own)
        for record in (*records[:3], records[3].model_copy(update={"provenance": other}))
        for own in [record.spec.data.model_copy(update={"train_subset": "per_seed"})]
    ]
    finding = only(drawn, "seeds-agree")
    assert (list(finding.by_seed), finding.note) == (["0-1", "2-3"], "each seed draws its own images")
    two = scores({site.name: float(place) for place, site in enumerate(SITES[:2])})
    assert only([run(ADALORA, seed, importance_history=two) for seed in range(2)], "seeds-agree").verdict == "no data"


def removal(rises: dict[str, float], mlp_accuracy: float = 0.75) -> AdapterRemoval:
    return AdapterRemoval(
        images=100,
        loss=0.5,
        accuracy=0.80,
        site_loss_rise=rises,
        group_loss_rise={"mlp": 0.1, "all": 0.3},
        group_accuracy={"mlp": mlp_accuracy, "all": 0.5},
    )


def test_importance_against_harm() -> None:
    names = [site.name for site in SITES]
    rising = {name: float(place) for place, name in enumerate(names)}
    partly = dict(list(rising.items())[::2])  # a site without rank can't be left out
    history = scores({name: value**2 for name, value in rising.items()})
    records = [run(ADALORA, seed, importance_history=history, removal=removal(partly)) for seed in range(6)]
    assert only(records, "importance-predicts-harm").verdict == "supported"
    falling = {name: -value for name, value in partly.items()}
    records = [run(ADALORA, seed, importance_history=history, removal=removal(falling)) for seed in range(6)]
    finding = only(records, "importance-predicts-harm")
    assert values(finding) == pytest.approx([-1.0] * 6)
    assert finding.verdict == "refuted"


def test_cost_of_removing_the_mlp() -> None:
    records = [run(EXPERIMENTS["lora_r8"], seed, removal=removal({}, 0.75 - 0.01 * seed)) for seed in range(6)]
    finding = only(records, "removing-mlp-costs")
    assert values(finding) == pytest.approx([0.05 + 0.01 * seed for seed in range(6)])
    assert finding.verdict == "supported"
    cheap = [run(EXPERIMENTS["lora_r8"], seed, removal=removal({}, 0.799 - 0.001 * seed)) for seed in range(6)]
    assert only(cheap, "removing-mlp-costs").verdict == "refuted", "0.1 to 0.6 points are less than one"


def test_seeds_without_the_measurement_are_named_and_where_all_lack_it_how_to_get_it() -> None:
    lacking = run(EXPERIMENTS["lora_r8"], 1)
    finding = only([lacking], "removing-mlp-costs")
    assert finding.verdict == "no data"
    assert finding.outcome == "no record has removal: set measures.removal_images in the configuration and run again"
    some = only([run(EXPERIMENTS["lora_r8"], 0, removal=removal({})), lacking], "removing-mlp-costs")
    assert some.note == "seeds left out, whose records lack removal: 1"


def test_scores_that_are_no_numbers_are_left_out() -> None:
    broken = scores({site.name: math.nan for site in SITES})
    finding = only([run(ADALORA, 0), run(ADALORA, 1, importance_history=broken)], "attention-over-mlp")
    assert list(finding.by_seed) == [0]
    assert "left out" in finding.note


# --- accuracy ---------------------------------------------------------------------------------------------------------


def test_bits_against_their_float_twin() -> None:
    nf4, int8, lora = (
        EXPERIMENTS[name] for name in ("qa_lora_4bit_nf4_constant", "qa_lora_8bit_int8_linear", "lora_r8")
    )
    lost = [9, 8, 10, 9, 9, 9]  # of 600 images: 1.5 points
    records = [run(lora, seed, 480 / 600) for seed in range(6)]
    records += [run(nf4, seed, (480 - images) / 600) for seed, images in enumerate(lost)]
    records += [run(int8, seed, (480 + (-1) ** seed) / 600) for seed in range(6)]
    four, eight = only(records, "four-bits-lose-one-to-two"), only(records, "eight-bits-lose-nothing")
    assert values(four) == pytest.approx([-images / 600 for images in lost])
    assert four.interval.estimate == pytest.approx(-0.015)
    assert (four.verdict, eight.verdict) == ("supported", "supported")
    fewer = {finding.subject: finding.verdict for finding in found(records, "fewer-bits-more-accurate")}
    assert fewer == {f"{nf4.name} against lora_r8": "not decided", f"{int8.name} against lora_r8": "not decided"}
    assert "needs at least 7" in found(records, "fewer-bits-more-accurate")[0].outcome


def test_scaled_gradients_are_named_beside_what_bits_cost() -> None:
    made = planted.experiments_of(qa("plain"), qa("scaled", gradient_scaling_factor=2.0))
    records = [run(experiment) for experiment in (EXPERIMENTS["lora_r8"], *made.values())]
    notes = {finding.subject: finding.note for finding in found(records, "four-bits-lose-one-to-two")}
    assert "scales its adapters' gradients" in notes["scaled against lora_r8"]
    assert "scales" not in notes["plain against lora_r8"]


def test_settings_of_quantization_are_paired_with_what_differs_in_them_alone() -> None:
    made = planted.experiments_of(
        qa("base"),
        qa("one_scale", use_group_quantization=False),
        qa("scaled", gradient_scaling_factor=2.0),
        qa("adaptive", gradient_scaling="adaptive"),
        qa("linear", quantization_schedule="linear"),
        qa("warm", quantization_schedule="linear", quantization_warmup_steps=16),
        qa("both", gradient_scaling_factor=2.0, use_group_quantization=False),
    )
    accuracy = {name: (480 + place) / 600 for place, name in enumerate(made)}
    records = [run(one, 0, accuracy[name]) for name, one in made.items()]

    def pairs(sentence: str) -> dict[str, float]:
        return {f.subject: round(600 * f.interval.estimate, 9) for f in found(records, sentence)}

    assert pairs("groups-help") == {"base against one_scale": -1, "scaled against both": -4}
    assert pairs("gradient-scaling-helps") == {
        "scaled against base": 2,
        "adaptive against base": 3,
        "both against one_scale": 5,
    }
    assert pairs("warm-up-helps") == {"warm against linear": 1}
    assert set(pairs("schedule-steadies")) == {"linear against base", "warm against base"}


def test_courses_of_the_loss() -> None:
    made = planted.experiments_of(
        qa("base"), qa("linear", quantization_schedule="linear"), qa("cosine", quantization_schedule="cosine")
    )
    rng = np.random.default_rng(0)
    noise = {"base": 0.1, "linear": 0.05, "cosine": 0.01}
    records = [
        run(made[name], 0, steps=planted.steps(1 - 0.01 * np.arange(48) + size * rng.normal(size=48)))
        for name, size in noise.items()
    ]
    runs = {run_.experiment.name: run_ for run_ in planted.study_of(records).runs}
    late, rough = ({name: of(run_) for name, run_ in runs.items()} for of in (late_loss_deviation, roughness))
    steadier = {f.subject: values(f) for f in found(records, "schedule-steadies")}
    assert steadier["linear against base"] == pytest.approx((late["base"] - late["linear"],))
    assert steadier["cosine against base"] == pytest.approx((late["base"] - late["cosine"],))
    assert values(only(records, "cosine-is-smoother")) == pytest.approx((rough["linear"] - rough["cosine"],))


def line_and_adaptive(accuracy: float, parameters: int, seed: int = 0) -> list[RunRecord]:
    """Return LoRA of ranks 1, 2, 4, 8 with 1,000 parameters a rank, 450 to 480 images right, and an adaptive run."""
    line = {1: 450, 2: 460, 4: 470, 8: 480}
    fixed = [run(EXPERIMENTS[f"lora_r{r}"], seed, n / 600, **planted.counts(1000 * r)) for r, n in line.items()]
    return [*fixed, run(ADALORA, seed, accuracy / 600, **planted.counts(parameters))]


BETWEEN = round(2000 * math.sqrt(2))


def test_adaptive_against_fixed_at_equal_parameters_and_at_equal_accuracy() -> None:
    records = line_and_adaptive(468, BETWEEN)
    gain = only(records, "adaptive-beats-fixed")
    assert values(gain) == pytest.approx((3 / 600,), abs=1e-5), "half way between 2 and 4, the line is at 465"
    assert values(only(records, "adaptive-at-least-fixed")) == values(gain)
    needed = only(records, "fixed-needs-fewer")  # 468 lies 0.8 of the way from 2000 to 4000, in logarithms
    assert values(needed) == pytest.approx((0.5 - 0.8,), abs=1e-3)
    assert (needed.note, needed.test) == ("", "none")
    assert only(records[-2:], "fixed-needs-fewer").verdict == "no data", "one fixed rank is no line"
    other = records[-1].provenance.model_copy(update={"data_sha256": "f" * 64})
    moved = [*records[:-1], records[-1].model_copy(update={"provenance": other})]
    assert only(moved, "adaptive-beats-fixed").verdict == "no data", "nor is one on other images"


@pytest.mark.parametrize(("accuracy", "expected"), [(440, 1.5), (490, 1.5 - 3)])
def test_an_accuracy_outside_of_the_line_gives_a_bound(accuracy, expected) -> None:
    finding = only(line_and_adaptive(accuracy, BETWEEN), "fixed-needs-fewer")
    assert values(finding) == pytest.approx((expected,), abs=1e-3)
    assert finding.note == "bounds only, the accuracy lies outside of fixed LoRA's: seeds 0"


@pytest.mark.parametrize(("accuracy", "parameters"), [(440, 500), (490, 16000)])
def test_a_bound_that_leaves_open_who_needs_fewer_speaks_for_neither(accuracy, parameters) -> None:
    records = [record for seed in range(6) for record in line_and_adaptive(accuracy, parameters, seed)]
    finding = only(records, "fixed-needs-fewer")
    assert (values(finding), finding.verdict) == ((0.0,) * 6, "not decided")
    assert finding.note.endswith("set to 0, which of both needs fewer is open: seeds 0, 1, 2, 3, 4, 5")


def test_lora_against_linear_and_full_with_failed_and_missing_runs() -> None:
    lora, linear, full = (EXPERIMENTS[name] for name in ("lora_r8", "linear_probe", "full_finetuning"))
    records = [run(lora, seed, (480 + seed) / 600) for seed in range(8)]
    records += [run(linear, seed, 450 / 600) for seed in range(7)]
    records += [run(full, seed, 500 / 600) for seed in range(1, 8)] + [planted.failed(full, 0, "out of memory")]
    linear_finding, full_finding = only(records, "lora-beats-linear"), only(records, "lora-beats-full")
    assert values(linear_finding) == pytest.approx([(30 + seed) / 600 for seed in range(7)])
    assert (linear_finding.verdict, full_finding.verdict) == ("supported", "refuted")
    assert linear_finding.note == full_finding.note.replace(": 0", ": 7") == "seeds without a pair: 7"


def test_above_majority() -> None:
    linear = EXPERIMENTS["linear_probe"]
    records = [run(linear, 0, 420 / 600), planted.failed(linear, 1, "out of memory"), run(ADALORA, 0, 360 / 600)]
    findings = {f.subject: f for f in found(records, "above-majority")}
    verdicts = {subject: (round(f.interval.estimate, 9), f.verdict) for subject, f in findings.items()}
    assert verdicts == {"linear_probe": (0.025, "supported"), ADALORA.name: (-0.075, "refuted")}
    assert findings["linear_probe"].note == "failed: seed 1"


# --- costs ------------------------------------------------------------------------------------------------------------


def test_overhead() -> None:
    # 48 steps of half a second: 24 s, of which 1.8 s are no plain training
    split = [
        run(ADALORA, seed, overhead_s={"scoring": 1.2, "reallocation": 0.6, "evaluation": 99}) for seed in range(9)
    ]
    assert values(only(split, "scoring-under-10-percent")) == pytest.approx([0.1 - 1.2 / 22.2] * 9)
    assert values(only(split, "reallocation-under-10-percent")) == pytest.approx([0.1 - 0.6 / 22.2] * 9)
    assert values(only(split, "overhead-under-10-percent")) == pytest.approx([0.1 - 1.8 / 22.2] * 9)
    assert only(split, "overhead-under-10-percent").verdict == "supported"
    older = [run(ADALORA, seed, overhead_s={"allocation": 4.8}) for seed in range(6)]
    assert values(only(older, "overhead-under-10-percent")) == pytest.approx([0.1 - 4.8 / 19.2] * 6)
    assert only(older, "overhead-under-10-percent").verdict == "refuted"
    assert only(older, "scoring-under-10-percent").verdict == "no data"


def test_memory_factors() -> None:
    nf4 = EXPERIMENTS["qa_lora_4bit_nf4_constant"]  # a bit a weight for scales and offsets
    records = [run(nf4), run(EXPERIMENTS["qa_lora_8bit_int8_linear"])]
    layers = only(records, "four-bits-layers-eighth")
    assert values(layers) == pytest.approx((32 / 5,))
    assert layers.verdict == "refuted"
    assert values(only(records, "eight-bits-layers-quarter")) == pytest.approx((32 / 9,))
    quantized = 12 * sum(planted.LAYERS.values())
    whole = 4 * (planted.BACKBONE_PARAMETERS + 770) / (quantized * 5 / 8 + planted.LEFT_IN_FLOAT + 3080)
    assert values(only(records, "four-bits-model-eighth")) == pytest.approx((whole,), rel=1e-6)
    assert whole < 32 / 5
