"""A study of seconds: a ViT of width 64 with random weights on handwritten digits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qa_lora_settings import DEFAULT as QA_LORA
from small_methods import CONSTANT, GROUPS, INT4, LINEAR, study_mapping

from peft_vit.core.config import METHOD_KINDS, PROBE_READS, StudyConfig, study_from_mapping

PROBES = {name for name, method in METHOD_KINDS.items() if method.trains == "head"}
_ADALORA = {
    "total_rank_budget": 40,
    "allocation_strategy": "proportional",
    "importance_metric": "sensitivity",
    "update_frequency": 1,
    "warmup_steps": 2,
    "final_steps": 2,
}
_THEIRS = {"initial_rank": 4, "target_rank": 2, "update_frequency": 1, "warmup_steps": 1, "final_steps": 1}
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "full": {},
    "lora": {"lora": {"rank": 2}},
    "peft_lora": {"peft_lora": {"rank": 2}},
    "peft_adalora": {"peft_adalora": _THEIRS},
    "adalora": {"adalora": {**_ADALORA, "parametrization": "svd"}},
    "qa_lora": {"qa_lora": {**QA_LORA, "rank": 2}},
    "qa_linear": {"qa_lora": {**GROUPS, "quantization_bits": 4, "quantization_type": "nf4"}},
    "adaptive_bits": {
        "method": "qa_lora",
        "qa_lora": {
            **GROUPS,
            **CONSTANT,
            "adaptive_bits": {"total_byte_budget": 170000, "ranks": True, "calibration_images": 24},
        },
    },
    "qa_adalora": {"adalora": _ADALORA, "qa_lora": {**INT4, **LINEAR, "targets": ["out", "fc2"]}},
}


@pytest.fixture(scope="session")
def method_sections() -> dict[str, dict[str, Any]]:
    """Return what an experiment says of each method."""
    return METHODS


@pytest.fixture
def study(cache: str) -> Callable[..., StudyConfig]:
    """Make a study of some methods; keyword arguments go into its training settings, of which probes read few."""

    def make(*methods: str, seeds: tuple[int, ...] = (0,), **training: object) -> StudyConfig:
        settings = {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, **training}
        of_probes = {name: settings[name] for name in PROBE_READS if name in settings}
        experiments = [
            {"name": method, "method": method, "training": of_probes if method in PROBES else settings}
            | METHODS[method]
            for method in methods
        ]
        return study_from_mapping(study_mapping(experiments, seeds), file=Path("tiny.yaml"))

    return make
