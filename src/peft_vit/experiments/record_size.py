"""The size of a run's record before there is one: rows of its lists, each written once and counted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from peft_vit.backbones import BackboneShape, fused_sites
from peft_vit.config import ExperimentConfig
from peft_vit.experiments.methods import chosen, pooled, rank_course
from peft_vit.records import (
    BitsEntry,
    Evaluation,
    ImportanceEntry,
    LayerSize,
    Metrics,
    ProbeEntry,
    RankEntry,
    RunSpec,
    StepRow,
)
from peft_vit.training import last_update

_FIXED_BYTES = 2500  # provenance, metrics, counts: what every record holds once
_NUMBER = 0.12345678901234567  # as long as most numbers of a record are
_METRICS = Metrics(
    n=1000, accuracy=_NUMBER, balanced_accuracy=_NUMBER, auroc=_NUMBER, nll=_NUMBER, ece=_NUMBER
)  # fmt: skip


def record_bytes(
    spec: RunSpec, shape: BackboneShape, class_names: Sequence[str], ranks: Mapping[str, int], total_steps: int
) -> int:
    """Estimate the size of a run's record.json.

    Args:
        spec: of the run.
        shape: of its backbone.
        class_names: of its images.
        ranks: by adapted site.
        total_steps: optimiser steps.
    """
    experiment = spec.experiment
    evaluation = Evaluation(step=total_steps, epoch=experiment.training.epochs, deployable=True, metrics=_METRICS)
    size = _FIXED_BYTES + _size(spec, 1) + len(json.dumps(list(class_names), indent=2))
    size += total_steps * _size(_step(experiment, total_steps), 2)
    size += experiment.training.epochs * _size(evaluation, 2)
    adapted = [site.info() for site in shape.sites if site.name in ranks]
    adapted += [site for site in fused_sites(shape.sites).values() if site.name in ranks and site not in adapted]
    size += sum(_size(site, 2) for site in adapted)
    if ranks:
        entry = RankEntry(step=total_steps, budget=100_000, ranks=dict(ranks), cost=100_000)
        scores = ImportanceEntry(step=total_steps, scores=dict.fromkeys(ranks, _NUMBER))
        decisions, scored = _decisions(experiment, shape, total_steps)
        size += (1 + decisions) * _size(entry, 2) + scored * _size(scores, 2)
        if experiment.adalora is not None and experiment.adalora.allocation_strategy in ("top_k", "threshold"):
            probed = ProbeEntry(step=total_steps, sites=list(ranks)[::2], values=10_000)  # those go without, say half
            size += scored * _size(probed, 2)
    return size + _quantization_bytes(experiment, shape)


def _size(value: BaseModel, depth: int) -> int:
    """Return the characters of a value that stands `depth` levels deep in a file with an indent of 1."""
    text = value.model_dump_json(indent=1)
    return len(text) + depth * (text.count("\n") + 1) + len(",\n")


def _step(experiment: ExperimentConfig, total_steps: int) -> StepRow:
    has_penalty = experiment.peft_adalora is not None
    if experiment.adalora is not None:
        has_penalty = experiment.adalora.parametrization == "svd" and experiment.adalora.orthogonality_weight != 0
    return StepRow(
        step=total_steps, loss=_NUMBER, learning_rate=_NUMBER / 1000, gradient_norm=_NUMBER, seconds=_NUMBER,
        penalties={"orthogonality": _NUMBER} if has_penalty else {},
        quantized_share=None if experiment.qa_lora is None else 1.0,
    )  # fmt: skip


def _decisions(experiment: ExperimentConfig, shape: BackboneShape, total_steps: int) -> tuple[int, int]:
    """Return how often ranks are decided, and how many of these decisions leave scores in the record."""
    if experiment.adalora is not None:
        schedule = rank_course(*pooled(experiment.adalora, experiment.qa_lora), shape, total_steps).schedule
        count = 1 + -(-(schedule.last_update - schedule.warmup_steps) // schedule.update_frequency)
        return count, count
    if experiment.peft_adalora is not None:
        every, last = experiment.peft_adalora.update_frequency, last_update(experiment.peft_adalora, total_steps)
        masks = last // every - experiment.peft_adalora.warmup_steps // every
        return masks + (last % every > 0), 0
    return 0, 0


def _quantization_bytes(experiment: ExperimentConfig, shape: BackboneShape) -> int:
    config = experiment.qa_lora
    if config is None:
        return 0
    modules = list(fused_sites(chosen(shape.sites, config.targets)))
    layer = LayerSize(weights=100_000, codes_bytes=100_000, scales_bytes=10_000, offsets_bytes=10_000)
    by_module = dict.fromkeys(modules, _NUMBER)
    bits = _size(BitsEntry(step=1000, bits_per_weight=dict.fromkeys(modules, 5.0)), 2)
    size = bits * (1 if config.quantization_schedule == "constant" else 2)
    size += len(json.dumps(by_module, indent=3)) + sum(len(name) + 10 + _size(layer, 4) for name in modules)
    if config.adaptive_bits is not None:
        losses = {name: dict.fromkeys(config.adaptive_bits.types, _NUMBER) for name in modules}
        types = dict.fromkeys(modules, "int4")
        size += len(json.dumps(losses, indent=2)) + len(json.dumps(types, indent=2))
        if config.adaptive_bits.ranks:
            ranks = {site.name: 4 for site in chosen(shape.sites, config.targets)}
            size += len(json.dumps(ranks, indent=2))
    return size
