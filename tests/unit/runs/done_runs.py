"""Runs of the tiny study that the tests of this folder share: planned, done, and taken out of their files again."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from written_runs import planned, run_and_write

from peft_vit.core.adapters import adapted_modules, load_trained
from peft_vit.core.backbones import LoadedBackbone, load_backbone
from peft_vit.core.config import QaLoraConfig, StudyConfig
from peft_vit.core.methods import METHODS, PrepareContext
from peft_vit.core.records import RunRecord, RunSpec
from peft_vit.core.tasks import CLASSIFICATION
from peft_vit.core.training.metrics import predict
from peft_vit.data import load_data
from peft_vit.deploy.restore import RestoredRun, restore_run
from peft_vit.runs.records.storage import ADAPTER_FILE, run_folder


def with_settings(config: StudyConfig, section: str, **changes: Any) -> StudyConfig:
    """Return a study of one experiment with other settings in one of its sections."""
    (experiment,) = config.experiments
    settings = getattr(experiment, section).model_copy(update=changes)
    return config.model_copy(update={"experiments": (experiment.model_copy(update={section: settings}),)})


def with_adaptive_bits(config: StudyConfig, **changes: Any) -> StudyConfig:
    """Return a study of one experiment with other settings of its adaptive bits."""
    adaptive = config.experiments[0].need(QaLoraConfig).adaptive_bits
    assert adaptive is not None
    adaptive = adaptive.model_copy(update=changes)
    return with_settings(config, "qa_lora", adaptive_bits=adaptive, rank=None if adaptive.ranks else 2)


def with_data(config: StudyConfig, **changes: Any) -> StudyConfig:
    """Return a study with other images."""
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def specs(config: StudyConfig, folder: Path) -> list[RunSpec]:
    """Return what a study's runs do."""
    return [run.spec for run in planned(config, folder).runs]


def do(config: StudyConfig, folder: Path) -> list[RunRecord]:
    """Do a study's runs, and write what came out."""
    records = [run_and_write(spec, folder) for spec in specs(config, folder)]
    assert [record.error for record in records] == [None] * len(records)
    return records


def do_one(config: StudyConfig, folder: Path) -> RunRecord:
    """Do a study's only run, and write what came out."""
    (record,) = do(config, folder)
    return record


def restored(record: RunRecord, folder: Path) -> RestoredRun:
    """Return a run out of its files, after checking that it predicts on the test split what its record holds."""
    run = restore_run(run_folder(folder, record.spec))
    images = load_data(record.spec.data, record.spec.seed).test.open()
    batches = images.ordered_batches(32, run.backbone.mean, run.backbone.std)
    logits, labels = predict(run.model, batches, precision="fp32")
    probability = torch.from_numpy(logits).softmax(1).max(1).values.numpy()
    assert record.predictions is not None
    np.testing.assert_array_equal(logits.argmax(1), record.predictions.predicted)
    np.testing.assert_allclose(probability, record.predictions.probability, rtol=0, atol=1e-5)
    if record.head_fit is None:  # a probe's logits were computed from features
        assert CLASSIFICATION.measure(logits, labels) == record.test
    return run


def trained_again(record: RunRecord, folder: Path) -> LoadedBackbone:
    """Return the model out of a run's adapter file, and what its images are normalised by."""
    spec = record.spec
    backbone = load_backbone(spec.backbone, image_size=32, num_classes=10, seed=77)
    METHODS[spec.experiment.method].prepare(
        backbone.model, spec.experiment, PrepareContext(total_steps=len(record.steps), seed=77)
    )
    load_trained(backbone.model, run_folder(folder, spec) / ADAPTER_FILE)
    for _, module in adapted_modules(backbone.model):
        if module.quantized is not None:
            module.drop_float()
    return backbone
