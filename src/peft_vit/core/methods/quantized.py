"""On quantized weights: LoRA (QA-LoRA, arXiv 2309.14717), ranks that move between sites, and a linear probe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import freeze_backbone, packed_weights
from peft_vit.core.allocation.starting_ranks import Adapters
from peft_vit.core.backbones import Backbone, BackboneShape, Site, find_sites, fused_sites
from peft_vit.core.config import BITS_OF_TYPE, ExperimentConfig, Frozen, QaLoraConfig, QuantizationType, Rounding
from peft_vit.core.methods.full_precision import (
    adalora_defaults,
    check_adalora,
    check_ranks_of,
    prepare_adalora,
    shorten_adalora,
    stored_adapters,
    stored_in,
)
from peft_vit.core.methods.method import (
    DEFAULT_RANK,
    Method,
    PrepareContext,
    Sections,
    TrainOptions,
    check_images,
    sites_of,
)
from peft_vit.core.training import Hook, QALoRATrainer, check_bits, check_ranks, end_step

_SCALE_BYTES = 2  # of a group's scale, and of its offset
_GROUP, _SMALLEST_GROUP = 32, 8  # of what `peft-vit train` takes; in smaller ones scales take more than codes


def usual_rounding(type: QuantizationType) -> Rounding:
    """Return the default rounding of weights to train on: below 4 bits GPTQ, which loses less."""
    return "gptq" if BITS_OF_TYPE[type] < 4 else "nearest"


def packed_by_default(sites: Sequence[Site], type: QuantizationType) -> dict[str, Any]:
    """Return the packing of `peft-vit train`: groups of 32 inputs, or of fewer where 32 does not divide a site's.

    Where no group divides all of them, each row has one scale.
    """
    group = math.gcd(_GROUP, *(site.in_features for site in sites))
    groups = {"use_group_quantization": True, "group_size": group} if group >= _SMALLEST_GROUP else {}
    bits = {"quantization_bits": BITS_OF_TYPE[type], "quantization_type": type}
    rounding = {} if usual_rounding(type) == "nearest" else {"rounding": "gptq"}
    return {**bits, **rounding, "use_group_quantization": False, **groups}


def packing_of(sites: Sequence[Site], type: QuantizationType, offset: bool | None = None) -> dict[str, Any]:
    """Return the same where nothing is merged into offsets, so none are needed.

    Where it is not said, int2 alone has them: without them int2 has three values, which is too few.
    """
    return {**packed_by_default(sites, type), "quantization_offset": type == "int2" if offset is None else offset}


def file_bytes(sites: Sequence[Site], values: int, packing: Mapping[str, Any] | None) -> int:
    """Return what a merged model's file takes, without its header: packed matrices, everything else in float32.

    A packed matrix (rows, columns) has rows x columns codes, and a scale for each row, or for each of its groups; with
    an adapter that sums its inputs by groups, an offset beside each scale, since the update goes there.

    Args:
        sites: all matrices of the blocks.
        values: of all parameters, the head's included.
        packing: as a section `qa_lora`; None: float weights.
    """
    if packing is None:
        return 4 * values
    total = 0
    for site in fused_sites(sites).values():
        weights = site.in_features * site.out_features
        groups = site.out_features * (site.in_features // packing["group_size"] if packing.get("group_size") else 1)
        offset = packing.get("quantization_offset", packing["use_group_quantization"])
        total += weights * packing["quantization_bits"] // 8 + groups * _SCALE_BYTES * (2 if offset else 1)
        values -= weights
    return total + 4 * values


def bytes_in_4_bits(model: nn.Module, values: int) -> int | None:
    """Return what a model's file takes once it is merged and rounded to 4 bits; None: its weights are packed already.

    Args:
        model: with adapters, or without.
        values: of all parameters that are merged, the head's included.
    """
    if packed_weights(model):
        return None
    sites = Backbone.within(model).sites
    return file_bytes(sites, values, packing_of(sites, "nf4"))


def _trainer(
    model: nn.Module, experiment: ExperimentConfig, context: PrepareContext, *, ranks: Mapping[str, int] | None = None
) -> Hook:
    """Pack the weights, attach adapters where there are none, and return the trainer."""
    settings = experiment.need(QaLoraConfig)
    images = None
    if settings.rounding == "gptq" and context.packed is None:
        assert context.calibration is not None
        images = context.calibration(settings.images_to_round_by)
    return QALoRATrainer(
        model,
        settings,
        context.total_steps,
        seed=context.seed,
        formats=context.formats,
        ranks=context.ranks if ranks is None else ranks,
        images=images,
        packed=context.packed,
    )


def packed_at_once(experiment: ExperimentConfig) -> Sequence[str] | None:
    """Return the targets whose float weights nothing needs but their packing; None if training or measures do."""
    settings = experiment.section(QaLoraConfig)
    if settings is None or settings.quantization_schedule != "constant" or settings.adaptive_bits is not None:
        return None
    return None if settings.keeps_codes else settings.targets


def keeps_codes(experiment: ExperimentConfig) -> bool:
    """Return whether packed weights depend on more than the float ones, so that they are saved with the adapters."""
    settings = experiment.section(QaLoraConfig)
    return settings is not None and settings.keeps_codes


def _check_packing(
    experiment: ExperimentConfig, shape: BackboneShape, total_steps: int, train_images: int, *, rank: int
) -> None:
    """Refuse groups and ranks that do not fit the sites, a schedule the steps, or too many calibration images.

    The rank is every adapter's; 0 where something else decides ranks.
    """
    settings = experiment.need(QaLoraConfig)
    check_ranks(sites_of("qa_lora", settings, shape), rank, settings.pool, field="qa_lora.rank")
    end_step(settings, total_steps)
    check_images("qa_lora.calibration_images", settings.calibration_images, train_images)
    if settings.adaptive_bits is not None:
        check_bits(settings, shape.sites)
        images = settings.adaptive_bits.calibration_images
        check_images("qa_lora.adaptive_bits.calibration_images", images, train_images)


def _shorten(experiment: ExperimentConfig, total_steps: int, steps: int, every: int) -> dict[str, Frozen]:
    """Return the section with a schedule for fewer steps."""
    settings = experiment.need(QaLoraConfig)
    if settings.quantization_schedule == "constant":
        return {}
    part = steps / total_steps
    warmup = round(part * settings.quantization_warmup_steps)
    end = max(warmup + 1, round(part * end_step(settings, total_steps)))
    short = {"quantization_warmup_steps": min(warmup, steps - 1), "quantization_end_step": min(end, steps)}
    return {"qa_lora": settings.model_copy(update=short)}


def _adapters(settings: QaLoraConfig) -> Adapters:
    return Adapters("qa_lora", settings.pool, settings.adapter_bits)


def _prepare(model: nn.Module, experiment: ExperimentConfig, context: PrepareContext) -> list[Hook]:
    settings, trainer = experiment.need(QaLoraConfig), _trainer(model, experiment, context)
    sites = find_sites(model, settings.targets)
    return [trainer, *stored_adapters(model, settings, _adapters(settings), sites)]


def _check(experiment: ExperimentConfig, shape: BackboneShape, total_steps: int, train_images: int) -> None:
    settings = experiment.need(QaLoraConfig)
    ranks_are_chosen = settings.adaptive_bits is not None and settings.adaptive_bits.ranks
    _check_packing(experiment, shape, total_steps, train_images, rank=0 if ranks_are_chosen else settings.fixed_rank)
    check_ranks_of(settings, _adapters(settings), shape)


def _defaults(options: TrainOptions) -> Sections:
    packing, sites = packed_by_default(options.shape.sites, options.bits), options.shape.sites
    if options.adapter_bytes is not None:
        adapters = Adapters("qa_lora", packing.get("group_size", 1))
        return {"qa_lora": packing | stored_in(options.adapter_bytes, adapters, sites)}
    # A pooled adapter sees one input a group: a rank above their number would be wasted.
    group = packing.get("group_size", 1)
    most = min(min(site.in_features // group, site.out_features) for site in sites)
    return {"qa_lora": {**packing, "rank": options.rank or min(DEFAULT_RANK, most)}}


QA_LORA = Method(
    prepare=_prepare,
    check=_check,
    shorten=_shorten,
    defaults=_defaults,
    why_not_peft=(
        "a QA-LoRA adapter belongs to the quantized weights; PEFT would add it to the float ones, another model"
    ),
)


def _prepare_adaptive(model: nn.Module, experiment: ExperimentConfig, context: PrepareContext) -> list[Hook]:
    # Ranks first, since in `before_step` they are scored by what the trainer then scales.
    return [*prepare_adalora(model, experiment, context), _trainer(model, experiment, context)]


def _check_adaptive(experiment: ExperimentConfig, shape: BackboneShape, total_steps: int, train_images: int) -> None:
    _check_packing(experiment, shape, total_steps, train_images, rank=0)
    check_adalora(experiment, shape, total_steps, train_images)


def _shorten_adaptive(experiment: ExperimentConfig, total_steps: int, steps: int, every: int) -> dict[str, Frozen]:
    ranks = shorten_adalora(experiment, total_steps, steps, every)
    return {**ranks, **_shorten(experiment, total_steps, steps, every)}


QA_ADALORA = Method(
    prepare=_prepare_adaptive,
    check=_check_adaptive,
    shorten=_shorten_adaptive,
    defaults=lambda options: {
        **adalora_defaults(options),
        "qa_lora": packed_by_default(options.shape.sites, options.bits),
    },
    why_not_peft="its adapter belongs to the quantized weights; PEFT would add it to the float ones, another model",
)


def _prepare_probe(model: nn.Module, experiment: ExperimentConfig, context: PrepareContext) -> list[Hook]:
    names = [site.name for site in find_sites(model, experiment.need(QaLoraConfig).targets)]
    hook = _trainer(model, experiment, context, ranks=dict.fromkeys(names, 0))
    freeze_backbone(model)
    return [hook]


def _check_probe(experiment: ExperimentConfig, shape: BackboneShape, total_steps: int, train_images: int) -> None:
    if experiment.need(QaLoraConfig).quantization_schedule != "constant":
        message = "has no effect with method: qa_linear, which fits the head on packed weights; set constant"
        raise UserError(message, field="qa_lora.quantization_schedule")
    _check_packing(experiment, shape, total_steps, train_images, rank=0)


QA_LINEAR = Method(
    prepare=_prepare_probe,
    check=_check_probe,
    shorten=_shorten,
    defaults=lambda options: {"qa_lora": packing_of(options.shape.sites, options.bits)},
    forward_passes=1,
)
