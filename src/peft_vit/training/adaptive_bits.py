"""Bits of each layer, and on request the rank of each site, chosen before training under one budget of bytes.

In anybody's own loop, on a plain model and a batch of training images::

    chosen = allocate_bits(model, config, images, labels)
    trainer = QALoRATrainer(model, config, total_steps=600, formats=chosen.formats, ranks=chosen.ranks)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from peft_vit.adapters import site_adapters
from peft_vit.allocation.bits import choose
from peft_vit.allocation.calibration import fit_head, layer_losses, rank_gains
from peft_vit.backbones import Site, chosen, find_sites, fused_sites
from peft_vit.config import QaLoraConfig
from peft_vit.errors import SilentNoEffectWarning, UserError
from peft_vit.quantization import QuantizationFormat
from peft_vit.records import BitAllocation
from peft_vit.training.quantized_layers import check_ranks, format_of

_VALUE_BYTES = 4  # adapters train and are saved in float32


@dataclass(frozen=True)
class ChosenBits:
    """What `QALoRATrainer` takes, and what a record keeps of how it was chosen."""

    formats: dict[str, QuantizationFormat]  # by module, blocks.3.attn.qkv
    ranks: dict[str, int] | None  # by site, blocks.3.attn.query; None: the settings' rank
    record: BitAllocation

    @classmethod
    def of_record(cls, record: BitAllocation, config: QaLoraConfig) -> ChosenBits:
        """Return what was chosen under the same settings, without measuring it anew."""
        return cls({name: format_of(config, type) for name, type in record.types.items()}, record.ranks, record)


class _Options(NamedTuple):
    """What may be chosen, its bytes, and how many may be spent."""

    formats: dict[str, list[QuantizationFormat]]  # by module
    format_bytes: dict[str, list[int]]  # likewise
    rank_bytes: dict[str, list[int]]  # by site, of ranks from 0 to the largest useful one
    budget: int


def check_bits(config: QaLoraConfig, sites: Sequence[Site]) -> int:
    """Return the budget of `adaptive_bits` in bytes, checked against the shapes of the whole model's sites."""
    return _options(config, sites).budget


def allocate_bits(
    model: nn.Module, config: QaLoraConfig, images: Tensor, labels: Tensor, *, seed: int = 0
) -> ChosenBits:
    """Measure what each type would cost each layer, and choose under the budget; the model is left as it was.

    Args:
        model: a Vision Transformer of timm without adapters.
        config: a `qa_lora` section with `adaptive_bits`.
        images: calibration batch (N, 3, S, S) of training images, normalised, on the model's device.
        labels: (N,) int64.
        seed: of what the measure draws.

    Raises:
        UserError: as `check_bits`; if the model carries adapters, or the images are all of one class.
    """
    assert config.adaptive_bits is not None
    if site_adapters(model):
        raise UserError("carries adapters already; choose bits before they are attached", field="model")
    sites = find_sites(model)
    options = _options(config, sites)
    head, places = fit_head(model, images, labels)
    losses = layer_losses(model, options.formats, images, head, by=config.adaptive_bits.sensitivity, seed=seed)
    chosen_sites = [site for site in sites if site.name in options.rank_bytes]
    gains = rank_gains(model, chosen_sites, images, places, head, pool=config.pool) if chosen_sites else {}
    worths = [*losses.values(), *((-gains[name]).tolist() for name in options.rank_bytes)]
    choice = choose(worths, [*options.format_bytes.values(), *options.rank_bytes.values()], options.budget)
    places_of = dict(zip(options.formats, choice.options, strict=False))  # layers come first
    types = {name: options.formats[name][place].type for name, place in places_of.items()}
    ranks = dict(zip(options.rank_bytes, choice.options[len(types) :], strict=True))
    if len(set(types.values())) == 1:
        text = f"adaptive_bits chose {min(types.values())} for every layer: no exchange of bits between layers is "
        text += "predicted to be worth it, and quantization_type gives the same weights"
        warnings.warn(text, SilentNoEffectWarning, stacklevel=2)
    if ranks and not any(ranks.values()):
        text = "adaptive_bits.ranks gave every byte to bits and no site a rank, so only the head is trained; raise "
        warnings.warn(f"{text}total_byte_budget", SilentNoEffectWarning, stacklevel=2)
    rise = sum(losses[name][place] for name, place in places_of.items())
    record = BitAllocation(
        images=len(images),
        budget_bytes=options.budget,
        spent_bytes=choice.size,
        types=types,
        ranks=ranks or None,
        losses={
            name: {format.type: loss for format, loss in zip(options.formats[name], losses[name], strict=True)}
            for name in types
        },
        predicted_rise=rise,
        predicted_gain=rise - choice.loss,
        gap=choice.loss - choice.lower_bound,
    )
    return ChosenBits.of_record(record, config)


def _options(config: QaLoraConfig, sites: Sequence[Site]) -> _Options:
    settings = config.adaptive_bits
    assert settings is not None
    wanted = chosen(sites, config.targets)
    check_ranks(wanted, 0, config.pool)
    candidates = [format_of(config, type) for type in settings.types]
    modules = {name: site for name, site in fused_sites(sites).items() if name in {site.module for site in wanted}}
    format_bytes = {
        name: [format.stored_bytes(site.out_features, site.in_features) for format in candidates]
        for name, site in modules.items()
    }
    rank_bytes = {}
    for site in wanted if settings.ranks else []:
        columns = site.in_features // config.pool
        ranks = range(min(columns, site.out_features) + 1)
        rank_bytes[site.name] = [_VALUE_BYTES * rank * (columns + site.out_features) for rank in ranks]
    least, most = (sum(pick(group) for group in [*format_bytes.values(), *rank_bytes.values()]) for pick in (min, max))
    one_rank = min((group[1] for group in rank_bytes.values()), default=0)
    if settings.average_bits is not None:
        to_bits = 8 / sum(site.out_features * site.in_features for site in modules.values())
        budget = math.floor(settings.average_bits / to_bits)
        fits = least * to_bits <= settings.average_bits < most * to_bits
        field, given, lower = (
            "average_bits",
            f"{settings.average_bits}",
            f"{math.ceil(least * to_bits * 1000) / 1000:.3f}",
        )
        upper = f"{most * to_bits:.3f} bits"
    else:
        assert settings.total_byte_budget is not None
        budget = settings.total_byte_budget
        fits = least + one_rank <= budget < most
        field, given, lower, upper = "total_byte_budget", f"{budget}", f"{least + one_rank}", f"{most} bytes"
    if not fits:
        smallest, largest = (", one rank", " and rank") if rank_bytes else ("", "")
        raise UserError(
            f"expected at least {lower} (every layer at the smallest type{smallest}) and less than {upper} (at the "
            f"largest{largest}), got {given}",
            field=f"qa_lora.adaptive_bits.{field}",
        )
    return _Options(dict.fromkeys(modules, candidates), format_bytes, rank_bytes, budget)
