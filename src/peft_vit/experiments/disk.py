"""What a run takes on disk, from shapes and counts alone: its adapter, its record, two checkpoints on the way.

Adaptive ranks are taken as equal ones. Where `adaptive_bits` chooses ranks, the adapter is taken as large as the budget
allows if every layer got the fewest bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from peft_vit.adapters.peft_files import TENSORS_FILE
from peft_vit.backbones import BackboneShape, fused_sites
from peft_vit.backbones.catalog import create_model
from peft_vit.config import ExperimentConfig, QaLoraConfig
from peft_vit.experiments.methods import chosen, pooled, rank_course
from peft_vit.experiments.record_size import record_bytes
from peft_vit.records import RunSpec
from peft_vit.training import format_of

_KEPT = 2  # checkpoints
_VALUE_BYTES = 4  # what is trained is float32, whatever the products are
_GENERATOR_BYTES = 5056  # of torch
_GENERATORS_BYTES = _GENERATOR_BYTES + 15_000  # in a checkpoint, with numpy's and Python's as JSON
_COMPACT = 0.8  # of a record, which a checkpoint holds without line breaks

Shapes = Mapping[str, tuple[int, ...]]
When = Literal["start", "end"]


@dataclass(frozen=True)
class DiskUse:
    """Bytes that stay when a run is done, and those of the checkpoints that are kept until then."""

    record_bytes: int
    adapter_bytes: int
    checkpoints_bytes: int

    @property
    def kept_bytes(self) -> int:
        """Return what stays."""
        return self.record_bytes + self.adapter_bytes


def disk_use(spec: RunSpec, shape: BackboneShape, class_names: Sequence[str], total_steps: int) -> DiskUse:
    """Estimate what a run takes on disk.

    Args:
        spec: of the run.
        shape: of its backbone.
        class_names: of its images.
        total_steps: optimiser steps.
    """
    experiment = spec.experiment
    ranks: dict[When, dict[str, int]] = {
        "start": _ranks(experiment, shape, total_steps, "start"), "end": _ranks(experiment, shape, total_steps, "end")
    }  # fmt: skip
    trained = {when: _trained(spec, shape, of_sites, len(class_names)) for when, of_sites in ranks.items()}
    record = record_bytes(spec, shape, class_names, ranks["end"], total_steps)
    header = json.dumps({"peft_vit": json.dumps(_metadata(spec, shape, class_names, ranks["end"]))})
    adapter = safetensors_bytes(trained["end"], header)
    checkpoint = max(
        _checkpoint_bytes(experiment, trained["start"], ranks["start"], 0),
        _checkpoint_bytes(experiment, trained["end"], ranks["end"], record),
    )
    return DiskUse(record, adapter, _KEPT * checkpoint)


def safetensors_bytes(shapes: Shapes, metadata: str = "") -> int:
    """Return the size of a safetensors file of float32 tensors.

    Args:
        shapes: by name.
        metadata: as it stands in the header, JSON.
    """
    header, end = len("{}"), 0
    if metadata:
        header += len('"__metadata__":,') + len(metadata)
    for name, shape in sorted(shapes.items()):
        start, end = end, end + _VALUE_BYTES * _numel(shape)
        entry = {name: {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}}
        header += len(json.dumps(entry, separators=(",", ":"))) - 1  # without braces, and with a comma
    header -= 1  # after the last one
    return 8 + -(-header // 8) * 8 + end


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _ranks(experiment: ExperimentConfig, shape: BackboneShape, total_steps: int, when: When) -> dict[str, int]:
    """Return the rank of each adapted site when training starts, or when it ends; of PEFT's methods by fused site."""
    if experiment.adalora is not None:
        course = rank_course(*pooled(experiment.adalora, experiment.qa_lora), shape, total_steps)
        return course.even_ranks(course.schedule.initial if when == "start" else course.schedule.total)
    if experiment.peft_lora is not None:
        fused = fused_sites(chosen(shape.sites, experiment.peft_lora.targets))
        return {site.name: experiment.peft_lora.rank for site in fused.values()}
    if experiment.peft_adalora is not None:  # its tensors keep their size, masks are zeros
        fused = fused_sites(chosen(shape.sites, experiment.peft_adalora.targets))
        return {site.name: experiment.peft_adalora.initial_rank for site in fused.values()}
    if experiment.lora is not None and experiment.lora.rank is not None:
        return {site.name: experiment.lora.rank for site in chosen(shape.sites, experiment.lora.targets)}
    if experiment.qa_lora is not None:
        return _quantized_ranks(experiment.qa_lora, shape)
    return {}


