"""Sections of the methods: what can't work or has no effect is refused with the file's line."""

import json
from pathlib import Path

import pytest
import yaml

from peft_vit.config import load_study
from peft_vit.errors import UserError

pytestmark = pytest.mark.part("configuration")

STUDY = """\
name: tiny
seeds: [0]
backbone: {model: test_vit, weights: random}
data: {dataset: digits, image_size: 32, validation_images: 20}
training: {epochs: 2, learning_rate: 3e-3}
experiments:
  - name: one
"""


def load(tmp_path: Path, section: str, method: str | None = None):
    file = tmp_path / "study.yaml"
    method = method or section.partition(":")[0]
    file.write_text(f"{STUDY}    method: {method}\n    {section}\n  - {{name: other, method: full}}\n")
    return load_study(file).experiments[0]


def test_defaults_are_those_of_peft_where_it_has_some(tmp_path) -> None:
    settings = load(tmp_path, "peft_adalora: {update_frequency: 5, warmup_steps: 4}").peft_adalora
    assert (settings.initial_rank, settings.target_rank, settings.orthogonality_weight) == (12, 8, 0.5)
    assert (settings.beta1, settings.beta2, settings.scale, settings.final_steps) == (0.85, 0.85, 2.0, None)
    lora = load(tmp_path, "peft_lora: {rank: 4, targets: [value, key, query]}")
    assert (lora.peft_lora.scale, lora.start) == (2.0, None)
    assert load(tmp_path, "lora: {start: folder}").start == "folder"


