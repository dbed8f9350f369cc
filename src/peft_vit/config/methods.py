"""The methods of fine-tuning, as far as a configuration and a report know them: a line each in `METHOD_KINDS`.

A method's settings stand in a module beside this one, or here. What it does to a model is a module of `methods`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ValidationInfo

from peft_vit.config.adalora import AdaLoraConfig
from peft_vit.config.lora import LoraConfig
from peft_vit.config.peft import PeftAdaLoraConfig, PeftConfig, PeftLoraConfig
from peft_vit.config.qa_lora import QaLoraConfig
from peft_vit.settings import Frozen, is_given


@dataclass(frozen=True, kw_only=True)
class MethodKind:
    """What can be asked of a method, and how reports show it.

    Attributes:
        name: what a configuration says.
        title: what a report says.
        color: of its marks in figures.
        trains: a probe fits a head on features of the frozen backbone and takes no step.
        settings: the sections of an experiment that it reads, and their models.
        agree: refuses settings that contradict each other between sections (ValueError).
        module: of `methods`, which prepares a model; empty: the one of its name.
    """

    name: str
    title: str
    color: str
    trains: Literal["head", "adapters", "everything"]
    settings: Mapping[str, type[Frozen]] = field(default_factory=dict)
    agree: Callable[[Any, ValidationInfo], None] = lambda *_: None
    module: str = ""


def _adaptive_ranks_on_packed_weights(experiment: Any, info: ValidationInfo) -> None:
    """The ranks are adalora's, and what every adapter has is said once, in `qa_lora`."""
    settings, packing = experiment.need(AdaLoraConfig), experiment.need(QaLoraConfig)
    if packing.rank is not None:
        raise ValueError("qa_lora.rank has no effect with method: qa_adalora, adalora decides ranks; remove it")
    if packing.adaptive_bits is not None and packing.adaptive_bits.ranks:
        raise ValueError("qa_lora.adaptive_bits.ranks and the adalora section both decide ranks; remove one")
    for setting in ("scale", "targets"):
        if getattr(settings, setting) != AdaLoraConfig.model_fields[setting].default:
            raise ValueError(f"adalora.{setting} has no effect with method: qa_adalora; set qa_lora.{setting}")


def _probe_on_packed_weights(experiment: Any, info: ValidationInfo) -> None:
    settings = experiment.need(QaLoraConfig)
    for setting in ("rank", "scale", "gradient_scaling_factor", "gradient_scaling", "balance_target"):
        if is_given(settings, setting, info):
            raise ValueError(
                f"qa_lora.{setting} has no effect with method: qa_linear, which has no adapters; remove it"
            )
    if settings.quantization_schedule != "constant":
        raise ValueError(
            "method: qa_linear fits the head on packed weights; set qa_lora.quantization_schedule: constant"
        )
    if settings.adaptive_bits is not None and settings.adaptive_bits.ranks:
        raise ValueError("qa_lora.adaptive_bits.ranks has no effect with method: qa_linear; remove it")


METHOD_KINDS: dict[str, MethodKind] = {  # in the order in which reports show them
    kind.name: kind
    for kind in (
        MethodKind(name="linear", title="Linear probe", color="#6b7780", trains="head"),
        MethodKind(
            name="qa_linear",
            title="Linear probe on low-bit weights",
            color="#bbaa66",
            trains="head",
            settings={"qa_lora": QaLoraConfig},
            agree=_probe_on_packed_weights,
            module="linear",
        ),
        MethodKind(name="full", title="Full fine-tuning", color="#cc79a7", trains="everything"),
        MethodKind(
            name="lora", title="LoRA, fixed rank", color="#0072b2", trains="adapters", settings={"lora": LoraConfig}
        ),
        MethodKind(
            name="peft_lora",
            title="LoRA by PEFT",
            color="#56b4e9",
            trains="adapters",
            settings={"peft_lora": PeftLoraConfig},
            module="peft",
        ),
        MethodKind(
            name="adalora", title="AdaLoRA", color="#d55e00", trains="adapters", settings={"adalora": AdaLoraConfig}
        ),
        MethodKind(
            name="peft_adalora",
            title="AdaLoRA by PEFT",
            color="#e69f00",
            trains="adapters",
            settings={"peft_adalora": PeftAdaLoraConfig},
            module="peft",
        ),
        MethodKind(
            name="qa_lora", title="QA-LoRA", color="#009e73", trains="adapters", settings={"qa_lora": QaLoraConfig}
        ),
        MethodKind(
            name="qa_adalora",
            title="AdaLoRA + QA-LoRA",
            color="#8844ee",
            trains="adapters",
            settings={"adalora": AdaLoraConfig, "qa_lora": QaLoraConfig},
            agree=_adaptive_ranks_on_packed_weights,
        ),
        MethodKind(
            name="peft", title="Tuner of PEFT", color="#775533", trains="adapters", settings={"peft": PeftConfig}
        ),
    )
}
# Every section that an experiment may have, and the model of its settings; a probe has none of its own.
SECTIONS: dict[str, type[Frozen]] = {
    section: settings
    for kind in METHOD_KINDS.values()
    if kind.trains != "head"
    for section, settings in kind.settings.items()
}
# Strengths of a probe's penalty, see `training.linear_probe`; validation chooses.
PROBE_L2 = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
