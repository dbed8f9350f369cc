"""From a finished run's folder back to its model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from peft_vit.base.errors import UserError, agreeing_with, os_fault
from peft_vit.base.files import sha256_of
from peft_vit.base.statistics import Neighbours
from peft_vit.core.adapters import adapted_modules, load_trained, read_adapter_file
from peft_vit.core.adapters.peft_format import attach_named
from peft_vit.core.adapters.peft_tuner import saved_module_ranks
from peft_vit.core.backbones import LoadedBackbone, choose_attention, load_run_backbone
from peft_vit.core.config import DATASETS, ExperimentConfig, QaLoraConfig
from peft_vit.core.methods import METHODS, PrepareContext
from peft_vit.core.methods.quantized import keeps_codes, packed_at_once
from peft_vit.core.records import RunRecord
from peft_vit.core.tasks import TASKS
from peft_vit.core.training.images import Data
from peft_vit.data import load_data
from peft_vit.deploy import Classifier, ExportMetadata, open_exported, torch_classifier
from peft_vit.runs.measures.held_out import read_run_neighbours
from peft_vit.runs.records.storage import ADAPTER_FILE, LATEST, RECORD_FILE, read_record, single_run


@dataclass(frozen=True)
class RestoredRun:
    """A run's model as it was saved, and what is known of it."""

    record: RunRecord
    backbone: LoadedBackbone
    model: nn.Module  # with adapters and head of the chosen step; on the CPU, in evaluation mode, in float
    reference: Neighbours | None  # features of training images; None: the run kept none

    @property
    def card(self) -> ExportMetadata:
        """Return what an export says of the model."""
        spec, architecture = self.record.spec, self.backbone.architecture
        return ExportMetadata(
            run=spec.run_id,
            library=architecture.library,
            model=architecture.name,
            config=architecture.config,
            head_blocks=architecture.head_blocks,
            weights_name=self.backbone.weights_name,
            weights_sha256=self.backbone.weights_sha256,
            image_size=spec.data.image_size,
            interpolation=spec.data.interpolation or "bicubic",
            resize=spec.data.resize,
            channels=DATASETS[spec.data.dataset].channels,
            mean=self.backbone.mean,
            std=self.backbone.std,
            class_names=tuple(self.record.class_names),
            calibrated=self.record.calibrated,
            unlike=self.record.unlike,
            task=spec.task,
            decision=self.record.decision,
        )

    def load_data(self) -> Data:
        """Return the run's images; raises UserError if they are not there any more."""
        return load_data(self.record.spec.data, self.record.spec.seed, smoke=self.record.spec.smoke)


def open_model(path: Path, weights: str | None = None) -> Classifier:
    """Return the classifier of a run's folder, or of anything that `peft-vit export` has written.

    Args:
        path: of a file or folder.
        weights: of a PEFT folder's base, see `deployment.open_peft`.

    Raises:
        UserError: if it is none of these, or is damaged.
    """
    folder = single_run(path)
    if weights is None and os.path.isfile(folder / RECORD_FILE):  # unlike Path.is_file, False for an impossible name
        run = restore_run(folder)
        return torch_classifier(run.model, run.card, run.reference)
    if folder != path or path.name == LATEST or os.path.exists(path / LATEST):
        finished_record(folder)  # says what is missing
    return open_exported(path, weights)