@pytest.mark.parametrize(
    ("section", "field", "said"),
    [
        ("lora: {}", "lora", "give exactly one of rank, start and ranks"),
        ("lora: {rank: 2, start: folder}", "lora", "give exactly one of rank, start and ranks"),
        ("lora: {rank: 2, ranks: {rule: even, budget: 9}}", "lora", "give exactly one of rank, start and ranks"),
        ("lora: {ranks: {rule: eve, budget: 9}}", "lora.ranks.rule", "'even'"),
        ("lora: {ranks: {rule: even, budget: 0}}", "lora.ranks.budget", "greater than or equal to 1"),
        (
            "lora: {ranks: {rule: gradient, budget: 9, site_rank: 1}}",
            "lora.ranks",
            "site_rank has no effect with rule: gradient",
        ),
        (
            "lora: {ranks: {rule: even, budget: 9, site_rank: 2}}",
            "lora.ranks",
            "site_rank has no effect with rule: even",
        ),
        ("lora: {ranks: {rule: random, budget: 9, maximum_rank: 2}}", "lora.ranks", "maximum_rank has no effect with"),
        ("lora: {ranks: {rule: gradient, budget: 9, unit: rank}}", "lora.ranks.unit", "'ranks'"),
        (
            "lora: {ranks: {rule: stable_rank, budget: 9, calibration_images: 64}}",
            "lora.ranks",
            "calibration_images has no effect with rule: stable_rank",
        ),
        ("lora: {start: ''}", "lora.start", "is empty"),
        ("lora: {start: folder, scale: 2.0}", "lora", "scale has no effect with start: the adapter has its own"),
        ("lora: {start: folder, targets: [fc1]}", "lora", "targets has no effect with start"),
        ("peft_lora: {}", "peft_lora.rank", "is missing"),
        ("peft_lora: {rank: 2, start: folder}", "peft_lora.start", "unknown key"),
        (
            "peft_adalora: {initial_rank: 8, update_frequency: 1, warmup_steps: 1}",
            "peft_adalora",
            "target_rank 8 does not lie below initial_rank 8",
        ),
        (
            "peft_adalora: {initial_rank: 8, target_rank: 9, update_frequency: 1, warmup_steps: 1}",
            "peft_adalora",
            "target_rank 9 does not lie below initial_rank 8",
        ),
        ("peft_adalora: {update_frequency: 1, warmup_steps: 0}", "peft_adalora.warmup_steps", "greater than or equal"),
        ("peft_adalora: {update_frequency: 1}", "peft_adalora.warmup_steps", "is missing"),
        ("peft_adalora: {update_frequency: 1, warmup_steps: 1, beta1: 1.0}", "peft_adalora.beta1", "less than 1"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, section, field, said) -> None:
    with pytest.raises(UserError, match=r"study\.yaml:\d+: ") as caught:
        load(tmp_path, section)
    assert caught.value.field == f"experiments[0].{field}"
    assert said in caught.value.message


ADALORA: dict[str, object] = {
    "total_rank_budget": 8,
    "allocation_strategy": "proportional",
    "importance_metric": "magnitude",
    "update_frequency": 2,
    "warmup_steps": 4,
}
QA_LORA = {"quantization_bits": 4, "quantization_type": "nf4", "use_group_quantization": True}
UNPACKED: dict[str, object] = {"use_group_quantization": True}
LINEAR = "quantization_schedule: linear"
BITS = "adaptive_bits: {total_byte_budget: 9, ranks: true}"


def refusal(tmp_path: Path, method: str, section: str, settings: dict[str, object], changes: str) -> tuple[str, str]:
    """Return the field below the experiment and the message, of a section whose settings are changed; null: gone."""
    changed = {**settings, **yaml.safe_load(f"{{{changes}}}")}
    given = {key: value for key, value in changed.items() if value is not None}
    with pytest.raises(UserError, match=r"study\.yaml:\d+: ") as caught:
        load(tmp_path, f"{section}: {json.dumps(given)}", method)
    assert caught.value.field is not None
    return caught.value.field.removeprefix("experiments[0]"), caught.value.message


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ("initial_budget: 7", "", "initial_budget lies below total_rank_budget"),
        ("factor_start: orthonormal", "", "factor_start has no effect with parametrization: product"),
        ("lambda_gain: 10.0", "", "lambda_gain has no effect with parametrization: product"),
        ("total_rank_budget: null", "", "total_parameter_budget, total_byte_budget, total_mac_budget; got none"),
        ("total_byte_budget: 9000", "", "got total_rank_budget and total_byte_budget"),
        ("total_rank_budget: null, total_byte_budget: 0", ".total_byte_budget", "greater than or equal to 1, got 0"),
        (
            "total_rank_budget: null, total_parameter_budget: 8000, initial_budget: 7999",
            "",
            "initial_budget lies below total_parameter_budget",
        ),
        ("initial_budget: 9, budget_schedule: constant", "", "initial_budget has no effect"),
        ("minimum_rank: 3, maximum_rank: 2", "", "maximum_rank lies below minimum_rank"),
        (f"minimum_rank: {'9' * 20}", ".minimum_rank", "less than or equal to 65536"),
        ("top_k: 3", "", "top_k has no effect with allocation_strategy: proportional"),
        ("threshold_tau: 1.0", "", "threshold_tau has no effect with allocation_strategy: proportional"),
        ("sensitivity_beta: 0.85", "", "has no effect with importance_metric: magnitude; remove it"),
        ("sensitivity_beta: 1.0", ".sensitivity_beta", "less than 1, got 1.0"),
        ("importance_metric: uniform, sensitivity_beta: 0.5", "", "no effect with importance_metric: uniform"),
        ("importance_metric: fisher, uncertainty_beta: 0.85", "", "no effect with importance_metric: fisher"),
        ("allocation_strategy: global, budget_schedule: constant", "", "where every triplet stays"),
        ("allocation_strategy: global, importance_metric: uniform", "", "is no control of allocation_strategy: global"),
        ("orthogonality_weight: 0.1", "", "needs parametrization: svd"),
    ],
)
def test_settings_of_adalora_that_contradict_each_other(tmp_path, changes, field, said) -> None:
    found, message = refusal(tmp_path, "adalora", "adalora", ADALORA, changes)
    assert found == f".adalora{field}"
    assert said in message


