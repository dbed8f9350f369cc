"""What a method of fine-tuning does: it prepares a model, refuses what would fail, and chooses for `peft-vit train`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from peft_vit.base.errors import UserError
from peft_vit.core.allocation import rank_costs
from peft_vit.core.backbones import BackboneShape, Site, select_modules, select_sites
from peft_vit.core.config import AdapterConfig, ExperimentConfig, Frozen, QuantizationType
from peft_vit.core.training import Hook
from peft_vit.core.training.quantized_layers import Formats, PackedTensors

DEFAULT_RANK = 8  # of `peft-vit train`
_FEWEST_STEPS = 12  # with which it takes adaptive ranks
Sections: TypeAlias = dict[str, dict[str, Any]]  # settings by section of an experiment


@dataclass(frozen=True)
class PrepareContext:
    """Inputs of `Method.prepare`, beside model and experiment.

    Attributes:
        total_steps: of the run.
        seed: of the run.
        formats: of quantized weights, by module, where `adaptive_bits` has chosen them or a file says so.
        ranks: by site, where `adaptive_bits` chooses them.
        calibration: gives so many training images (N, C, H, W), where the start of training depends on data.
        module_ranks: instead of such a start, the ranks of a saved run by module.
        packed: packed weights of a saved run, tensors by layer, where they depend on data.
    """

    total_steps: int
    seed: int
    formats: Formats | None = None
    ranks: Mapping[str, int] | None = None
    calibration: Callable[[int], Tensor] | None = None
    module_ranks: Mapping[str, int] | None = None
    packed: PackedTensors | None = None


@dataclass(frozen=True)
class TrainOptions:
    """Options of `peft-vit train` that a method's settings depend on.

    Attributes:
        rank: of each matrix.
        budget: over all matrices, in `budget_unit`; bytes are those of the values in float32.
        steps: of the run.
        shape: of the backbone.
        adapter_bytes: of the updates' values in their file, in as few bits as the method finds best.
        bits: number format of frozen weights that are packed.
    """

    rank: int | None
    budget: int | None
    steps: int
    shape: BackboneShape
    budget_unit: Literal["ranks", "bytes"] = "ranks"
    adapter_bytes: int | None = None
    bits: QuantizationType = "nf4"

    @property
    def below_one_rank_a_matrix(self) -> bool:
        """Whether the budget is too small for one rank on each matrix."""
        if self.adapter_bytes is not None:
            return self.adapter_bytes < int(rank_costs("bytes", self.shape.sites, bits=1).sum())
        if self.budget is None:
            return False
        return self.budget < int(rank_costs(self.budget_unit, self.shape.sites).sum())

    def check_steps(self) -> None:
        """Refuse fewer steps than adaptive ranks need."""
        if self.steps < _FEWEST_STEPS:
            raise UserError(f"{self.steps} steps are too few to move ranks; give more", field="--steps")


@dataclass(frozen=True, kw_only=True)
class Method:
    """The behaviour of a method in a run; its settings and title are a `MethodKind` of `config`.

    Attributes:
        prepare: makes a plain model trainable, in place, and returns what the loop has to call.
        check: refuses what `prepare` or the run would refuse later, from shapes and numbers alone (UserError).
        shorten: returns the sections with schedules of `total_steps` that fit `steps`, deciding every `every` steps at
            most; for smoke runs and measurements of cost.
        defaults: the sections that `peft-vit train` takes.
        learning_rate: that `peft-vit train` takes: at the plateau, from the probe's head on, about half of what pilots
            chose as the peak of one cycle.
        few_ranks_learning_rate: learning rate where the budget is below one rank a matrix; None: the same.
        forward_passes: that a step takes as long as: the weights, for its input, for their own gradients.
        bytes_per_weight: of the backbone's weights, gradients and moments; None: frozen, and as the precision has it.
        uses_peft: whether the PEFT library has to be there.
        why_not_peft: why its adapter can't be exported to the PEFT library; empty if it can.
    """

    prepare: Callable[[nn.Module, ExperimentConfig, PrepareContext], list[Hook]] = lambda *_: []
    check: Callable[[ExperimentConfig, BackboneShape, int, int], None] = lambda *_: None
    shorten: Callable[[ExperimentConfig, int, int, int], dict[str, Frozen]] = lambda *_: {}
    defaults: Callable[[TrainOptions], Sections] = lambda _: {}
    learning_rate: float = 1e-3
    few_ranks_learning_rate: float | None = None
    forward_passes: float = 2.0
    bytes_per_weight: int | None = None
    uses_peft: bool = False
    why_not_peft: str = ""

    def learning_rate_for(self, options: TrainOptions) -> float:
        """Return the learning rate that `peft-vit train` takes."""
        few = self.few_ranks_learning_rate if options.below_one_rank_a_matrix else None
        return self.learning_rate if few is None else few


def sites_of(section: str, settings: AdapterConfig, shape: BackboneShape, *, modules: bool = False) -> list[Site]:
    """Return the sites that a section's `targets` names, or whole modules, as PEFT adapts them.

    Raises:
        UserError: if it names kinds of matrices that the model lacks.
    """
    try:
        if modules:
            return list(select_modules(shape.sites, settings.targets).values())
        return select_sites(shape.sites, settings.targets)
    except UserError as error:
        raise UserError(error.message, field=f"{section}.targets") from None


def check_images(field_name: str, images: int | None, train_images: int) -> None:
    """Refuse more calibration images than there are to train on.

    Raises:
        UserError: with the field, below the experiment.
    """
    if images is not None and images > train_images:
        raise UserError(f"{images} are more than the {train_images} training images; lower it", field=field_name)
