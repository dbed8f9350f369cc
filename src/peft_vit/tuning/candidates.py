"""What may become the model: probes and adapters on weights of 32, 8, 4 and 2 bits, and what their files take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from peft_vit.backbones import BackboneShape, fused_sites
from peft_vit.config import AUGMENTATION_OF_FLIPS, BITS_OF_TYPE, Flips, QuantizationType
from peft_vit.methods import METHODS, TrainOptions
from peft_vit.tasks import DecidingMetric

Kind = Literal["lora", "lora_nf4", "lora_int8", "adalora", "lora_int2"]
KINDS: tuple[Kind, ...] = ("lora", "lora_nf4", "lora_int8", "adalora", "lora_int2")  # with little time, the first ones
REFERENCE = "lora_r8"
_TYPES: dict[Kind, QuantizationType] = {"lora_nf4": "nf4", "lora_int8": "int8", "lora_int2": "int2"}
_SMALL_RANK = 2
_SCALE_BYTES = 2  # of a group's scale, and of its offset


@dataclass(frozen=True)
class Design:
    """A model that could be trained.

    Attributes:
        name: of its experiment.
        method: of `METHODS`.
        kind: whose learning rate it takes; None: a probe, which has none.
        sections: of the experiment.
        bytes: that its file takes, merged.
        rate_factor: on the kind's learning rate.
    """

    name: str
    method: str
    kind: Kind | None
    sections: Mapping[str, Any]
    bytes: int
    rate_factor: float = 1.0

    def experiment(self, training: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
        """Return it as a configuration holds it."""
        return {"name": name or self.name, "method": self.method, "training": dict(training), **self.sections}

    def without_adapters(self) -> Design:
        """Return the linear probe of the same weights, which a run is that takes no step."""
        packing = self.sections.get("qa_lora")
        if packing is None:
            return replace(self, method="linear", kind=None, sections={})
        kept = {name: value for name, value in packing.items() if name != "rank"}
        return replace(self, method="qa_linear", kind=None, sections={"qa_lora": kept})


def designs(shape: BackboneShape, steps: int, classes: int) -> list[Design]:
    """Return everything that could be trained, the smallest file first; of equal ones, what trains the least.

    Args:
        shape: of the backbone.
        steps: of a run; ranks move in its first part.
        classes: of the images.
    """
    options = TrainOptions(rank=None, budget=None, steps=steps, shape=shape)
    lora, adalora, packed, pooled = (
        METHODS[name].defaults(options) for name in ("lora", "adalora", "qa_linear", "qa_lora")
    )
    few_options = replace(options, budget=max(1, len(shape.sites) // 2))  # fewer ranks than matrices
    few = METHODS["lora"].defaults(few_options)
    factors = {"lora_few_ranks": METHODS["lora"].learning_rate_for(few_options) / METHODS["lora"].learning_rate}
    found: list[tuple[str, str, Kind | None, dict[str, Any]]] = []
    for kind, type_ in _TYPES.items():
        said = {"quantization_bits": BITS_OF_TYPE[type_], "quantization_type": type_}
        head, low = packed["qa_lora"] | said, pooled["qa_lora"] | said
        found.append(("probe_" + type_, "qa_linear", None, {"qa_lora": head}))
        found.append((kind, "qa_lora", kind, {"qa_lora": low}))
    moving = {name: value for name, value in pooled["qa_lora"].items() if name != "rank"}
    found.append(("adalora_nf4", "qa_adalora", "lora_nf4", {**adalora, "qa_lora": moving}))
    found.append(("probe", "linear", None, {}))
    found.append(("lora_few_ranks", "lora", "lora", few))
    found.append(("lora_r2", "lora", "lora", {"lora": {"rank": _SMALL_RANK}}))
    found.append(("adalora", "adalora", "adalora", adalora))
    found.append((REFERENCE, "lora", "lora", lora))
    made = [Design(*one, file_bytes(shape, one[3].get("qa_lora"), classes), factors.get(one[0], 1.0)) for one in found]
    return sorted(made, key=lambda one: one.bytes)  # stable


def of_kind(all_designs: list[Design], kind: Kind) -> Design:
    """Return the design that stands for a kind while its learning rate is looked for."""
    name = REFERENCE if kind == "lora" else kind
    return next(one for one in all_designs if one.name == name)


def file_bytes(shape: BackboneShape, packing: Mapping[str, Any] | None, classes: int) -> int:
    """Return what a merged model's file takes, without its header: packed matrices, everything else in float32.

    A packed matrix (rows, columns) has rows x columns codes, and a scale for each row, or for each of its groups; with
    an adapter that sums its inputs by groups, an offset beside each scale, since the update goes there.

    Args:
        shape: of the backbone.
        packing: the section `qa_lora`; None: float weights.
        classes: of the head.
    """
    width = next(iter(shape.sites)).in_features
    values = shape.parameters + classes * (width + 1)
    if packing is None:
        return 4 * values
    total = 0
    for site in fused_sites(shape.sites).values():
        weights = site.in_features * site.out_features
        groups = site.out_features * (site.in_features // packing["group_size"] if packing.get("group_size") else 1)
        offset = packing.get("quantization_offset", packing["use_group_quantization"])
        total += weights * packing["quantization_bits"] // 8 + groups * _SCALE_BYTES * (2 if offset else 1)
        values -= weights
    return total + 4 * values


def training_of(
    design_kind: Kind | None,
    *,
    learning_rate: float | None,
    steps: int,
    validate_every: int,
    batch_size: int,
    metric: DecidingMetric,
    flips: Flips,
    memory: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the section `training` of a run on folds: never below the probe on validation.

    Its end is fixed, so the rate comes down over all of it (`one_cycle`). A rate that stays high until the last fifth,
    as `peft-vit train` needs it whose end is open, gains less in so few steps.

    Args:
        design_kind: None: a probe, which takes no steps.
        learning_rate: its highest.
        steps: of the run.
        validate_every: steps.
        batch_size: images.
        metric: what decides.
        flips: of training images.
        memory: settings that keep within a limit of memory.
    """
    shared = shared_training(batch_size, flips, metric=metric)
    if design_kind is None:
        return shared
    return {
        **shared,
        "learning_rate": learning_rate,
        "head_start": "probe",
        "steps": steps,
        "validate_every": min(validate_every, steps),
        **memory,
    }


def shared_training(batch_size: int, flips: Flips, *, metric: DecidingMetric) -> dict[str, Any]:
    """Return what every section `training` of a tuning says, a probe's too."""
    augmentation = [one.model_dump(mode="json") for one in AUGMENTATION_OF_FLIPS[flips]]
    decides = {"class_weights": True, "metric": metric.name} if metric.equal_classes else {}
    return {"batch_size": batch_size, "augmentation": augmentation, **decides}
