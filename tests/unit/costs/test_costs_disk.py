"""What a plan says of disk is what real runs take, to a quarter: record, adapter, checkpoints."""

from pathlib import Path

import pytest

from peft_vit.backbones import describe
from peft_vit.config import MeasuresConfig, study_from_mapping
from peft_vit.costs.disk import disk_use
from peft_vit.records import RECORD_FILE, RunSpec, run_folder, write_result
from peft_vit.runs import run_one
from peft_vit.training import Checkpoints

pytestmark = pytest.mark.part("runner")

ADALORA = {
    "total_rank_budget": 80,
    "allocation_strategy": "proportional",
    "importance_metric": "sensitivity",
    "update_frequency": 3,
    "warmup_steps": 3,
    "final_steps": 4,
}
QA_LORA = {
    "quantization_bits": 4,
    "quantization_type": "nf4",
    "quantization_schedule": "linear",
    "gradient_scaling_factor": 1.0,
    "use_group_quantization": True,
    "group_size": 16,
}
BYTES = {key: value for key, value in ADALORA.items() if key != "total_rank_budget"}
EXPERIMENTS = {
    "linear": {},
    "full": {},
    "lora": {"lora": {"rank": 4}},
    "removal": {"method": "lora", "lora": {"rank": 4}},
    "sgd": {"method": "lora", "lora": {"rank": 4}, "training": {"optimizer": "sgd"}},
    "adalora": {"adalora": {**ADALORA, "parametrization": "svd"}},
    "top_k": {
        "method": "adalora",
        "adalora": {**ADALORA, "allocation_strategy": "top_k", "importance_metric": "fisher"},
    },
    "bytes": {"method": "adalora", "adalora": {**BYTES, "total_byte_budget": 60_000, "importance_metric": "magnitude"}},
    "qa_lora": {"qa_lora": {**QA_LORA, "rank": 4}},
    "qa_adalora": {"qa_lora": QA_LORA, "adalora": {**ADALORA, "total_rank_budget": 50}},
    "peft_lora": {"peft_lora": {"rank": 4}},
    "peft_adalora": {
        "peft_adalora": {
            "initial_rank": 4,
            "target_rank": 2,
            "update_frequency": 2,
            "warmup_steps": 2,
            "final_steps": 4,
        }
    },
}


def spec_of(name: str) -> RunSpec:
    """Return a run of 12 steps in 4 epochs, or of a probe."""
    training = {"batch_size": 8} if name == "linear" else {"epochs": 4, "batch_size": 8, "learning_rate": 3e-3}
    mapping = {
        "name": "tiny",
        "seeds": [0],
        "threads": 1,
        "device": "cpu",
        "precision": "fp32",
        "backbone": {"model": "test_vit", "weights": "random"},
        "data": {"dataset": "digits", "image_size": 32, "train_images": 24, "validation_images": 20, "test_images": 20},
        "training": training,
        "experiments": [{"name": name, "method": name, **EXPERIMENTS[name]}],
    }
    experiment = mapping["experiments"][0]
    experiment["training"] = {**training, **experiment.get("training", {})}
    del mapping["training"]
    study = study_from_mapping(mapping, file=Path("tiny.yaml"))
    return RunSpec(
        study="tiny",
        seed=0,
        experiment=study.experiments[0],
        backbone=study.backbone,
        data=study.data,
        device=study.device,
        precision=study.precision,
        threads=1,
        measures=MeasuresConfig(removal_images=8 if name == "removal" else None),
    )


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_is_what_a_run_takes(name: str, tmp_path: Path) -> None:
    if name.startswith("peft"):
        pytest.importorskip("peft")
    spec = spec_of(name)
    folder, checkpoints = run_folder(tmp_path, spec), []

    def look(progress) -> None:
        checkpoints.extend(size(found) for found in folder.glob("checkpoint-*"))

    finished = run_one(spec, on_progress=look, checkpoints=Checkpoints(folder, 0.0))
    assert finished.record.error is None
    checkpoints += [size(found) for found in folder.glob("checkpoint-*")]
    write_result(tmp_path, finished.record, finished.adapter)
    found = disk_use(
        spec,
        describe(spec.backbone, 32),
        finished.record.class_names,
        total_steps=spec.experiment.total_steps(24),
        validations=spec.experiment.validations(24),
        test_images=20,
    )
    real = (folder / RECORD_FILE).stat().st_size + len(finished.adapter)
    assert found.kept_bytes == pytest.approx(real, rel=0.25)
    assert found.adapter_bytes == pytest.approx(len(finished.adapter), rel=0.25)
    if spec.experiment.is_probe:  # it is over before a checkpoint is due
        assert (checkpoints, found.checkpoints_bytes) == ([], 0)
    else:
        assert found.checkpoints_bytes == pytest.approx(3 * max(checkpoints), rel=0.25)
