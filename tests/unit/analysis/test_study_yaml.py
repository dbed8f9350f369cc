from pathlib import Path
from typing import Any

import planted
import pytest

from peft_vit.core.config import METHOD_KINDS, StudyConfig, load_study, study_from_mapping
from peft_vit.core.records import RunSpec
from peft_vit.runs.records.storage import read_record, write_record
from peft_vit.runs.records.study_yaml import study_yaml

ADALORA = {
    "total_rank_budget": 288,
    "allocation_strategy": "threshold",
    "importance_metric": "sensitivity",
    "update_frequency": 6,
    "warmup_steps": 12,
}
QA = {"quantization_schedule": "linear", "gradient_scaling_factor": 1e-05, "use_group_quantization": True}
BITS = {"quantization_bits": 4, "quantization_type": "nf4"}
EXPERIMENTS: list[dict[str, Any]] = [
    {"name": "linear", "method": "linear", "training": {"batch_size": 7, "class_weights": "balanced"}},
    {"name": "large", "method": "full", "training": {"clip_norm": None, "weight_decay": 1e22}},
    {"name": "1e3", "method": "full", "training": {"optimizer": "sgd"}},  # a name that YAML 1.2 reads as a number
    {"name": "packed_probe", "method": "qa_linear", "training": {}, "qa_lora": BITS | {"use_group_quantization": True}},
    {
        "name": "stable",
        "method": "lora",
        "lora": {"rank": 2},
        "training": {
            "epochs": None,
            "steps": 90,
            "validate_every": 10,
            "patience": 3,
            "schedule": "warmup_stable_decay",
            "head_start": "probe",
        },
    },
    {"name": "no", "method": "lora", "lora": {"rank": 8, "targets": ["value", "query"]}},
    {"name": "010", "method": "lora", "lora": {"start": "1_000"}},
    {"name": "null", "method": "peft_lora", "peft_lora": {"rank": 3, "scale": 1.0}},
    {"name": "adalora", "method": "adalora", "adalora": {**ADALORA, "threshold_tau": 0.5, "final_steps": 0}},
    {
        "name": "svd",
        "method": "adalora",
        "adalora": {
            **{name: value for name, value in ADALORA.items() if name != "total_rank_budget"},
            **{"total_byte_budget": 10**6, "allocation_strategy": "global", "importance_metric": "magnitude"},
            **{"parametrization": "svd", "orthogonality_weight": 0.0},
        },
    },
    {
        "name": "peft_adalora",
        "method": "peft_adalora",
        "peft_adalora": {"update_frequency": 2, "warmup_steps": 3, "initial_rank": 9},
    },
    {"name": "qa_lora", "method": "qa_lora", "qa_lora": {**QA, **BITS, "rank": 4, "balance_target": 0.5}},
    {
        "name": "adaptive_bits",
        "method": "qa_lora",
        "qa_lora": {**QA, "adaptive_bits": {"total_byte_budget": 5 * 10**6, "ranks": True, "types": ["int4", "int8"]}},
    },
    {"name": "qa_adalora", "method": "qa_adalora", "adalora": ADALORA, "qa_lora": {**QA, **BITS, "scale": 1.5}},
]


def planted_study(**changes: Any) -> StudyConfig:
    mapping = {
        "name": "s" * 64,
        "seeds": [3, 1],
        "precision": "bf16",
        "threads": 1,
        "backbone": {"model": "test_vit", "weights": "file", "file": "weights: #1.pth", "sha256": "1" * 64},
        "data": {"dataset": "csv", "path": "2024-01-01", "image_size": 32, "shots_per_class": 4}
        | {"validation_images": 20, "train_subset": "per_seed"},
        "measures": {"latency_batches": [1, 8]},
        "experiments": [
            experiment
            if METHOD_KINDS[experiment["method"]].trains == "head"
            else {**experiment, "training": {"epochs": 3, "learning_rate": 1e-3, **experiment.get("training", {})}}
            for experiment in EXPERIMENTS
        ],
        **changes,
    }
    return study_from_mapping(mapping, file=Path("planted.yaml"))


def spec_of(study: StudyConfig, place: int) -> RunSpec:
    own = study.model_dump(include={"backbone", "data", "measures", "device", "precision", "threads"})
    return RunSpec(study=study.name, seed=study.seeds[0], experiment=study.experiments[place], **own)


def test_every_method_is_among_the_experiments() -> None:
    assert {experiment["method"] for experiment in EXPERIMENTS} >= METHOD_KINDS.keys() - {"peft"}


@pytest.mark.parametrize("place", range(len(EXPERIMENTS)), ids=[experiment["name"] for experiment in EXPERIMENTS])
def test_the_file_says_what_the_record_says(place, tmp_path) -> None:
    study = planted_study()
    record = planted.record(planted.experiments()["linear_probe"], 3, 0.8)
    spec = spec_of(study, place)
    written = write_record(tmp_path, record.model_copy(update={"spec": spec, "spec_digest": spec.digest()}))
    read = read_record(written).spec  # as a command meets it: with every default spelled out
    file = tmp_path / "again.yaml"
    file.write_text(study_yaml(read, [1, 3], suffix="-again", comments=["why: because", "second"]), encoding="utf-8")
    again = load_study(file)
    expected = {"name": "s" * 58 + "-again", "seeds": (1, 3), "experiments": (study.experiments[place],)}
    assert again == study.model_copy(update=expected)
    assert file.read_text(encoding="utf-8").startswith("# why: because\n# second\nname: ")


def test_a_path_in_any_script_comes_back_and_measures_that_nobody_asked_for_are_not_written(tmp_path) -> None:
    data = {"dataset": "csv", "path": "bilder/ö: 数据 'x' \"y\" \\n.csv", "image_size": 32, "validation_images": 20}
    study = planted_study(data=data, measures={})
    file = tmp_path / "again.yaml"
    file.write_text(text := study_yaml(spec_of(study, 1), [0], suffix="-again"), encoding="utf-8")
    assert load_study(file).data == study.data
    assert "measures" not in text
    assert "clip_norm: null" in text