@pytest.mark.parametrize(
    ("settings", "changes", "field", "said"),
    [
        (QA_LORA, "quantization_bits: 8", "", "nf4 stores 4 bits, quantization_bits says 8; change one"),
        (QA_LORA, "use_group_quantization: false, group_size: 64", "", "group_size has no effect"),
        (QA_LORA, "use_group_quantization: false, use_double_quant: true", "", "needs use_group_quantization: true"),
        (QA_LORA, "quantization_bits: 3", "", "nf4 stores 4 bits, quantization_bits says 3; change one"),
        (QA_LORA, "quantization_end_step: 5", "", "no effect with a constant schedule"),
        (
            QA_LORA,
            f"{LINEAR}, quantization_warmup_steps: 9, quantization_end_step: 9",
            "",
            "must lie after quantization_warmup_steps",
        ),
        (UNPACKED, "adaptive_bits: {}", ".adaptive_bits", "give exactly one of average_bits and total_byte_budget"),
        (UNPACKED, "adaptive_bits: {average_bits: 4.0, total_byte_budget: 9}", ".adaptive_bits", "exactly one of"),
        (UNPACKED, "adaptive_bits: {average_bits: 4.0, ranks: true}", ".adaptive_bits", "needs total_byte_budget"),
        (UNPACKED, "adaptive_bits: {average_bits: 4.0, types: [int4]}", ".adaptive_bits.types", "at least 2"),
        (UNPACKED, "adaptive_bits: {average_bits: 4.0, types: [int4, int4]}", ".adaptive_bits", "names one twice"),
        (UNPACKED, "adaptive_bits: {average_bits: 4.0, types: [int4, nf4]}", ".adaptive_bits", "all of the same bits"),
        (UNPACKED, "adaptive_bits: {average_bits: 4.0}, quantization_bits: 4", "", "quantization_bits has no effect"),
        (UNPACKED, "adaptive_bits: {average_bits: 4.0}, quantization_type: nf4", "", "quantization_type has no effect"),
        (UNPACKED, f"{BITS}, rank: 8", "", "rank has no effect with adaptive_bits"),
        (UNPACKED, "rank: 8", "", "give quantization_bits and quantization_type, or adaptive_bits"),
    ],
)
def test_settings_of_qa_lora_that_contradict_each_other(tmp_path, settings, changes, field, said) -> None:
    found, message = refusal(tmp_path, "qa_lora", "qa_lora", settings, changes)
    assert found == f".qa_lora{field}"
    assert said in message


@pytest.mark.parametrize(
    ("settings", "changes", "said"),
    [
        (QA_LORA, "rank: 8", "qa_lora.rank has no effect with method: qa_linear, which has no adapters; remove it"),
        (QA_LORA, "scale: 2.0", "qa_lora.scale has no effect"),
        (QA_LORA, "gradient_scaling_factor: 1.0", "qa_lora.gradient_scaling_factor has no effect"),
        (QA_LORA, "gradient_scaling: adaptive", "qa_lora.gradient_scaling has no effect"),
        (QA_LORA, "balance_target: 0.5", "qa_lora.balance_target has no effect"),
        (QA_LORA, LINEAR, "set qa_lora.quantization_schedule: constant"),
        (UNPACKED, BITS, "qa_lora.adaptive_bits.ranks has no effect with method: qa_linear; remove it"),
    ],
)
def test_a_packed_probe_has_nothing_to_train_but_its_head(tmp_path, settings, changes, said) -> None:
    found, message = refusal(tmp_path, "qa_linear", "qa_lora", settings, changes)
    assert found == ""
    assert said in message


def test_a_section_of_another_method(tmp_path) -> None:
    with pytest.raises(UserError, match=r"section 'peft_lora:' has no effect with method: lora"):
        load(tmp_path, "lora: {rank: 2}\n    peft_lora: {rank: 2}")
    with pytest.raises(UserError, match=r"method: peft_adalora needs a section 'peft_adalora:'"):
        load(tmp_path, "peft_adalora: null")
