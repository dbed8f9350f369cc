"""The linear probe: a head on features of the frozen backbone, in float (`linear`) or packed weights (`qa_linear`).

How it is fitted is told in `training.linear_probe`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationInfo

from peft_vit.methods import qa_lora
from peft_vit.methods.method import Method, Preparation, Wishes
from peft_vit.methods.qa_lora import QaLoraConfig
from peft_vit.settings import is_given

if TYPE_CHECKING:
    from torch import nn

    from peft_vit.backbones import BackboneShape
    from peft_vit.config import ExperimentConfig
    from peft_vit.training import Hook

# Strengths of the head's penalty, see `training.linear_probe`; validation chooses.
PROBE_L2 = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def _prepare(model: nn.Module, experiment: ExperimentConfig, preparation: Preparation) -> list[Hook]:
    from peft_vit.adapters import freeze_backbone

    freeze_backbone(model)
    return []


def _prepare_packed(model: nn.Module, experiment: ExperimentConfig, preparation: Preparation) -> list[Hook]:
    from peft_vit.adapters import freeze_backbone
    from peft_vit.backbones import find_sites

    names = [site.name for site in find_sites(model, experiment.need(QaLoraConfig).targets)]
    hooks: list[Hook] = [qa_lora.trainer(model, experiment, preparation, ranks=dict.fromkeys(names, 0))]
    freeze_backbone(model)
    return hooks


def _check_packed(experiment: ExperimentConfig, shape: BackboneShape, total_steps: int, train_images: int) -> None:
    qa_lora.check_packing(experiment, shape, total_steps, train_images, rank=0)


def _agree(experiment: Any, info: ValidationInfo) -> None:
    settings = experiment.need(QaLoraConfig)
    for field in ("rank", "scale", "gradient_scaling_factor", "gradient_scaling", "balance_target"):
        if is_given(settings, field, info):
            raise ValueError(f"qa_lora.{field} has no effect with method: qa_linear, which has no adapters; remove it")
    if settings.quantization_schedule != "constant":
        raise ValueError(
            "method: qa_linear fits the head on packed weights; set qa_lora.quantization_schedule: constant"
        )
    if settings.adaptive_bits is not None and settings.adaptive_bits.ranks:
        raise ValueError("qa_lora.adaptive_bits.ranks has no effect with method: qa_linear; remove it")


def _packed_defaults(wishes: Wishes) -> dict[str, dict[str, Any]]:
    # Nothing is merged into offsets, so none are needed.
    return {"qa_lora": {**qa_lora.packed_by_default(wishes.shape), "quantization_offset": False}}


LINEAR = Method(
    name="linear",
    title="Linear probe",
    color="#6b7780",
    trains="head",
    prepare=_prepare,
    forward_passes=1,
    bytes_per_weight=4,
)
QA_LINEAR = Method(
    name="qa_linear",
    title="Linear probe on low-bit weights",
    color="#bbaa66",
    trains="head",
    settings={"qa_lora": QaLoraConfig},
    agree=_agree,
    prepare=_prepare_packed,
    check=_check_packed,
    shorten=qa_lora.shorten,
    defaults=_packed_defaults,
    forward_passes=1,
)
