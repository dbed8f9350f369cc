"""What `training.memory_limit` makes of an experiment: micro-batches and blocks computed again, by measured steps."""

from __future__ import annotations

import math
from collections.abc import Callable

from peft_vit.backbones import BackboneShape, chosen
from peft_vit.config import BITS_OF_TYPE, ExperimentConfig, QaLoraConfig, StudyConfig, TrainingConfig, bytes_of
from peft_vit.costs.estimate import PROCESS_BYTES, Workload
from peft_vit.costs.memory_limit import Choice, Setting, StepCost, choose
from peft_vit.costs.proxy_run import miniature
from peft_vit.data import ImageIndex, Splits
from peft_vit.errors import UserError
from peft_vit.records import RunSpec, StudyFile

MeasureStep = Callable[[RunSpec], StepCost | None]  # of a run of a few steps; None: there was not enough memory

_STEPS = 3  # that are measured; the first one also allocates what the others find
_FIELD = "training.memory_limit"


def with_decided(study: StudyConfig, decide: Callable[[int, ExperimentConfig], TrainingConfig]) -> StudyConfig:
    """Return a study with what is decided of each undecided experiment's training; `decide` gets its place too."""
    experiments = [
        experiment.model_copy(update={"training": decide(place, experiment)})
        if experiment.training.is_undecided
        else experiment
        for place, experiment in enumerate(study.experiments)
    ]
    return study.model_copy(update={"experiments": tuple(experiments)})


def as_begun(study: StudyConfig, before: StudyFile | None) -> StudyConfig:
    """Return a study with what was chosen for its limits when it was begun, on whatever machine that was."""
    begun = {} if before is None else {one.name: one.training for one in before.configuration.experiments}

    def decide_again(_: int, experiment: ExperimentConfig) -> TrainingConfig:
        training, earlier = experiment.training, begun.get(experiment.name)
        if earlier is None or earlier.recomputed_blocks is None:
            return training
        return training.decided(training.micro_batch_size or earlier.images_at_once, earlier.recomputed_blocks)

    return with_decided(study, decide_again)


def unmeasured(study: StudyConfig, shape: BackboneShape) -> StudyConfig:
    """Return a study, of which nothing is measured, with as many blocks computed again as saves anything."""

    def decide_blindly(_: int, experiment: ExperimentConfig) -> TrainingConfig:
        training = experiment.training
        return training.decided(training.images_at_once, training.recomputed_of(len(shape.values_by_block)))

    return with_decided(study, decide_blindly)


def decide(
    spec: RunSpec, total_steps: int, workload: Workload, index: ImageIndex, splits: Splits, measure_step: MeasureStep
) -> tuple[TrainingConfig, Choice]:
    """Return an experiment's training with the fastest setting that keeps within its limit, and what that costs.

    The limit counts all resident memory of the process that does a run, Python and its libraries included.

    Args:
        spec: of a run that is still undecided.
        total_steps: of the run.
        workload: of its study.
        index: its images.
        splits: of the images.
        measure_step: does a few steps of a run in a process of its own.

    Raises:
        UserError: if nothing fits, with the least that would.
    """
    training = spec.experiment.training
    assert training.memory_limit is not None
    limit = bytes_of(training.memory_limit)
    if workload.device.type != "cpu":
        raise UserError(
            f"is measured on the CPU alone, and runs go to {workload.device.type} here; set device: cpu, or remove it "
            "and set micro_batch_size and activation_checkpointing",
            field=_FIELD,
        )
    model = model_bytes(spec.experiment, workload.shape)
    if limit <= model:
        raise UserError(
            f"{training.memory_limit} is less than the model alone, {_mb(model)}; a training process takes about "
            f"{_mb(PROCESS_BYTES + model)} at least",
            field=_FIELD,
        )

    def measure(setting: Setting) -> StepCost | None:
        """Measure a run of a few steps that takes as much memory as the whole run would with a setting.

        The head starts as it does in the run: its probe's batches are of a size of their own.
        """
        decided = training.decided(setting.images, setting.recomputed)
        whole = spec.model_copy(update={"experiment": spec.experiment.model_copy(update={"training": decided})})
        small = miniature(whole, total_steps, workload.shape, index, splits, at_most=_STEPS)
        few_steps = small.experiment.training.model_copy(update={"head_start": training.head_start})
        few = max(2 * len(index.class_names), setting.images, spec.measures.removal_images or 0)
        images = {
            name: min(few, asked)
            for name in ("validation_images", "test_images")
            if (asked := getattr(small.data, name)) is not None
        }
        changes = {
            "experiment": small.experiment.model_copy(update={"training": few_steps}),
            "data": small.data.model_copy(update=images),
        }
        return measure_step(small.model_copy(update=changes))

    choice = choose(
        limit, training.batch_size, workload.shape.values_by_block, measure, images=training.micro_batch_size
    )
    if choice is None:
        raise UserError(
            f"{training.memory_limit}: not even a step of {_said(Setting(1, 0), workload.shape)} could be measured in "
            "the memory that is free here",
            field=_FIELD,
        )
    if not choice.fits:
        raise UserError(
            f"{training.memory_limit} is too little; the least that fits is "
            f"{math.ceil(choice.cost.peak_bytes / 1e6)}MB, with {_said(choice.setting, workload.shape)}: "
            f"{_mb(choice.cost.model_bytes)} of it is the model",
            field=_FIELD,
        )
    return training.decided(choice.setting.images, choice.setting.recomputed), choice


def line(experiment: ExperimentConfig, choice: Choice, shape: BackboneShape) -> str:
    """Return what was chosen for an experiment, and its price."""
    cost, free = choice.cost, choice.free_cost
    own = "" if cost.own_bytes is None else f", {_mb(cost.own_bytes)} of it beyond Python and its libraries"
    taken = (
        f"{experiment.name}, memory_limit {experiment.training.memory_limit}: {_said(choice.setting, shape)}. "
        f"Measured: {_mb(cost.peak_bytes)} in all{own}, {cost.step_s:.2f} s a step"
    )
    if choice.setting == choice.free:
        return f"{taken}; the limit is not reached."
    without = _said(choice.free, shape)
    if free is None:
        return f"{taken}; for {without}, there is not enough memory here."
    return f"{taken}, {cost.step_s / free.step_s:.2f} of that with {without}, which takes {_mb(free.peak_bytes)}."


def _said(setting: Setting, shape: BackboneShape) -> str:
    images = "1 image" if setting.images == 1 else f"{setting.images} images"
    blocks = len(shape.values_by_block)
    again = f"{setting.recomputed} of {blocks} blocks" if setting.recomputed else "no block"
    return f"{images} at a time, {again} computed again"


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def model_bytes(experiment: ExperimentConfig, shape: BackboneShape) -> int:
    """Return the bytes below which a model's weights can't be kept: packed ones without scales, the others in float."""
    qa_lora = experiment.section(QaLoraConfig)
    if qa_lora is None:
        return 4 * shape.parameters
    types = [qa_lora.quantization_type] if qa_lora.adaptive_bits is None else qa_lora.adaptive_bits.types
    bits = min(BITS_OF_TYPE[one] for one in types if one is not None)
    packed = sum(site.in_features * site.out_features for site in chosen(shape.sites, qa_lora.targets))
    return packed * bits // 8 + 4 * (shape.parameters - packed)
