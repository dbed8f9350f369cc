"""Studies of runs of seconds: six steps on models whose layers have 64 inputs, by every method."""

from collections.abc import Iterable, Sequence
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


def study_mapping(experiments: Iterable[dict[str, Any]], seeds: Sequence[int] = (0,), **changes: Any) -> dict[str, Any]:
    """Return the configuration of a study of handwritten digits; keyword arguments are further settings of it."""
    return {
        "name": "tiny",
        "seeds": list(seeds),
        "threads": 1,
        "device": "cpu",
        "precision": "fp32",
        "backbone": {"model": "test_vit", "weights": "random"},
        "data": {"dataset": "digits", "image_size": 32, "train_images": 24, "validation_images": 20, "test_images": 30},
        "experiments": list(experiments),
        **changes,
    }