def _quantized_ranks(config: QaLoraConfig, shape: BackboneShape) -> dict[str, int]:
    sites = chosen(shape.sites, config.targets)
    rank = config.fixed_rank
    if config.adaptive_bits is not None and config.adaptive_bits.total_byte_budget and config.adaptive_bits.ranks:
        formats = [format_of(config, type) for type in config.adaptive_bits.types]
        layers = fused_sites(sites).values()
        fewest = sum(
            min(one.stored_bytes(layer.out_features, layer.in_features) for one in formats) for layer in layers
        )
        left = config.adaptive_bits.total_byte_budget - fewest
        rank = left // sum(_VALUE_BYTES * (site.in_features // config.pool + site.out_features) for site in sites)
    return {site.name: min(rank, site.in_features // config.pool, site.out_features) for site in sites}


def _trained(spec: RunSpec, shape: BackboneShape, ranks: Mapping[str, int], classes: int) -> Shapes:
    """Return the shape of everything that is trained, by name."""
    experiment = spec.experiment
    if experiment.method == "full":
        with torch.device("meta"):
            model = create_model(spec.backbone.model, spec.data.image_size, classes)
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shapes: dict[str, tuple[int, ...]] = {"head.weight": (classes, shape.width), "head.bias": (classes,)}
    if experiment.start is not None:  # the adapter that it goes on from
        shapes["start"] = (Path(experiment.start, TENSORS_FILE).stat().st_size // _VALUE_BYTES,)
        return shapes
    if experiment.peft_lora is not None or experiment.peft_adalora is not None:
        for module, fused in fused_sites(shape.sites).items():
            rank = ranks.get(fused.name, 0)
            shapes |= _factors(f"{module}.", rank, fused.in_features, fused.out_features)
            if experiment.peft_adalora is not None:
                shapes[f"{module}.lora_E.default"] = (rank, 1)
        return {name: one for name, one in shapes.items() if _numel(one)}
    pool = 1 if experiment.qa_lora is None else experiment.qa_lora.pool
    for site in shape.sites:
        rank = ranks.get(site.name, 0)
        shapes |= _factors(f"{site.module}.sites.{site.matrix}.", rank, site.in_features // pool, site.out_features)
        if experiment.adalora is not None and experiment.adalora.parametrization == "svd":
            shapes[f"{site.module}.sites.{site.matrix}.lora_lambda"] = (rank,)
    return {name: one for name, one in shapes.items() if _numel(one)}


def _factors(prefix: str, rank: int, columns: int, rows: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}lora_A": (rank, columns), f"{prefix}lora_B": (rows, rank)}


def _metadata(
    spec: RunSpec, shape: BackboneShape, class_names: Sequence[str], ranks: Mapping[str, int]
) -> dict[str, Any]:
    """Return what the adapter's header holds beside names and shapes."""
    form = {"parametrization": "product", "pool": 1, "scale": 2.0}
    formats: dict[str, Any] = {}
    if spec.experiment.qa_lora is not None:
        kept = format_of(spec.experiment.qa_lora, spec.experiment.qa_lora.quantization_type or "int4").as_json()
        formats = dict.fromkeys(fused_sites(chosen(shape.sites, spec.experiment.qa_lora.targets)), kept)
    return {
        "spec": spec.model_dump(mode="json"), "class_names": list(class_names), "form": form, "formats": formats,
        "ranks": {} if spec.experiment.method == "peft_adalora" else dict(ranks), "weights_name": spec.backbone.weights,
        "weights_sha256": "0" * 64,
    }  # fmt: skip


def _checkpoint_bytes(experiment: ExperimentConfig, trained: Shapes, ranks: Mapping[str, int], record: int) -> int:
    """Return the size of a checkpoint.

    Args:
        experiment: says which moments and scores are kept.
        trained: what is trained at that moment.
        ranks: likewise.
        record: bytes of the record at the end, which the checkpoint then holds too, with the best state; 0: early.
    """
    moments = ("momentum_buffer",) if experiment.training.optimizer == "sgd" else ("exp_avg", "exp_avg_sq")
    tensors = {f"training/model/{name}": shape for name, shape in trained.items()}
    if record:
        tensors |= {f"training/best/{name}": shape for name, shape in trained.items()}
    for index, shape in enumerate(trained.values()):
        tensors |= {f"training/optimizer/{index}/{moment}": shape for moment in moments}
        if len(moments) > 1:
            tensors[f"training/optimizer/{index}/step"] = (1,)
    scores = _scores(experiment, trained, ranks)
    if not (record and experiment.peft_adalora is not None):  # PEFT forgets its scores with the last mask
        tensors |= {f"training/hooks/0/{name}": shape for name, shape in scores.items()}
    layout = sum(len(name) + len('"": null, ') for name in tensors)
    generators = _GENERATORS_BYTES + (0 if experiment.adalora is None else _GENERATOR_BYTES)
    return safetensors_bytes(tensors) + layout + generators + round(_COMPACT * record)


def _scores(experiment: ExperimentConfig, trained: Shapes, ranks: Mapping[str, int]) -> Shapes:
    """Return the shapes of what a method keeps to decide ranks by."""
    adapters = {name: shape for name, shape in trained.items() if ".lora_" in name}
    if experiment.peft_adalora is not None:
        kinds = ("ipt", "exp_avg_ipt", "exp_avg_unc")
        return {f"{kind}/{name}": shape for kind in kinds for name, shape in adapters.items()}
    if experiment.adalora is None:
        return {}
    shapes: dict[str, tuple[int, ...]] = {f"births/{site}": (2 * rank,) for site, rank in ranks.items()}  # int64
    metric = experiment.adalora.importance_metric
    if metric == "sensitivity":
        shapes |= {f"smoothed/{kind}/{name}": shape for kind in ("mean", "spread") for name, shape in adapters.items()}
    elif metric in ("gradient_norm", "fisher"):
        shapes |= {f"smoothed/{metric}/{site}": (rank,) for site, rank in ranks.items()}
    return shapes
