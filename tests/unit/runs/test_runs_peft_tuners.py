"""Method `peft`: tuners of the PEFT library under our loop, restored, merged and exported as PEFT itself computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_model
from torch import nn
from written_runs import planned, run_and_write

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import merged_state_dict
from peft_vit.core.adapters.peft_tuner import attach_peft
from peft_vit.core.backbones import load_run_backbone
from peft_vit.core.config import ExperimentConfig, StudyConfig
from peft_vit.core.records import RunRecord
from peft_vit.deploy.export import export_run_to_peft
from peft_vit.deploy.restore import restore_run
from peft_vit.runs.records.storage import run_folder

peft = pytest.importorskip("peft")
TUNERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2},
    "rslora": {"r": 2},
    "dora": {"r": 2},
    "eva": {"r": 4},
    "vera": {"r": 8},
    "oft": {"r": 0, "oft_block_size": 4},
    "ia3": {},
    "loha": {"r": 2},
    "hra": {"r": 2},
}


def with_tuner(config: StudyConfig, type: str, **settings: Any) -> StudyConfig:
    """Return the study with one experiment, a tuner of PEFT."""
    training = config.experiments[0].training
    own = ExperimentConfig.model_validate(
        {"name": type, "method": "peft", "training": training, "peft": {"type": type, **settings}}
    )
    return config.model_copy(update={"experiments": (own,)})


@pytest.fixture
def done(study, tmp_path):
    """Run one tuner on the tiny study; returns its record and its folder."""

    def make(type: str) -> tuple[RunRecord, Path]:
        config = with_tuner(study("lora"), type, **TUNERS[type])
        (run,) = planned(config, tmp_path).runs
        return run_and_write(run.spec, tmp_path), run_folder(tmp_path, run.spec)

    return make


def fresh(record: RunRecord) -> nn.Module:
    return load_run_backbone(record.spec, len(record.class_names)).model.eval()


@pytest.mark.parametrize("type", TUNERS)
def test_a_tuner_learns_and_is_restored_merged_and_exported(done, tmp_path, type: str) -> None:
    record, folder = done(type)
    assert record.status == "done", record.error
    assert record.parameters is not None
    assert record.parameters.final > record.parameters.head
    run = restore_run(folder)
    shape = (8, 3, run.card.image_size, run.card.image_size)  # grey images come as three equal channels
    images = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    merged = fresh(record)
    merged.load_state_dict(merged_state_dict(run.model))
    export_run_to_peft(folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["inference_mode"]
    theirs = peft.PeftModel.from_pretrained(fresh(record), tmp_path / "out").eval()
    with torch.no_grad():
        logits = run.model(images)
        assert not torch.allclose(fresh(record)(images), logits, atol=1e-3)
        assert torch.allclose(merged(images), logits, atol=1e-4)
        assert torch.allclose(theirs(images), logits, atol=1e-5)


def test_the_record_holds_the_ranks_that_eva_moved(done) -> None:
    record, _ = done("eva")
    (first, *_) = record.rank_history
    assert len(set(first.ranks.values())) > 1
    assert sum(first.ranks.values()) == pytest.approx(4 * len(first.ranks), abs=len(first.ranks))


def test_a_tuner_that_cannot_compute_with_a_models_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"PEFT's oft can't compute with a layer of this model .* fewer") as at:
        attach_peft(random_model("tiny_swin"), "oft", TUNERS["oft"], seed=0)
    assert at.value.field == "peft.type"
    within_windows = {**TUNERS["oft"], "target_modules": r".*attn\.(qkv|proj)"}
    attach_peft(random_model("tiny_swin"), "oft", within_windows, seed=0)


def test_eva_without_images_is_refused(tiny_vit) -> None:
    with pytest.raises(UserError, match="starts from training images"):
        attach_peft(tiny_vit(), "eva", {"r": 2}, seed=0)
