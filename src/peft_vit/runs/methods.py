"""From a method's configuration to a prepared model and its hooks: the only list of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from peft_vit.adapters import attach_adapters, freeze_backbone, saved_formats, saved_ranks
from peft_vit.adapters.peft_files import read_peft
from peft_vit.adapters.peft_format import import_peft
from peft_vit.adapters.peft_library import attach_peft_lora, require_peft
from peft_vit.allocation import (
    AdaLoRAController,
    Bounds,
    BudgetSchedule,
    bounds_for,
    costs_for,
    even_ranks,
    schedule_for,
)
from peft_vit.backbones import BackboneShape, Site, chosen, find_sites, fused_sites, whole_modules
from peft_vit.config import SECTIONS, AdaLoraConfig, ExperimentConfig, LoraConfig, QaLoraConfig
from peft_vit.errors import UserError
from peft_vit.quantization import QuantizationFormat
from peft_vit.training import (
    AllocationHook,
    PeftAdaLoraHook,
    QALoRATrainer,
    RunHook,
    check_bits,
    check_rank,
    end_step,
    last_update,
)


def prepare(
    model: nn.Module,
    experiment: ExperimentConfig,
    *,
    total_steps: int,
    seed: int,
    formats: Mapping[str, QuantizationFormat] | None = None,
    ranks: Mapping[str, int] | None = None,
) -> list[RunHook]:
    """Make the model trainable as the method says, in place, and return what the loop has to call.

    Args:
        model: a plain one, from `load_backbone`.
        experiment: which method, and its settings.
        total_steps: of the run.
        seed: of the run.
        formats: of quantized weights, by module, where `adaptive_bits` has chosen them or a file says so.
        ranks: likewise by site, where `adaptive_bits` chooses ranks.
    """
    if experiment.lora is not None:
        _prepare_lora(model, experiment.lora, seed)
        return []
    if experiment.peft_lora is not None:
        attach_peft_lora(model, experiment.peft_lora, seed=seed)
        return []
    if experiment.peft_adalora is not None:
        return [PeftAdaLoraHook(model, experiment.peft_adalora, total_steps, seed=seed)]
    hooks: list[RunHook] = []
    if experiment.adalora is not None:  # first: in `before_step` it scores what the trainer then scales
        config, pool = pooled(experiment.adalora, experiment.qa_lora)
        hooks.append(AllocationHook(AdaLoRAController(model, config, total_steps, seed=seed, pool=pool)))
    if experiment.is_probe and experiment.qa_lora is not None:
        ranks = dict.fromkeys((site.name for site in find_sites(model, experiment.qa_lora.targets)), 0)
    if experiment.qa_lora is not None:
        hooks.append(QALoRATrainer(model, experiment.qa_lora, total_steps, seed=seed, formats=formats, ranks=ranks))
    if experiment.is_probe:
        freeze_backbone(model)
    return hooks  # full: everything is trainable as it is


def prepare_as_saved(
    model: nn.Module, experiment: ExperimentConfig, file: Path, *, total_steps: int, seed: int
) -> list[RunHook]:
    """Do as `prepare`, with the formats and ranks that `adaptive_bits` chose for a run, out of its adapter file."""
    qa_lora = experiment.qa_lora
    if qa_lora is None or qa_lora.adaptive_bits is None:
        return prepare(model, experiment, total_steps=total_steps, seed=seed)
    return prepare(
        model,
        experiment,
        total_steps=total_steps,
        seed=seed,
        formats=saved_formats(file),
        ranks=saved_ranks(file) if qa_lora.adaptive_bits.ranks else None,
    )


def pooled(adalora: AdaLoraConfig, qa_lora: QaLoraConfig | None) -> tuple[AdaLoraConfig, int]:
    """Return the settings of adaptive ranks, and the inputs that adapters pool: on quantized sites these decide."""
    if qa_lora is None:
        return adalora, 1
    return adalora.model_copy(update={"scale": qa_lora.scale, "targets": qa_lora.targets}), qa_lora.pool


def _prepare_lora(model: nn.Module, config: LoraConfig, seed: int) -> None:
    if config.start is not None:
        import_peft(model, Path(config.start), seed=seed, fresh_head=True)
        return
    assert config.rank is not None
    sites = find_sites(model, config.targets)
    attach_adapters(model, sites, dict.fromkeys((s.name for s in sites), config.rank), scale=config.scale, seed=seed)


_FEWEST_ONE_CYCLE_STEPS = 4  # below, one_cycle starts or ends the run at its lowest rate


def check(experiment: ExperimentConfig, shape: BackboneShape, total_steps: int, train_images: int) -> None:
    """Refuse what `prepare` or the run would refuse later, from the backbone's shape and two numbers alone.

    Raises:
        UserError: with the field below the experiment.
    """
    if (
        not experiment.is_probe
        and experiment.training.schedule == "one_cycle"
        and total_steps < _FEWEST_ONE_CYCLE_STEPS
    ):
        raise UserError(
            f"{total_steps} steps are too few for schedule one_cycle; train longer or use schedule: constant",
            field="training.epochs",
        )
    for section in SECTIONS.get(experiment.method, ()):
        _check_targets(section, getattr(experiment, section).targets, shape)
    if experiment.lora is not None:
        _check_lora(experiment.lora, shape)
    if experiment.peft_lora is not None:
        require_peft()
        _check_fused("peft_lora.rank", shape, experiment.peft_lora.targets, experiment.peft_lora.rank)
    if experiment.peft_adalora is not None:
        require_peft()
        peft_adalora = experiment.peft_adalora
        _check_fused("peft_adalora.initial_rank", shape, peft_adalora.targets, peft_adalora.initial_rank)
        last_update(peft_adalora, total_steps)
    if experiment.qa_lora is not None:
        adaptive = experiment.qa_lora.adaptive_bits
        ranks_are_chosen = (
            experiment.is_probe or experiment.adalora is not None or (adaptive is not None and adaptive.ranks)
        )
        rank = 0 if ranks_are_chosen else experiment.qa_lora.fixed_rank
        for site in chosen(shape.sites, experiment.qa_lora.targets):
            _check_rank("qa_lora.rank", site, rank, experiment.qa_lora.pool)
        end_step(experiment.qa_lora, total_steps)
        if adaptive is not None:
            check_bits(experiment.qa_lora, shape.sites)
            if adaptive.calibration_images > train_images:
                raise UserError(
                    f"{adaptive.calibration_images} are more than the {train_images} training images; lower it",
                    field="qa_lora.adaptive_bits.calibration_images",
                )
    if experiment.adalora is not None:
        rank_course(*pooled(experiment.adalora, experiment.qa_lora), shape, total_steps)


def _check_lora(config: LoraConfig, shape: BackboneShape) -> None:
    if config.rank is not None:
        for site in chosen(shape.sites, config.targets):
            _check_rank("lora.rank", site, config.rank, 1)
    if config.start is not None:
        try:
            read_peft(Path(config.start), fused_sites(shape.sites), None)
        except UserError as error:
            raise UserError(str(error), field="lora.start") from None


def _check_targets(section: str, targets: Sequence[str], shape: BackboneShape) -> None:
    """Refuse kinds of matrices that the model lacks, and for PEFT parts of a fused one alone."""
    try:
        (whole_modules if section.startswith("peft") else chosen)(shape.sites, targets)
    except UserError as error:
        raise UserError(error.message, field=f"{section}.targets") from None


def _check_fused(field: str, shape: BackboneShape, targets: Sequence[str], rank: int) -> None:
    for site in whole_modules(shape.sites, targets).values():
        _check_rank(field, site, rank, 1)


@dataclass(frozen=True)
class RankCourse:
    """What is known of adaptive ranks before the run: the sites, what a rank of each costs and may be, the budget."""

    sites: list[Site]
    costs: NDArray[np.int64]  # of one rank, in the unit of the budget
    bounds: Bounds
    schedule: BudgetSchedule

    def even_ranks(self, budget: int) -> dict[str, int]:
        """Return equal ranks within a budget, by site: those that a run starts with."""
        ranks = even_ranks(budget, self.bounds, self.costs)
        return {site.name: int(rank) for site, rank in zip(self.sites, ranks, strict=True)}


def rank_course(adalora: AdaLoraConfig, pool: int, shape: BackboneShape, total_steps: int) -> RankCourse:
    """Return the course of adaptive ranks, with the settings and the pool of `pooled`.

    Raises:
        UserError: if the budget does not fit the sites, or the schedule the steps.
    """
    sites = chosen(shape.sites, adalora.targets)
    shapes = [(site.in_features // pool, site.out_features) for site in sites]
    costs = costs_for(adalora, shapes, [site.tokens for site in sites])
    bounds = bounds_for(adalora, [min(sides) for sides in shapes], costs)
    return RankCourse(sites, costs, bounds, schedule_for(adalora, total_steps, bounds, costs))


def _check_rank(field: str, site: Site, rank: int, pool: int) -> None:
    try:
        check_rank(site.name, site.in_features, site.out_features, rank, pool)
    except UserError as error:
        raise UserError(error.message, field=error.field if error.field != "rank" else field) from None
