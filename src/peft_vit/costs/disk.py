"""What a run takes on disk, by a rule of thumb: its adapter, its record, and the checkpoints on the way.

The constants are fitted to records, adapters and checkpoints of this project's own runs. In 37 experiments, what was
kept came out at 0.94 to 1.14 of its real size, records alone at 0.78 to 1.16; checkpoints, in 11 tiny ones, at 0.90 to
1.21. Adaptive ranks are taken as equal ones. Where `adaptive_bits` chooses ranks, the adapter is taken as large as the
budget allows if every layer got the fewest bits: nearly twice its size in the one experiment there was, beside the 37.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from peft_vit.adapters.peft_files import TENSORS_FILE
from peft_vit.backbones import BackboneShape, chosen, fused_sites
from peft_vit.backbones.catalog import create_model
from peft_vit.config import ExperimentConfig, QaLoraConfig
from peft_vit.records import RunSpec
from peft_vit.runs.methods import pooled, rank_course
from peft_vit.training import format_of, last_update

_VALUE_BYTES = 4  # what is trained is float32, whatever the products are
_CHECKPOINTS = 3  # two are kept while the next one is written
_REGISTRATION_BYTES = 3500  # of the hypotheses that come with the package; own ones add a hundred each
_PREDICTION_BYTES = 42  # position, label, predicted class and probability of an image, a line each


@dataclass(frozen=True)
class DiskUse:
    """Bytes that stay when a run is done, and those of the checkpoints that are there until then."""

    record_bytes: int
    adapter_bytes: int
    checkpoints_bytes: int

    @property
    def kept_bytes(self) -> int:
        """Return what stays."""
        return self.record_bytes + self.adapter_bytes


def disk_use(
    spec: RunSpec,
    shape: BackboneShape,
    class_names: Sequence[str],
    total_steps: int,
    validations: int,
    test_images: int,
) -> DiskUse:
    """Estimate what a run takes on disk.

    Args:
        spec: of the run.
        shape: of its backbone.
        class_names: of its images.
        total_steps: optimiser steps.
        validations: how often the validation images are read.
        test_images: whose predictions the record keeps.
    """
    experiment = spec.experiment
    ranks = _ranks(experiment, shape, total_steps, at_start=False)
    decisions, scored = _decisions(experiment, shape, total_steps)
    record = 3500 + _REGISTRATION_BYTES + 200 * total_steps + 450 * validations
    record += len(ranks) * (175 + 35 * decisions + 50 * scored) + (9000 if experiment.qa_lora is not None else 0)
    values, tensors = _trained(spec, shape, ranks, len(class_names))
    adapter = _VALUE_BYTES * values + 110 * tensors + 1800
    ranks = _ranks(experiment, shape, total_steps, at_start=True)
    values, tensors = max((values, tensors), _trained(spec, shape, ranks, len(class_names)))
    copies = 2 + (1 if experiment.training.optimizer == "sgd" else 2) + _scores(experiment)  # 2: the best state too
    checkpoint = copies * (_VALUE_BYTES * values + 110 * tensors) + record * 4 // 5 + 20_000
    record += _PREDICTION_BYTES * test_images
    if spec.measures.removal_images is not None:
        record += 300 + 55 * len(ranks)
    return DiskUse(record, adapter, 0 if experiment.is_probe else _CHECKPOINTS * checkpoint)  # a probe takes no step


def _ranks(experiment: ExperimentConfig, shape: BackboneShape, total_steps: int, *, at_start: bool) -> dict[str, int]:
    """Return the rank of each adapted site when training starts, or when it ends; of PEFT's methods by fused site."""
    if experiment.adalora is not None:
        course = rank_course(*pooled(experiment.adalora, experiment.qa_lora), shape, total_steps)
        return course.even_ranks(course.schedule.initial if at_start else course.schedule.total)
    if experiment.peft_lora is not None:
        fused = fused_sites(chosen(shape.sites, experiment.peft_lora.targets))
        return {site.name: experiment.peft_lora.rank for site in fused.values()}
    if experiment.peft_adalora is not None:  # its tensors keep their size, masks are zeros
        fused = fused_sites(chosen(shape.sites, experiment.peft_adalora.targets))
        return {site.name: experiment.peft_adalora.initial_rank for site in fused.values()}
    if experiment.lora is not None and experiment.lora.rank is not None:
        return {site.name: experiment.lora.rank for site in chosen(shape.sites, experiment.lora.targets)}
    if experiment.qa_lora is None or experiment.is_probe:
        return {}
    return _quantized_ranks(experiment.qa_lora, shape)


def _quantized_ranks(config: QaLoraConfig, shape: BackboneShape) -> dict[str, int]:
    sites = chosen(shape.sites, config.targets)
    rank = config.fixed_rank
    if config.adaptive_bits is not None and config.adaptive_bits.total_byte_budget and config.adaptive_bits.ranks:
        formats = [format_of(config, type) for type in config.adaptive_bits.types]
        layers = fused_sites(sites).values()
        fewest = sum(min(one.stored_bytes(of.out_features, of.in_features) for one in formats) for of in layers)
        left = config.adaptive_bits.total_byte_budget - fewest
        rank = left // sum(_VALUE_BYTES * (site.in_features // config.pool + site.out_features) for site in sites)
    return {site.name: min(rank, site.in_features // config.pool, site.out_features) for site in sites}


def _trained(spec: RunSpec, shape: BackboneShape, ranks: Mapping[str, int], classes: int) -> tuple[int, int]:
    """Return how many values are trained, and in how many tensors."""
    experiment = spec.experiment
    if experiment.method == "full":
        with torch.device("meta"):
            model = create_model(spec.backbone.model, spec.data.image_size, classes)
        return sum(one.numel() for one in model.parameters()), len(list(model.parameters()))
    values, tensors = classes * (shape.width + 1), 2  # the head
    if experiment.start is not None:  # the adapter that it goes on from
        return values + Path(experiment.start, TENSORS_FILE).stat().st_size // _VALUE_BYTES, tensors + 1
    pool = 1 if experiment.qa_lora is None else experiment.qa_lora.pool
    has_lambda = experiment.adalora is not None and experiment.adalora.parametrization == "svd"
    per_rank = 1 if has_lambda or experiment.peft_adalora is not None else 0
    sites = [*shape.sites, *fused_sites(shape.sites).values()]
    for site in {site.name: site for site in sites}.values():  # one that is not fused stands in both
        if rank := ranks.get(site.name, 0):
            values += rank * (site.in_features // pool + site.out_features + per_rank)
            tensors += 2 + per_rank
    return values, tensors


def _scores(experiment: ExperimentConfig) -> int:
    """Return how many scores a method keeps for each value that is trained."""
    if experiment.peft_adalora is not None:
        return 3
    return 2 if experiment.adalora is not None and experiment.adalora.importance_metric == "sensitivity" else 0


def _decisions(experiment: ExperimentConfig, shape: BackboneShape, total_steps: int) -> tuple[int, int]:
    """Return how often ranks are decided, and how many of these decisions leave scores in the record."""
    if experiment.adalora is not None:
        schedule = rank_course(*pooled(experiment.adalora, experiment.qa_lora), shape, total_steps).schedule
        count = 1 + -(-(schedule.last_update - schedule.warmup_steps) // schedule.update_frequency)
        return count, count
    if experiment.peft_adalora is not None:
        every, last = experiment.peft_adalora.update_frequency, last_update(experiment.peft_adalora, total_steps)
        return last // every - experiment.peft_adalora.warmup_steps // every + (last % every > 0), 0
    return 0, 0
