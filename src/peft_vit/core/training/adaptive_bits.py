"""Bits of each layer, and on request the rank of each site, chosen before training under one budget of bytes.

In anybody's own loop, on a plain model and a batch of training images::

    chosen = allocate_bits(model, config, images, labels)
    trainer = QALoRATrainer(model, config, total_steps=600, formats=chosen.formats, ranks=chosen.ranks)

Each group, a layer with its number formats or a site with its ranks, takes one of its options, which have a predicted
loss and a size each. The total loss is minimized while the total size stays within the budget: a multiple-choice
knapsack (Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, ch. 11), solved as the integer program that it is by
branch and cut (HiGHS, through `scipy.optimize.milp`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy
from torch import Tensor, nn

from peft_vit.base.errors import SilentNoEffectWarning, UserError
from peft_vit.core.adapters import site_adapters
from peft_vit.core.allocation import largest_ranks, rank_costs
from peft_vit.core.allocation.loss_prediction import fit_head, layer_losses, rank_gains
from peft_vit.core.backbones import Site, find_sites, fused_sites, select_sites
from peft_vit.core.config import QaLoraConfig
from peft_vit.core.quantization import QuantizationFormat
from peft_vit.core.records import BitAllocation
from peft_vit.core.training.quantized_layers import check_ranks, format_of

# Counted in nodes rather than seconds, so that a slow machine chooses as a fast one does. What real budgets take lies
# far below; see `BitsChoice.lower_bound` for what holds where it is reached.
_NODE_LIMIT = 10_000
# HiGHS takes totals that differ by less than 1e-6 for equal; losses are scaled, so that this is 1e-12 of their sum.
_LOSS_SCALE = 1e6


@dataclass(frozen=True)
class ChosenBits:
    """The chosen formats and ranks, and their record."""

    formats: dict[str, QuantizationFormat]  # by module, blocks.3.attn.qkv
    ranks: dict[str, int] | None  # by site, blocks.3.attn.query; None: the settings' rank
    record: BitAllocation

    @classmethod
    def of_record(cls, record: BitAllocation, config: QaLoraConfig) -> ChosenBits:
        """Return the choice that a record holds."""
        return cls({name: format_of(config, type) for name, type in record.types.items()}, record.ranks, record)


class _Options(NamedTuple):
    """The options, their bytes, and the budget."""

    formats: list[QuantizationFormat]  # of any layer
    format_bytes: dict[str, list[int]]  # by module, of each format
    rank_bytes: dict[str, list[int]]  # by site, of ranks from 0 to the largest useful one
    budget: int


def allocate_bits(
    model: nn.Module, config: QaLoraConfig, images: Tensor, labels: Tensor, *, seed: int = 0
) -> ChosenBits:
    """Choose formats and ranks under the budget by their predicted losses; the model stays as it is.

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
    options = check_bits(config, sites)
    head, places = fit_head(model, images, labels)
    formats = dict.fromkeys(options.format_bytes, options.formats)
    losses = layer_losses(model, formats, images, head, by=config.adaptive_bits.sensitivity, seed=seed)
    chosen_sites = [site for site in sites if site.name in options.rank_bytes]
    gains = rank_gains(model, chosen_sites, images, places, head, pool=config.pool) if chosen_sites else {}
    worths = [*losses.values(), *((-gains[name]).tolist() for name in options.rank_bytes)]
    choice = choose_bits(worths, [*options.format_bytes.values(), *options.rank_bytes.values()], options.budget)
    chosen_places = dict(zip(losses, choice.options, strict=False))  # layers come first
    types = {name: options.formats[place].type for name, place in chosen_places.items()}
    ranks = dict(zip(options.rank_bytes, choice.options[len(types) :], strict=True))
    if len(set(types.values())) == 1:
        warnings.warn(
            f"adaptive_bits chose {min(types.values())} for every layer: no exchange of bits between layers is "
            "predicted to be worth it, and quantization_type gives the same weights",
            SilentNoEffectWarning,
            stacklevel=2,
        )
    if ranks and not any(ranks.values()):
        warnings.warn(
            "adaptive_bits.ranks gave every byte to bits and no module a rank, so only the head is trained; raise "
            "total_byte_budget",
            SilentNoEffectWarning,
            stacklevel=2,
        )
    rise = sum(losses[name][place] for name, place in chosen_places.items())
    record = BitAllocation(
        images=len(images),
        budget_bytes=options.budget,
        spent_bytes=choice.size,
        types=types,
        ranks=ranks or None,
        losses={
            name: dict(zip(config.adaptive_bits.types, of_layer, strict=True)) for name, of_layer in losses.items()
        },
        predicted_rise=rise,
        predicted_gain=rise - choice.loss,
        gap=choice.loss - choice.lower_bound,
    )
    return ChosenBits.of_record(record, config)


