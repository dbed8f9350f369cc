"""The documents' tables of quantization: verdicts on planted runs are right, and the ablation is the one announced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import planted
import pytest
from scipy import stats

from experiments.bits.scripts import quantization_evidence as evidence
from experiments.scripts.evidence import filled
from peft_vit.core.config import load_study

CONFIGS = Path(__file__).parents[1] / "configs"

STUDY = load_study(CONFIGS / "quantization_ablation.yaml")
SEEDS = 10
FACTORS = (
    {"quantization_bits", "quantization_type"},
    {"group_size"},
    {"use_group_quantization"},
    {"quantization_schedule", "quantization_end_step"},
    {"quantization_warmup_steps"},
    {"gradient_scaling_factor"},
    {"gradient_scaling"},
    {"balance_target", "balance_by"},
)


def runs(effects: dict[str, float], noise: float = 0.2, seeds: int = SEEDS) -> pd.DataFrame:
    """Return the ablation's runs, each its effect above 82 %, with `noise` of its own, both in points."""
    rng = np.random.default_rng(3)
    common = 82 + 1.5 * rng.standard_normal(seeds)
    rows = []
    for experiment in STUDY.experiments:
        values = common + effects.get(experiment.name, 0.0) + noise * rng.standard_normal(seeds)
        bits = None if experiment.qa_lora is None else experiment.qa_lora.quantization_bits + 1.0
        rows += [
            {
                "study": STUDY.name,
                "experiment": experiment.name,
                "method": experiment.method,
                "seed": seed,
                "status": "done",
                "learning_rate": experiment.training.learning_rate,
                "test_accuracy": value / 100,
                "validation_accuracy": value / 100,
                "majority_accuracy": 0.687,
                "seconds": 30.0,
                "commit": "abc",
                "layers_bits": bits,
                "model_bits": None if bits is None else bits + 0.5,
                "model_bytes": 15_000_000,
                "file_bytes": 15_010_000,
                "peak_memory_bytes": 900_000_000,
                "relative_error": 0.09,
                "adapter_to_error_ratio": 0.4,
                "layers_bytes": 13_000_000,
                "adapter_parameters": 342_144,
            }
            for seed, value in enumerate(values)
        ]
    return pd.DataFrame(rows)


def row(table: str, candidate: str, reference: str) -> list[str]:
    line = next(line for line in table.splitlines() if f"| `{candidate}` − `{reference}` |" in line)
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(
    ("effects", "candidate", "reference", "verdict"),
    [
        ({"int8": -0.2}, "int8", "lora_r8", "supported"),
        ({"int8": -2.0}, "int8", "lora_r8", "refuted"),
        ({"int8": -1.0}, "int8", "lora_r8", "not decided"),
        ({"nf4": -1.5}, "nf4", "lora_r8", "supported"),
        ({"nf4": -0.1}, "nf4", "lora_r8", "refuted"),
        ({"nf4": -3.5}, "nf4", "lora_r8", "refuted"),
        ({"nf4": -1.0}, "nf4", "lora_r8", "not decided"),
        ({"nf4_no_groups": -1.5}, "nf4", "nf4_no_groups", "supported"),
        ({"nf4_no_groups": -0.5}, "nf4", "nf4_no_groups", "supported"),  # less than a point, but shown
        ({"nf4_no_groups": 0.5}, "nf4", "nf4_no_groups", "refuted"),
        ({"nf4_scaling_2": 0.05}, "nf4_scaling_2", "nf4", "refuted"),
        ({"nf4_linear_warmup": 2.0}, "nf4_linear_warmup", "nf4_linear", "supported"),
        ({"nf4_cosine": -2.0}, "nf4_cosine", "nf4_linear", "refuted"),
        ({"nf4_sgd_balance": 3.0}, "nf4_sgd_balance", "nf4_sgd", "supported"),
    ],
)
def test_a_planted_effect_gets_the_verdict_that_the_header_announced(effects, candidate, reference, verdict) -> None:
    data = runs(effects)
    cells = row(evidence.sentences(data), candidate, reference)
    assert cells[-1] == verdict
    by_seed = data.pivot(index="seed", columns="experiment", values="test_accuracy") * 100
    differences = by_seed[candidate] - by_seed[reference]
    low, high = stats.t.interval(0.95, SEEDS - 1, differences.mean(), stats.sem(differences))
    assert cells[2:4] == [f"{differences.mean():+.2f} [{low:+.2f}, {high:+.2f}] points", str(SEEDS)]