def restore_run(run_dir: Path) -> RestoredRun:
    """Build a run's backbone again, prepare it as its method says, and load what was trained.

    Args:
        run_dir: of the run, or of the call of `peft-vit train` that made it.

    Raises:
        UserError: if the run failed, a file is missing or has changed, or the backbone's weights are others now.
    """
    run_dir = single_run(run_dir)
    record = finished_record(run_dir)
    spec, provenance = record.spec, record.provenance
    assert provenance is not None
    file = run_dir / ADAPTER_FILE
    with os_fault("can't be read", file, remedy="move or rerun the whole run"):
        digest = sha256_of(file)
    if digest != record.adapter_sha256:
        message = f"has SHA-256 {digest}, its {RECORD_FILE} says {record.adapter_sha256}; rerun this run"
        raise UserError(message, file=file, field="adapter_sha256")
    with agreeing_with(run_dir / RECORD_FILE):
        backbone = load_run_backbone(
            spec, TASKS[spec.task].head_width(record.class_names), mapped=packed_at_once(spec.experiment)
        )
    changed = ""
    if backbone.weights_sha256 != provenance.weights_sha256:
        changed = (
            f"{backbone.weights_name} has SHA-256 {backbone.weights_sha256}, the run was trained on "
            f"{provenance.weights_sha256}; get those weights again"
        )
    elif provenance.config_sha256 not in (None, backbone.architecture.config_sha256):
        changed = (
            f"config.json or preprocessor_config.json of {backbone.architecture.name} is not what the run was trained "
            "with; get those files again"
        )
    if changed:
        raise UserError(changed, file=run_dir / RECORD_FILE, field="provenance")
    with agreeing_with(run_dir / RECORD_FILE):
        if spec.experiment.start is None:
            total_steps = spec.experiment.total_steps(record.split_sizes["train"])
            prepare_as_saved(backbone.model, spec.experiment, file, total_steps=total_steps, seed=spec.seed)
        else:  # the adapter that it went on from need not be there any more: its scales stand in the file
            attach_named(backbone.model, read_adapter_file(file).scales, seed=spec.seed)
        load_trained(backbone.model, file)
    choose_attention(backbone.model, torch.device("cpu"), spec.precision)  # as in the run: equal to the last bit
    for _, module in adapted_modules(backbone.model):
        if module.quantized is not None:
            module.drop_float()  # wherever the schedule starts, a saved run stands on quantized weights alone
    return RestoredRun(record, backbone, backbone.model.eval(), read_run_neighbours(run_dir, record))


def prepare_as_saved(
    model: nn.Module, experiment: ExperimentConfig, file: Path, *, total_steps: int, seed: int
) -> None:
    """Prepare a model as an adapter file says of its run: with chosen formats and ranks, weights rounded on images."""
    qa_lora, saved = experiment.section(QaLoraConfig), read_adapter_file(file)
    adaptive = None if qa_lora is None else qa_lora.adaptive_bits
    method = METHODS[experiment.method]
    context = PrepareContext(
        total_steps=total_steps,
        seed=seed,
        formats=None if adaptive is None else saved.formats,
        ranks=saved.ranks if adaptive is not None and adaptive.ranks else None,
        packed=saved.packed if keeps_codes(experiment) else None,
        module_ranks=saved_module_ranks(saved.tensors) if method.uses_peft else None,
    )
    method.prepare(model, experiment, context)


def finished_record(run_dir: Path) -> RunRecord:
    """Return the record of a run that came to an end and can be restored."""
    run_dir = single_run(run_dir)
    if not os.path.lexists(run_dir / RECORD_FILE):
        reason = f"has no {RECORD_FILE}, so it is not a run, or was interrupted; give its command again to continue"
        if not os.path.exists(run_dir):
            reason = "does not exist; name the folder of a run, or of a call of `train`"
        elif os.path.exists(run_dir / LATEST):
            reason = f"holds several runs; name one of them, as {run_dir / LATEST}"
        raise UserError(reason, file=run_dir)
    record = read_record(run_dir / RECORD_FILE)
    if record.status != "done" or record.provenance is None:
        raise UserError(f"this run failed ({record.error}); rerun it", file=run_dir / RECORD_FILE, field="status")
    if not record.class_names:
        raise UserError("holds no class; rerun this run", file=run_dir / RECORD_FILE, field="class_names")
    if not {"train", "validation", "test"} <= record.split_sizes.keys():
        raise UserError("lacks a split; rerun this run", file=run_dir / RECORD_FILE, field="split_sizes")
    return record