def check_bits(config: QaLoraConfig, sites: Sequence[Site]) -> _Options:
    """Return what `adaptive_bits` chooses from, and its budget, checked against the shapes of the whole model."""
    settings = config.adaptive_bits
    assert settings is not None
    wanted = select_sites(sites, config.targets)
    check_ranks(wanted, 0, config.pool)
    formats = [format_of(config, type) for type in settings.types]
    modules = {name: site for name, site in fused_sites(sites).items() if name in {site.module for site in wanted}}
    format_bytes = {
        name: [format.stored_bytes(site.out_features, site.in_features) for format in formats]
        for name, site in modules.items()
    }
    rank_bytes = {}
    if settings.ranks:
        costs, ranks = rank_costs("bytes", wanted, pool=config.pool), largest_ranks(wanted, config.pool)
        for site, cost, rank in zip(wanted, costs.tolist(), ranks.tolist(), strict=True):
            rank_bytes[site.name] = [*range(0, cost * rank + 1, cost)]
    least, most = (sum(pick(group) for group in [*format_bytes.values(), *rank_bytes.values()]) for pick in (min, max))
    one_rank = min((group[1] for group in rank_bytes.values()), default=0)
    if settings.average_bits is not None:
        to_bits = 8 / sum(site.out_features * site.in_features for site in modules.values())
        field, given, lower, upper = "average_bits", settings.average_bits, least * to_bits, most * to_bits
        budget = math.floor(given / to_bits)
    else:
        assert settings.total_byte_budget is not None
        field, lower, upper = "total_byte_budget", least + one_rank, most
        given = budget = settings.total_byte_budget
    if not lower <= given < upper:
        smallest, largest = (", one rank", " and rank") if rank_bytes else ("", "")
        raise UserError(
            f"expected at least {lower:.10g} (every layer at the smallest type{smallest}) and less than {upper:.10g} "
            f"(at the largest{largest}), got {given}",
            field=f"qa_lora.adaptive_bits.{field}",
        )
    return _Options(formats, format_bytes, rank_bytes, budget)


@dataclass(frozen=True)
class BitsChoice:
    """A solution of the knapsack.

    Attributes:
        options: index of the option of each group.
        loss: total of the chosen options.
        size: total of the chosen options.
        lower_bound: no choice within the budget has a total loss below this. Equal to the loss, up to the accuracy of
            the solver (1e-12 of the sum of the groups' ranges of losses), unless it stopped at its limit of nodes.
    """

    options: tuple[int, ...]
    loss: float
    size: int
    lower_bound: float


def choose_bits(
    losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int, *, node_limit: int = _NODE_LIMIT
) -> BitsChoice:
    """Choose one option of each group, so that the total loss is least and the total size within the budget.

    Of options of one group that are worth the same, the smaller is taken, then the earlier; equal input gives equal
    choices.

    Args:
        losses: of each group's options, in any unit; a gain counts as a negative loss.
        sizes: of each group's options, integers of at least 0.
        budget: in the unit of the sizes; at least what the smallest options take.
        node_limit: of the search, after which the best choice so far is returned with the bound that was reached.

    Raises:
        ValueError: if a loss is not finite.
    """
    smallest = sum(min(group) for group in sizes)
    if not all(math.isfinite(loss) for group in losses for loss in group):
        raise ValueError("expected finite losses")
    useful = [_undominated(*group) for group in zip(losses, sizes, strict=True)]
    useful_losses = [np.array(group)[places] for group, places in zip(losses, useful, strict=True)]  # falling
    useful_sizes = [np.array(group)[places] for group, places in zip(sizes, useful, strict=True)]  # rising
    bound = math.fsum(group[-1] for group in useful_losses)
    chosen = [places[-1] for places in useful]  # the largest options, if they fit
    if sum(group[-1] for group in useful_sizes) > budget:
        # Losses and sizes are counted from those of the group's largest and smallest option, so that what differs
        # between choices is not lost beside what they share; sizes in their greatest common divisor.
        extra_loss = np.concatenate([group - group[-1] for group in useful_losses])  # (options,)
        extra_size = np.concatenate([group - group[0] for group in useful_sizes])
        most, unit = math.fsum(group[0] - group[-1] for group in useful_losses), math.gcd(*extra_size.tolist())
        owners = np.repeat(range(len(useful)), [len(places) for places in useful])  # (options,)
        of_group = (owners == np.arange(len(useful))[:, None]).astype(float)  # (groups, options)
        result = scipy.optimize.milp(
            extra_loss / most * _LOSS_SCALE,  # in this order: the losses may be as small as floats can be
            integrality=np.ones(len(owners)),
            bounds=(0, 1),
            constraints=[
                scipy.optimize.LinearConstraint(of_group, 1, 1),
                scipy.optimize.LinearConstraint((extra_size // unit)[None], 0, (budget - smallest) // unit),
            ],
            options={"mip_rel_gap": 0.0, "node_limit": node_limit},
        )
        if result.x is None:  # the smallest options always fit
            chosen = [places[0] for places in useful]
        else:
            chosen = np.concatenate(useful)[result.x > 0.5].tolist()
            bound += result.mip_dual_bound * (most / _LOSS_SCALE)
    size = sum(group[place] for group, place in zip(sizes, chosen, strict=True))
    assert size <= budget, "the solver's rounding left the budget"
    loss = math.fsum(group[place] for group, place in zip(losses, chosen, strict=True))
    return BitsChoice(tuple(chosen), loss, size, min(bound, loss))


def _undominated(losses: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Return the options from the smallest on, each with less loss than every smaller or equal one."""
    undominated: list[int] = []
    for place in sorted(range(len(sizes)), key=lambda place: (sizes[place], losses[place], place)):
        if not undominated or losses[place] < losses[undominated[-1]]:
            undominated.append(place)
    return undominated
