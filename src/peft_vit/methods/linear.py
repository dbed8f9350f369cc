"""The linear probe: a head on features of the frozen backbone, in float (`linear`) or packed weights (`qa_linear`).

How it is fitted is told in `training.linear_probe`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_vit.adapters import freeze_backbone
from peft_vit.backbones import BackboneShape, find_sites
from peft_vit.config import ExperimentConfig, QaLoraConfig
from peft_vit.errors import UserError
from peft_vit.methods import qa_lora
from peft_vit.methods.method import Method, Preparation, Wishes
from peft_vit.training import Hook


def _prepare(model: nn.Module, experiment: ExperimentConfig, preparation: Preparation) -> list[Hook]:

    freeze_backbone(model)
    return []


def _prepare_packed(model: nn.Module, experiment: ExperimentConfig, preparation: Preparation) -> list[Hook]:

    names = [site.name for site in find_sites(model, experiment.need(QaLoraConfig).targets)]
    hooks: list[Hook] = [qa_lora.trainer(model, experiment, preparation, ranks=dict.fromkeys(names, 0))]
    freeze_backbone(model)
    return hooks


def _check_packed(experiment: ExperimentConfig, shape: BackboneShape, total_steps: int, train_images: int) -> None:
    if experiment.need(QaLoraConfig).quantization_schedule != "constant":
        problem = "has no effect with method: qa_linear, which fits the head on packed weights; set constant"
        raise UserError(problem, field="qa_lora.quantization_schedule")
    qa_lora.check_packing(experiment, shape, total_steps, train_images, rank=0)


def _packed_defaults(wishes: Wishes) -> dict[str, dict[str, Any]]:
    # Nothing is merged into offsets, so none are needed.
    return {"qa_lora": {**qa_lora.packed_by_default(wishes.shape), "quantization_offset": False}}


LINEAR = Method(prepare=_prepare, forward_passes=1, bytes_per_weight=4)
QA_LINEAR = Method(
    prepare=_prepare_packed, check=_check_packed, shorten=qa_lora.shorten, defaults=_packed_defaults, forward_passes=1
)