def test_noise_decides_nothing() -> None:
    data = runs({}, noise=6.0)
    lines = evidence.sentences(data).splitlines()[2:]
    assert {line.rsplit("|", 2)[1].strip() for line in lines if "against fp32" not in line} == {"not decided"}


def test_p_values_are_those_of_scipy_and_corrected_over_all() -> None:
    differences = np.array([0.3, -0.2, 0.9, 0.4, 0.1])
    greater = {b: stats.ttest_1samp(differences, b, alternative="greater").pvalue for b in (-2, -1, 0)}
    less = {b: stats.ttest_1samp(differences, b, alternative="less").pvalue for b in (-2, -1, 1)}
    assert evidence.weighed("loses nothing", differences) == pytest.approx((greater[-1], less[-1]))
    assert evidence.weighed("helps", differences) == pytest.approx((greater[0], less[1]))
    between = (max(greater[-2], less[-1]), 2 * min(greater[-1], less[-2]))
    assert evidence.weighed("loses one to two", differences) == pytest.approx(between)
    first, second = evidence.Evidence(0.01, 0.9), evidence.Evidence(0.9, 0.02)
    assert evidence.verdicts([first]) == [("supported", pytest.approx(0.02))]
    assert evidence.verdicts([first, second]) == [
        ("supported", pytest.approx(0.04)),
        ("not decided", pytest.approx(0.06)),
    ]


def test_claimed_sizes_are_refuted_by_what_was_counted() -> None:
    lines = [line for line in evidence.sentences(runs({})).splitlines() if "against fp32" in line]
    assert [line.rsplit("|", 2)[1].strip() for line in lines] == ["refuted"] * 4
    assert "6.40x: 5.00 bits a weight" in lines[0]  # the layers
    assert f"{32 / 5.5:.2f}x: 5.50 bits a weight" in lines[1]  # the whole model
    assert "3.56x: 9.00 bits a weight" in lines[2]
    data = runs({})
    data.loc[data.experiment == "nf4", "layers_bits"] = 4.05  # one float16 scale for 320 weights
    met = next(line for line in evidence.sentences(data).splitlines() if "`nf4`, quantized layers" in line)
    assert met.endswith("| supported |")
    unknown = evidence.sentences(runs({}).drop(columns=["model_bits"]))
    assert unknown.count("| – | 0 | counted | not decided |") == 2


def test_settings_are_compared_with_float_lora_of_their_optimizer_and_corrected_over_all_18() -> None:
    data = runs({"lora_r8_sgd": -4.0, "nf4_sgd": -4.0, "int2": -9.0})
    data.loc[(data.experiment == "int2") & (data.seed == 9), ["status", "test_accuracy"]] = ["failed", np.nan]
    lines = {line.split("|")[1].strip(" `"): line for line in evidence.ablation(data).splitlines() if "|" in line}
    cells = {name: [cell.strip() for cell in line.strip("|").split("|")] for name, line in lines.items()}
    assert cells["lora_r8_sgd"][3:6] == ["–", "–", "–"]
    assert abs(float(cells["nf4_sgd"][3].split()[0])) < 0.3  # against float SGD, not against AdamW
    by_seed = data.pivot(index="seed", columns="experiment", values="test_accuracy").fillna(0.687) * 100
    differences = by_seed.int2 - by_seed.lora_r8
    assert cells["int2"][1:4] == [
        "10 (1)",
        f"{by_seed.int2.mean():.1f} ({by_seed.int2.std():.1f})",
        "{:+.2f} [{:+.2f}, {:+.2f}]".format(
            differences.mean(), *stats.t.interval(0.95, 9, differences.mean(), stats.sem(differences))
        ),
    ]
    assert len(cells) - 2 - 2 == 18  # without head, rule and the two float ones
    assert cells["int2"][4] == f"{18 * stats.wilcoxon(differences).pvalue:.3f}"


def test_a_study_of_a_few_seeds_makes_tables_that_decide_nothing_they_cannot() -> None:
    data = runs({}, seeds=1)
    data = data[data.experiment.isin(["nf4", "lora_r8"])]
    assert row(evidence.sentences(data), "int8", "lora_r8")[2:] == ["–", "0", "–", "not decided"]
    assert row(evidence.sentences(data), "nf4", "lora_r8")[3:] == ["1", "–", "not decided"]
    assert "seeds 0; " in evidence.ablation(data)


