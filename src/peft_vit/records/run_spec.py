"""RunSpec is what was asked: one run, fixed before it starts, and the digest of all that it depends on."""

from __future__ import annotations

import hashlib
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json

from peft_vit.config import (
    AUGMENTATION_OF_FLIPS,
    SEEDS,
    BackboneConfig,
    DataConfig,
    Device,
    ExperimentConfig,
    MeasuresConfig,
    Name,
    Precision,
)
from peft_vit.records.migrations import with_digested

# Settings that came later, by section: a digest leaves them out where they have their default.
_LATER_SECTIONS = ("peft",)
_LATER = {
    "backbone": ("library",),
    "measures": ("logits",),
    "data": ("test_split", "interpolation", "image_column", "label_column", "hub_subset", "images_file", "folds"),
}
_LATER_OF_EXPERIMENT = {
    "lora": ("ranks",),
    "qa_lora": ("rounding", "calibration_images", "use_double_quant"),
    "training": (
        "steps",
        "validate_every",
        "patience",
        "head_start",
        "label_smoothing",
        "warmup_share",
        "layer_decay",
        "micro_batch_size",
        "activation_checkpointing",
        "recomputed_blocks",
        "memory_limit",
        "probe_l2",
    ),
}


class RunSpec(BaseModel):
    """One run, fixed before it starts: an experiment's configuration and a seed."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    study: Name  # these two and the experiment's name are the run's folder
    seed: int = Field(ge=0, lt=SEEDS.stop)
    experiment: ExperimentConfig
    backbone: BackboneConfig
    data: DataConfig
    device: Device
    precision: Precision
    threads: int
    smoke: bool = False
    measures: MeasuresConfig = MeasuresConfig()

    @property
    def name(self) -> str:
        """Return ``experiment/seed_k``, which is also the run's folder below its study's."""
        return f"{self.experiment.name}/seed_{self.seed}"

    @property
    def run_id(self) -> str:
        """Return ``study/experiment/seed_k``, which is also the run's folder below the results directory."""
        return f"{self.study}/{self.name}"

    def digest(self) -> str:
        """Return the SHA-256 of everything that the run depends on.

        Settings that came later are left out where they have their default, so that it is the digest of before there
        was anything else.
        """
        experiment: dict[str, Any] = {name: True for name in _LATER_SECTIONS if getattr(self.experiment, name) is None}
        for name, later in _LATER_OF_EXPERIMENT.items():
            section = getattr(self.experiment, name, None)
            if isinstance(section, BaseModel):
                experiment[name] = _at_default(section, later)
        unasked: dict[str, Any] = {name: _at_default(getattr(self, name), later) for name, later in _LATER.items()}
        if self.measures == MeasuresConfig():
            unasked["measures"] = True
        augmentation = self.experiment.training.augmentation
        flips = next((said for said, same in AUGMENTATION_OF_FLIPS.items() if same == augmentation), None)
        if flips is not None:
            experiment["training"].add("augmentation")
        content = self.model_dump(mode="json", exclude=unasked | {"experiment": experiment})
        content["experiment"] = with_digested(content["experiment"])
        if flips is not None:
            content["data"]["flips"] = flips  # where flips were said when there was nothing else
        return hashlib.sha256(to_json(content)).hexdigest()


def _at_default(settings: BaseModel, names: tuple[str, ...]) -> set[str]:
    """Return those of the settings that have their default."""
    return {name for name in names if getattr(settings, name) == type(settings).model_fields[name].default}
