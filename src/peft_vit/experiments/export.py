"""From a finished run's folder back to its model, and on to another library's format."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from peft_vit.adapters import adapted_modules, load_trained, saved_scales
from peft_vit.adapters.peft_format import attach_fused, export_peft
from peft_vit.backbones import LoadedBackbone, choose_attention, load_backbone
from peft_vit.errors import UserError
from peft_vit.experiments.methods import prepare
from peft_vit.records import ADAPTER_FILE, RECORD_FILE, RunRecord, read_record

_NOT_AS_PEFT = {
    "full": "full fine-tuning changes every weight, so there is no adapter to export",
    "qa_lora": "a QA-LoRA adapter belongs to the quantized weights; PEFT would add it to the float ones, another model",
}


@dataclass(frozen=True)
class RestoredRun:
    """A run's model as it was saved, and what is known of it."""

    record: RunRecord
    backbone: LoadedBackbone
    model: nn.Module  # carries adapters and head at the chosen step; on the CPU, in evaluation mode


def export_run_to_peft(run_dir: Path, output_dir: Path) -> None:
    """Write a run's adapter and head in PEFT's format, with peft_vit.json beside them.

    Args:
        run_dir: holds record.json and adapter.safetensors.
        output_dir: created; must be empty.

    Raises:
        UserError: if the run can't be restored, or its method has no PEFT counterpart.
    """
    record = _done_record(run_dir)
    method = record.spec.experiment.method
    if method in _NOT_AS_PEFT:
        raise UserError(
            f"{_NOT_AS_PEFT[method]}; export a run of lora, adalora or linear, or of PEFT's methods", file=run_dir
        )
    run = restore_run(run_dir)
    export_peft(
        run.model,
        output_dir,
        {
            "run": record.spec.run_id,
            "model": record.spec.backbone.model,
            "weights_name": run.backbone.weights_name,
            "weights_sha256": run.backbone.weights_sha256,
            "image_size": record.spec.data.image_size,
            "mean": run.backbone.mean,
            "std": run.backbone.std,
            "class_names": record.class_names,
        },
    )


def restore_run(run_dir: Path) -> RestoredRun:
    """Build a run's backbone again, prepare it as its method says, and load what was trained.

    Raises:
        UserError: if the run failed, a file is missing or has changed, or the backbone's weights are others now.
    """
    record = _done_record(run_dir)
    spec, provenance = record.spec, record.provenance
    assert provenance is not None
    file = run_dir / ADAPTER_FILE
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"can't be read ({error.strerror}); move or rerun the whole run", file=file) from None
    if found != record.adapter_sha256:
        raise UserError(f"has SHA-256 {found}, its record says {record.adapter_sha256}; rerun this run", file=file)
    backbone = load_backbone(
        spec.backbone, image_size=spec.data.image_size, num_classes=len(record.class_names), seed=spec.seed,
        smoke=spec.smoke,
    )  # fmt: skip
    if backbone.weights_sha256 != provenance.weights_sha256:
        raise UserError(
            f"{backbone.weights_name} has SHA-256 {backbone.weights_sha256}, the run was trained on "
            f"{provenance.weights_sha256}; get those weights again", file=run_dir / RECORD_FILE, field="provenance",
        )  # fmt: skip
    if spec.experiment.start is None:
        prepare(backbone.model, spec.experiment, total_steps=len(record.steps), seed=spec.seed)
    else:  # the adapter that it went on from need not be there any more: its scales stand in the file
        attach_fused(backbone.model, saved_scales(file), seed=spec.seed)
    load_trained(backbone.model, file)
    choose_attention(backbone.model, torch.device("cpu"), spec.precision)  # as in the run: equal to the last bit
    for _, module in adapted_modules(backbone.model):
        if module.quantized is not None:
            module.drop_float()  # wherever the schedule starts, a saved run stands on quantized weights alone
    return RestoredRun(record, backbone, backbone.model.eval())


def _done_record(run_dir: Path) -> RunRecord:
    record = read_record(run_dir / RECORD_FILE)
    if record.status != "done" or record.provenance is None:
        raise UserError(f"this run failed ({record.error}); rerun it", file=run_dir / RECORD_FILE, field="status")
    return record