def test_adaptive_bits_are_set_against_uniform_ones_at_their_bytes() -> None:
    level = {
        "uniform_int2": 70.0,
        "uniform_int4": 80.0,
        "fisher_int4_bytes": 82.0,
        "joint_int4_bytes": 80.0,
        "fisher_3_5_bits": 74.0,
    }
    rng = np.random.default_rng(8)
    one = runs({}).head(1).drop(columns=["experiment", "seed", "test_accuracy"])
    data = pd.concat(
        one.assign(experiment=name, seed=seed, test_accuracy=(mean + 0.3 * rng.standard_normal()) / 100)
        for name, mean in level.items()
        for seed in range(SEEDS)
    ).reset_index(drop=True)
    names = {experiment.name for experiment in load_study(CONFIGS / "adaptive_bits.yaml").experiments}
    assert set(level) <= names
    lines = {
        line.split("|")[1].strip(" `"): line.split("|")
        for line in evidence.adaptive_bits(data).splitlines()
        if "|" in line
    }
    by_seed = data.pivot(index="seed", columns="experiment", values="test_accuracy") * 100
    line = 0.75 * by_seed.uniform_int2 + 0.25 * by_seed.uniform_int4
    for name, reference in (("fisher_int4_bytes", by_seed.uniform_int4), ("fisher_3_5_bits", line)):
        assert lines[name][4].split()[0] == f"{(by_seed[name] - reference).mean():+.2f}"
        assert (
            lines[name][5].strip() == f"{3 * stats.wilcoxon(by_seed[name] - reference).pvalue:.3f}"
        )  # the smallest two
    assert lines["uniform_int2"][4].strip() == "–"


def test_few_bits_are_tested_one_sided_and_exactly_as_their_header_says() -> None:
    level = {
        "int4": 82.0,
        "nf4": 82.0,
        "int2": 79.0,
        "int3_gptq": 81.7,  # loses less than a point
        "adalora_nf4": 81.0,  # loses a point
        "joint": 79.0,
        "int2_gptq": 80.5,  # better
        "int2_gptq_r12": 78.0,  # worse
    }
    rng = np.random.default_rng(8)
    one = (
        runs({})
        .head(1)
        .drop(columns=["experiment", "seed", "test_accuracy"])
        .assign(adapter_parameters=1000, adapter_to_error_ratio=0.1)
    )
    data = pd.concat(
        one.assign(experiment=name, seed=seed, test_accuracy=(mean + 0.3 * rng.standard_normal()) / 100)
        for name, mean in level.items()
        for seed in range(230, 230 + SEEDS)
    ).reset_index(drop=True)
    data.loc[(data.experiment == "joint") & (data.seed == 230), ["status", "test_accuracy"]] = ["failed", np.nan]
    by_seed = data.pivot(index="seed", columns="experiment", values="test_accuracy").fillna(0.687) * 100
    expected = {}
    for candidate, reference, margin in (
        ("int3_gptq", "int4", 1.0),
        ("adalora_nf4", "nf4", 1.0),
        ("joint", "int4", 1.0),
        ("int2_gptq", "int2", 0.0),
        ("int2_gptq_r12", "int2", 0.0),
    ):
        differences = by_seed[candidate] - by_seed[reference]
        p_value = stats.wilcoxon(differences + margin, alternative="greater", method="exact").pvalue
        expected[candidate] = differences.mean(), p_value
    lines = {
        line.split("`")[1]: line.split("|") for line in evidence.few_bits(data).splitlines() if ", against `" in line
    }
    assert list(lines) == list(expected)
    order = sorted(expected, key=lambda name: expected[name][1])
    assert order[0] in ("int3_gptq", "int2_gptq")
    for name, (difference, p_value) in expected.items():
        _, _, points, p, corrected, verdict, _ = (cell.strip() for cell in lines[name])
        assert points.split()[0] == f"{difference:+.2f}"
        if p_value < 0.5:
            assert p == evidence.p(p_value)
        if name == order[0]:
            assert corrected == evidence.p(5 * p_value)
        assert verdict == ("supported" if name in ("int3_gptq", "int2_gptq") else "not shown")
    assert "failed, counted as the majority class" in evidence.few_bits(data)
    only = evidence.few_bits(data, (evidence.Few("int3_gptq", "int4", "loses less than a point"),), 0.0005)
    assert only.splitlines()[2].split("|")[3].strip() == only.splitlines()[2].split("|")[4].strip()  # one test
    assert "not shown" in only  # at another level


@pytest.mark.parametrize(
    ("study", "claims", "left_out"),
    [("low_bits", evidence.FEW_BITS, "joint"), ("low_bits_again", evidence.FEW_BITS_AGAIN, "nf3_48_gptq")],
)
def test_the_registered_comparisons_are_those_of_the_configurations(study, claims, left_out) -> None:
    file = CONFIGS / f"{study}.yaml"
    assert f"# Left out: {left_out}, " in file.read_text()
    names = {one.name for one in load_study(file).experiments} | {left_out}
    assert {name for one in claims for name in (one.candidate, one.reference)} == names


