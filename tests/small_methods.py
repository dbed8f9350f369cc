"""Experiments of every method for runs of seconds: six steps on models whose layers have 64 inputs."""

from typing import Any

ADALORA = {
    "total_rank_budget": 30,
    "allocation_strategy": "global",
    "importance_metric": "sensitivity",
    "update_frequency": 1,
    "warmup_steps": 2,
    "final_steps": 2,
}
GROUPS = {"use_group_quantization": True, "group_size": 16}
INT4 = {"quantization_bits": 4, "quantization_type": "int4", **GROUPS}
LINEAR = {"quantization_schedule": "linear", "gradient_scaling_factor": 1.0}
CONSTANT = {**LINEAR, "quantization_schedule": "constant"}

EXPERIMENTS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", "training": {}},
    "packed_linear": {"method": "qa_linear", "training": {}, "qa_lora": INT4},
    "full": {"method": "full"},
    "lora": {"method": "lora", "lora": {"rank": 2, "scale": 1.7}},
    "adaptive": {"method": "adalora", "adalora": ADALORA},
    "triplets": {"method": "adalora", "adalora": {**ADALORA, "parametrization": "svd"}},
    "theirs": {"method": "peft_lora", "peft_lora": {"rank": 2, "scale": 1.7}},
    "theirs_adaptive": {
        "method": "peft_adalora",
        "peft_adalora": {
            "initial_rank": 4,
            "target_rank": 2,
            "warmup_steps": 1,
            "update_frequency": 2,
            "final_steps": 2,
        },
    },
    "dora": {"method": "peft", "peft": {"type": "dora", "r": 2}},
    "int4": {"method": "qa_lora", "qa_lora": {**INT4, **LINEAR, "rank": 2}},
    "nf4": {"method": "qa_lora", "qa_lora": {**INT4, **CONSTANT, "quantization_type": "nf4", "rank": 2}},
    "by_row": {
        "method": "qa_lora",
        "qa_lora": {
            **CONSTANT,
            "quantization_bits": 4,
            "quantization_type": "int4",
            "use_group_quantization": False,
            "rank": 2,
        },
    },
    "int4_adaptive": {"method": "qa_adalora", "adalora": ADALORA, "qa_lora": {**INT4, **LINEAR}},
    "mixed": {
        "method": "qa_lora",
        "qa_lora": {
            **GROUPS,
            **CONSTANT,
            "rank": 2,
            "adaptive_bits": {"average_bits": 6.0, "sensitivity": "loss", "calibration_images": 8},
        },
    },
}
