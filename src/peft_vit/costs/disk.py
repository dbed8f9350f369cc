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
from peft_vit.backbones import BackboneShape, fused_sites
from peft_vit.backbones.catalog import create_model
from peft_vit.config import QaLoraConfig
from peft_vit.methods import RankPlan
from peft_vit.records import RunSpec

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
    plan = experiment.kind.plan_ranks(experiment, shape, total_steps)
    record = 3500 + _REGISTRATION_BYTES + 200 * total_steps + 450 * validations
    record += len(plan.last) * (175 + 35 * plan.decisions + 50 * plan.scored)
    record += 9000 if experiment.section(QaLoraConfig) else 0
    values, tensors = _trained(spec, shape, plan, plan.last, len(class_names))
    adapter = _VALUE_BYTES * values + 110 * tensors + 1800
    values, tensors = max((values, tensors), _trained(spec, shape, plan, plan.first, len(class_names)))
    copies = 2 + (1 if experiment.training.optimizer == "sgd" else 2) + plan.scores_per_value  # 2: the best state too
    checkpoint = copies * (_VALUE_BYTES * values + 110 * tensors) + record * 4 // 5 + 20_000
    record += _PREDICTION_BYTES * test_images
    if spec.measures.removal_images is not None:
        record += 300 + 55 * len(plan.last)
    return DiskUse(record, adapter, 0 if experiment.is_probe else _CHECKPOINTS * checkpoint)  # a probe takes no step


def _trained(
    spec: RunSpec, shape: BackboneShape, plan: RankPlan, ranks: Mapping[str, int], classes: int
) -> tuple[int, int]:
    """Return how many values are trained, and in how many tensors."""
    experiment = spec.experiment
    if experiment.kind.trains == "everything":
        with torch.device("meta"):
            model = create_model(spec.backbone.model, spec.data.image_size, classes)
        return sum(one.numel() for one in model.parameters()), len(list(model.parameters()))
    values, tensors = classes * (shape.width + 1), 2  # the head
    if experiment.start is not None:  # the adapter that it goes on from
        return values + Path(experiment.start, TENSORS_FILE).stat().st_size // _VALUE_BYTES, tensors + 1
    sites = [*shape.sites, *fused_sites(shape.sites).values()]
    for site in {site.name: site for site in sites}.values():  # one that is not fused stands in both
        if rank := ranks.get(site.name, 0):
            values += rank * (site.in_features // plan.pool + site.out_features + plan.values_per_rank)
            tensors += 2 + plan.values_per_rank
    return values, tensors