def pilot_runs(level: dict[float, float], ratio: float = 0.26) -> pd.DataFrame:
    data = runs({}).head(1).drop(columns=["experiment", "seed"])
    names = {f"nf4_sgd_lr_{rate:g}": rate for rate in level} | {"nf4_linear": 1e-3}
    return pd.concat(
        data.assign(
            experiment=name,
            seed=seed,
            learning_rate=rate,
            adapter_to_error_ratio=ratio * (1 + rate),
            validation_accuracy=level.get(rate, 0.8) + 0.01 * (seed - 101),
        )
        for name, rate in names.items()
        for seed in (100, 101, 102)
    ).reset_index(drop=True)


def test_the_pilots_rules() -> None:
    choice = evidence.chosen(pilot_runs({0.01: 0.7, 0.1: 0.81, 0.3: 0.81, 1.0: 0.6}))
    assert choice == (0.1, 0.6, 0.5, False)  # of equal rates the lower; 2 * 0.286 and 2 * 0.26 to one digit
    assert evidence.chosen(pilot_runs({0.01: 0.82, 0.1: 0.81, 0.3: 0.8})).at_the_edge
    table = evidence.pilot(pilot_runs({0.01: 0.7, 0.1: 0.81, 0.3: 0.78}))
    assert "Chosen: SGD's learning rate 0.1, `balance_target` 0.6 by gradient scale and 0.5 by pace." in table
    failed = pilot_runs({0.01: 0.7, 0.1: 0.81, 0.3: 0.78})
    failed.loc[(failed.learning_rate == 0.1) & (failed.seed == 100), ["status", "validation_accuracy"]] = [
        "failed",
        np.nan,
    ]
    assert evidence.chosen(failed).learning_rate == 0.3


def test_the_ablation_is_one_factor_at_a_time_and_holds_what_the_pilot_chose() -> None:
    by_name = {experiment.name: experiment for experiment in STUDY.experiments}
    assert {name for s in evidence.SENTENCES for name in (s.candidate, s.reference)} <= set(by_name)
    assert STUDY.seeds == tuple(range(10))
    for name, experiment in by_name.items():
        sgd = "_sgd" in name
        assert experiment.training == by_name["lora_r8_sgd" if sgd else "lora_r8"].training
        if experiment.qa_lora is None:
            continue
        assert experiment.qa_lora.fixed_rank == 8
        base = by_name["nf4_linear" if "linear_" in name else "nf4"].qa_lora.model_dump()
        changed = {key for key, value in experiment.qa_lora.model_dump().items() if value != base[key]}
        assert any(changed <= factor for factor in FACTORS), (name, changed)
    file = evidence.RESULTS / "quantization_pilot.csv"
    if file.exists():
        choice = evidence.chosen(pd.read_csv(file))
        assert not choice.at_the_edge
        assert by_name["nf4_sgd"].training.learning_rate == choice.learning_rate
        assert by_name["nf4_sgd_balance"].qa_lora.balance_target == choice.scale_target
        assert by_name["nf4_linear_balance"].qa_lora.balance_target == choice.pace_target


def test_records_become_rows() -> None:
    nf4 = planted.record(planted.experiments()["qa_lora_4bit_nf4_constant"], 0, 0.8)
    summary = nf4.quantization
    assert summary is not None
    balance = [{"step": 48.0, "adapter_to_error_ratio": 0.25}]
    nf4 = nf4.model_copy(update={"quantization": summary.model_copy(update={"balance": balance})})
    found = evidence.columns(nf4)
    total = 21_233_664 * 5 / 8 + planted.LEFT_IN_FLOAT + 3080
    assert found["layers_bits"] == 5.0
    assert found["model_bytes"] == total
    assert found["model_bits"] == pytest.approx(8 * total / (planted.BACKBONE_PARAMETERS + 770))
    assert found["adapter_to_error_ratio"] == 0.25
    assert set(evidence.columns(planted.record(planted.experiments()["lora_r8"], 0, 0.8))) == {
        "adapter_parameters",
        "peak_memory_bytes",
    }


def test_the_document_holds_the_tables_of_the_files() -> None:
    text, tables = evidence.DOCUMENT.read_text(encoding="utf-8"), evidence.tables()
    assert filled(text, tables) == text
    assert all(f"<!-- {name} -->" in text and f"<!-- /{name} -->" in text for name in tables)
