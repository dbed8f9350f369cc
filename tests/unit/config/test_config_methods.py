"""Sections of LoRA that goes on and of PEFT's methods: what can't work is refused with the file's line."""

from pathlib import Path

import pytest

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


def load(tmp_path: Path, section: str):
    method = section.partition(":")[0]
    file = tmp_path / "study.yaml"
    file.write_text(f"{STUDY}    method: {method}\n    {section}\n")
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
        ("lora: {}", "lora", "give exactly one of rank and start"),
        ("lora: {rank: 2, start: folder}", "lora", "give exactly one of rank and start"),
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


QA_LORA = "qa_lora: {{quantization_schedule: constant, gradient_scaling_factor: 1.0, use_group_quantization: true, {}}}"


@pytest.mark.parametrize(
    ("settings", "field", "said"),
    [
        ("adaptive_bits: {}", ".adaptive_bits", "give exactly one of average_bits and total_byte_budget"),
        ("adaptive_bits: {average_bits: 4.0, total_byte_budget: 9}", ".adaptive_bits", "give exactly one of"),
        ("adaptive_bits: {average_bits: 4.0, ranks: true}", ".adaptive_bits", "ranks: true needs total_byte_budget"),
        ("adaptive_bits: {average_bits: 4.0, types: [int4]}", ".adaptive_bits.types", "at least 2"),
        ("adaptive_bits: {average_bits: 4.0, types: [int4, int4]}", ".adaptive_bits", "types names one twice"),
        ("adaptive_bits: {average_bits: 4.0, types: [int4, nf4]}", ".adaptive_bits", "types are all of the same bits"),
        ("adaptive_bits: {average_bits: 4.0}, quantization_bits: 4", "", "quantization_bits has no effect with"),
        ("adaptive_bits: {average_bits: 4.0}, quantization_type: nf4", "", "quantization_type has no effect with"),
        ("adaptive_bits: {total_byte_budget: 9, ranks: true}, rank: 8", "", "rank has no effect with adaptive_bits"),
        ("rank: 8", "", "give quantization_bits and quantization_type, or adaptive_bits"),
    ],
)
def test_adaptive_bits_are_said_once_and_leave_something_to_choose(tmp_path, settings, field, said) -> None:
    with pytest.raises(UserError, match=r"study\.yaml:\d+: ") as caught:
        load(tmp_path, QA_LORA.format(settings))
    assert caught.value.field == f"experiments[0].qa_lora{field}"
    assert said in caught.value.message


def test_a_section_of_another_method(tmp_path) -> None:
    with pytest.raises(UserError, match=r"section 'peft_lora:' has no effect with method: lora"):
        load(tmp_path, "lora: {rank: 2}\n    peft_lora: {rank: 2}")
    with pytest.raises(UserError, match=r"method: peft_adalora needs a section 'peft_adalora:'"):
        load(tmp_path, "peft_adalora: null")
