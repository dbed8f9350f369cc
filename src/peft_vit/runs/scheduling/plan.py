"""From a study to its runs: everything is checked, counted and estimated here, before any expensive work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch

from peft_vit.base.errors import UserError, named
from peft_vit.core.adapters.peft_format import peft_sha256
from peft_vit.core.backbones import architecture_of, check_weights, describe, interpolation_of
from peft_vit.core.config import (
    USUAL_TASK,
    AdaLoraConfig,
    BackboneConfig,
    ClassWeights,
    ExperimentConfig,
    Precision,
    QaLoraConfig,
    StudyConfig,
    TrainingConfig,
)
from peft_vit.core.methods import check, shorten
from peft_vit.core.records import RunSpec, StudyFile
from peft_vit.core.tasks import TASKS, Task
from peft_vit.core.training.images import check_augmentation
from peft_vit.data import ImageIndex, Splits, class_gaps, image_warnings, make_splits, open_index, smoke_config
from peft_vit.runs.costs.calibration_run import calibration_run
from peft_vit.runs.costs.estimate import EstimateRequest, MeasuredCost, MeasureSteps, Workload, estimate_runs
from peft_vit.runs.costs.memory_limit import (
    MeasureStep,
    MemoryChoice,
    as_begun,
    decide_memory,
    unmeasured,
    with_decided,
)
from peft_vit.runs.planned import Plan, PlannedRun
from peft_vit.runs.records.storage import ADAPTER_FILE, RECORD_FILE, read_record, read_study_file, run_folder
from peft_vit.runs.scheduling.scheduler import difference, go_on, study_file
from peft_vit.runs.this_machine import kept_products
from peft_vit.runs.this_machine.machine import ChosenPrecision, choose_precision, resolve_device

_SMOKE_EPOCHS, _SMOKE_STEPS = 2, 4  # of an epoch
_ENDLESS = 10**9  # steps; beside them each phase of a schedule that a study gives in steps is as short as it can be
_SMOKE_CALIBRATION = 16  # images; no smoke study has fewer to train on


def plan_study(
    study: StudyConfig,
    results_dir: Path,
    *,
    file: Path | None,
    smoke: bool = False,
    part: bool = False,
    measure: MeasureSteps | None = None,
    measure_step: MeasureStep | None = None,
) -> Plan:
    """Check a study against its backbone and its data, and plan its runs.

    Args:
        study: from `config.load_study`.
        results_dir: where records lie; runs that are done there are not planned again.
        file: the configuration file, named in errors; None: there is none.
        smoke: compress the study, see `smoke_study`.
        part: the results directory may hold other experiments and seeds of this study.
        measure: measures what runs cost of which nothing is known yet; None: they are estimated. See `measure_costs`.
        measure_step: measures the steps among which a `memory_limit` chooses; None: it is refused if there is one.

    Raises:
        UserError: for anything that would fail later, with file, field and remedy; and if the results directory
            holds a study of this name that was configured otherwise, with the difference.
    """
    with named(file):
        before = read_study_file(results_dir / study.name)
        if smoke:
            study = smoke_study(study, describe(study.backbone, study.data.image_size).size_step)
            study = unmeasured(study, describe(study.backbone, study.data.image_size))
        pretrained_with = interpolation_of(architecture_of(study.backbone))
        if study.data.interpolation is None and pretrained_with != "bicubic":
            data = study.data.model_copy(update={"interpolation": pretrained_with})
            study = study.model_copy(update={"data": data})
        precision = decide_precision(study, before)
        study = as_begun(study.model_copy(update={"precision": precision.chosen}), before)
        study, compute_note = _with_compute(study, before, smoke=smoke)
        index = open_index(study.data, smoke=smoke)
        study = _settled(study, index)
        requested = study_file(study, (), smoke=smoke, data_sha256=index.sha256)
        go_on(results_dir / study.name, before, requested, source=str(file or "asked for"), part=part)
        splits = splits_of(index, study)
        first = splits[study.seeds[0]]
        workload = workload_of(study, index, first)
        for place, experiment in enumerate(study.experiments):
            with _below(place):
                check(experiment, workload.shape, experiment.total_steps(workload.train), workload.train)
                check_augmentation(experiment.training.augmentation, index.channels)
        study, choices = _within_memory(study, workload, index, first, measure_step)
        wanted = []
        for place, experiment in enumerate(study.experiments):
            steps = experiment.total_steps(workload.train)
            spec = spec_of(study, place, study.seeds[0], smoke=smoke)
            kind = calibration_run(spec, steps, workload.shape, index, first)
            digest = kind.digest()
            for seed in study.seeds:
                spec = spec_of(study, place, seed, smoke=smoke)
                wanted.append(EstimateRequest(spec, steps, kind, digest, _taken(results_dir, spec, index.sha256)))
        notices: list[str] = []
        if any(run.taken is None for run in wanted):
            notices = _slow_products([run.spec for run in wanted if run.taken is None], workload.device, before)
            _refuse_other_weights(wanted, check_weights(study.backbone), results_dir)
            notices += _notices(index, study, splits)
        runs = []
        for run, estimate in zip(wanted, estimate_runs(wanted, workload, None if smoke else measure), strict=True):
            choice = choices.get(run.spec.experiment.name)
            if choice is not None and estimate.basis == "estimate":  # its memory was measured for the limit
                estimate = replace(estimate, peak_memory_bytes=choice.cost.peak_bytes)  # noqa: PLW2901
            runs.append(PlannedRun(run.spec, run.steps, estimate, done=run.taken is not None))
        blocks = len(workload.shape.values_by_block)
        limited = [experiment for experiment in study.experiments if experiment.name in choices]
        return Plan(
            study,
            file,
            index.licence,
            index.sha256,
            tuple(runs),
            precision,
            compute_note,
            part=part,
            notices=tuple(notices),
            before=before,
            memory=tuple(choices[experiment.name].line(experiment, blocks) for experiment in limited),
        )


def _with_compute(study: StudyConfig, before: StudyFile | None, *, smoke: bool) -> tuple[StudyConfig, str | None]:
    """Return the study with what frozen layers multiply, and a line on what was decided now.

    It is what they multiplied when the study was begun, on whatever machine that was, so that all its runs are alike;
    of a new study what is faster here. Any exact product may compute it.
    """
    begun = {} if before is None else {own.name: own for own in before.configuration.experiments}
    others = [own for own in begun.values() if not own.kind.without_integers]
    experiments, note = [], None
    for own in study.experiments:
        training, earlier = own.training, begun.get(own.name) or next(iter(others), None)
        compute, bits = training.compute, training.integer_bits
        if compute == "auto" and (smoke or own.kind.without_integers):
            compute = "float"
        elif earlier is not None and compute in ("auto", earlier.training.compute):
            compute, bits = earlier.training.compute, bits or earlier.training.integer_bits
        elif compute != "float":
            choice = kept_products.choose_product(resolve_device(study.device), cast(Precision, study.precision), bits)
            if compute == "auto":
                compute = "int8" if choice.is_faster else "float"
                note = f"compute: auto is {compute}: {choice.times}" if choice.matmul else None
            bits = choice.matmul.bits if choice.matmul else bits
        update = {"compute": compute, "integer_bits": bits if compute == "int8" else None}
        experiments.append(own.model_copy(update={"training": training.model_copy(update=update)}))
    return study.model_copy(update={"experiments": tuple(experiments)}), note


def _slow_products(pending: Sequence[RunSpec], device: torch.device, before: StudyFile | None) -> list[str]:
    """Return a line where products of integers that runs need are slower than those of floats.

    Raises:
        UserError: if this machine has none, or such slow ones that nobody would wait for them.
    """
    lines = []
    kinds = {(spec.precision, spec.experiment.training.integer_bits) for spec in pending if spec.multiplies_integers}
    for precision, bits in kinds:
        choice = kept_products.choose_product(device, precision, bits)
        remedy = "use float"
        if before is not None:
            remedy = "continue where the study was begun, or use float and another --output"
        choice.usable(device, remedy=remedy)
        if choice.seconds > choice.float_s:
            lines.append(f"training.compute: int8 is slower than float here: {choice.times}")
    return lines


@contextmanager
def _below(place: int) -> Iterator[None]:
    """Name the experiment whose setting an error is about."""
    try:
        yield
    except UserError as error:
        if error.field is None:  # about a file, such as a broken image
            raise
        raise UserError(error.message, file=error.file, field=f"experiments[{place}].{error.field}") from None


def _within_memory(
    study: StudyConfig, workload: Workload, index: ImageIndex, splits: Splits, measure_step: MeasureStep | None
) -> tuple[StudyConfig, dict[str, MemoryChoice]]:
    """Return the study with what keeps within every limit, and what was chosen now, by the names of experiments."""
    choices: dict[str, MemoryChoice] = {}

    def decide_measured(place: int, experiment: ExperimentConfig) -> TrainingConfig:
        check_weights(study.backbone)
        spec, steps = spec_of(study, place, study.seeds[0]), experiment.total_steps(len(splits.train))
        with _below(place):
            if measure_step is None:
                raise UserError("is kept by measured steps, and none are done here", field="training.memory_limit")
            training, choices[experiment.name] = decide_memory(spec, steps, workload, index, splits, measure_step)
        return training

    return with_decided(study, decide_measured), choices


def _settled(study: StudyConfig, index: ImageIndex) -> StudyConfig:
    """Return the study with its task, and what `metric: auto` is for these images, those of their own test left out.

    Raises:
        UserError: for what the task does not have.
    """
    _refuse_of_classes(study, index.task)
    if index.task is not TASKS[study.data.task or USUAL_TASK]:
        study = study.model_copy(update={"data": study.data.model_copy(update={"task": index.task.name})})
    chosen_on = np.arange(len(index.labels)) if index.official_test is None else np.flatnonzero(~index.official_test)
    settled = {"metric": index.task.deciding(index.class_counts(chosen_on)).name}
    experiments = (
        own.model_copy(update={"training": own.training.model_copy(update=settled)})
        if own.training.metric == "auto"
        else own
        for own in study.experiments
    )
    study = study.model_copy(update={"experiments": tuple(experiments)})
    for place, own in enumerate(study.experiments):
        with _below(place):
            index.task.check(own.training)
    return study


def _refuse_of_classes(study: StudyConfig, task: Task) -> None:
    """Refuse what is there for one class an image alone, of other tasks."""
    of_classes: dict[str, object] = {"measures.removal_images": study.measures.removal_images is not None}
    for place, own in enumerate(study.experiments):
        qa_lora, adalora = own.section(QaLoraConfig), own.section(AdaLoraConfig)
        of_classes |= {
            f"experiments[{place}].training.label_smoothing": own.training.label_smoothing,
            f"experiments[{place}].qa_lora.adaptive_bits": qa_lora is not None and qa_lora.adaptive_bits,
            f"experiments[{place}].adalora.importance_metric": adalora and adalora.importance_metric == "fisher",
        }
    for field in (field for field, asked in of_classes.items() if asked):
        task.need_one_class(field)


def workload_of(study: StudyConfig, index: ImageIndex, splits: Splits) -> Workload:
    """Return what all runs of a study share, whose precision is decided."""
    return Workload(
        shape=describe(study.backbone, study.data.image_size),
        image_size=study.data.image_size,
        channels=index.channels,
        device=resolve_device(study.device),
        precision=cast(Precision, study.precision),
        threads=study.threads,
        train=len(splits.train),
        validation=len(splits.validation),
        test=len(splits.test),
    )


def decide_precision(study: StudyConfig, before: StudyFile | None) -> ChosenPrecision:
    """Return the precision of a study's runs: the one that it was begun with, or what `auto` is on this machine."""
    device = resolve_device(study.device)
    return choose_precision(study.precision, None if before is None else before.configuration.precision, device)


def splits_of(index: ImageIndex, study: StudyConfig) -> dict[int, Splits]:
    """Return every seed's splits, or the first one's if all share them; sizes agree, but one may lack a class."""
    drawn = {study.seeds[0]: make_splits(index, study.data, study.seeds[0])}
    if study.data.tests_by_seed or study.data.train_subset == "per_seed":
        for seed in study.seeds[1:]:
            try:
                drawn[seed] = make_splits(index, study.data, seed)
            except UserError as error:
                raise UserError(f"with seed {seed}: {error.message}", field=error.field) from None
    return drawn


def _notices(index: ImageIndex, study: StudyConfig, splits: dict[int, Splits]) -> list[str]:
    """Return what to know of the images: of every split which classes it lacks, of the first one copies too.

    And whether some experiments are fitted to images that the others see changed.
    """
    seeds_of: dict[str, list[int]] = {}
    for seed, drawn in splits.items():
        first = seed == study.seeds[0]
        for text in image_warnings(index, drawn, study.data.image_size) if first else class_gaps(index, drawn):
            seeds_of.setdefault(text, []).append(seed)
    notices = list(seeds_of)
    if len(splits) > 1:
        notices = [f"{text} (seen with seed {', '.join(map(str, seeds))})" for text, seeds in seeds_of.items()]
    for how in dict.fromkeys(experiment.training.class_weights for experiment in study.experiments):
        if how != "none":
            notices.append(_weights_line(index, splits[study.seeds[0]].train, how))
    probes = [experiment.name for experiment in study.experiments if experiment.is_probe]
    augmentation = [change for experiment in study.experiments for change in experiment.training.augmentation]
    changes = dict.fromkeys(change.name for change in augmentation if change.flip is None)
    if probes and changes:
        notices.append(f"augmentation: of its changes only flips reach {', '.join(probes)}, not {', '.join(changes)}")
    return notices


def _weights_line(index: ImageIndex, train: np.ndarray, how: ClassWeights) -> str:
    """Return which class weighs most in the loss, and which least."""
    weights = index.task.loss_weights(index.class_counts(train), how)
    ends = (f"'{index.class_names[k]}' {weights[k]:.2g}" for k in (weights.argmax(), weights.argmin()))
    return f"class weights in the loss, {how}: from {' to '.join(ends)}"


def spec_of(study: StudyConfig, place: int, seed: int, *, smoke: bool = False) -> RunSpec:
    """Return what a run of a study, whose precision is decided, is specified by; `place` is its experiment's."""
    return RunSpec(
        study=study.name,
        seed=seed,
        experiment=study.experiments[place],
        backbone=study.backbone,
        data=study.data,
        device=study.device,
        precision=cast(Precision, study.precision),
        threads=study.threads,
        smoke=smoke,
        measures=study.measures,
    )


def _refuse_other_weights(runs: Sequence[EstimateRequest], sha256: str | None, results_dir: Path) -> None:
    """Refuse to go on beside runs that were done with what the file of the weights held before."""
    for run in runs:
        if run.taken is not None and sha256 not in (None, run.taken.weights_sha256):
            file = run_folder(results_dir, run.spec) / RECORD_FILE
            raise UserError("was made with other weights under the same path; choose another --output", file=file)


def _taken(results_dir: Path, spec: RunSpec, data_sha256: str) -> MeasuredCost | None:
    """Return what a finished run took; one that failed or lost its adapter is run again, a changed one refused."""
    file = run_folder(results_dir, spec) / RECORD_FILE
    if not file.exists():
        return None
    record = read_record(file)
    if record.status != "done" or not (file.parent / ADAPTER_FILE).exists():
        return None
    if record.spec != spec:
        old, new = (own.model_dump(mode="json", exclude_none=True) for own in (record.spec, spec))
        raise UserError(
            "was made with another configuration, see below; "
            "give the study or the experiment another name, or choose another --output",
            file=file,
            details=difference(old, new, str(file), "asked for"),
        )
    if record.spec_digest != spec.digest():
        reason = "was made with a setting that this version does not have; choose another --output"
        raise UserError(reason, file=file, field="spec_digest")
    if record.provenance is not None and record.provenance.data_sha256 != data_sha256:
        raise UserError("was made with other images under the same path; choose another --output", file=file)
    start = spec.experiment.start
    if start and record.provenance is not None and record.provenance.start_sha256 != peft_sha256(Path(start)):
        raise UserError("was made with another adapter under the same path; choose another --output", file=file)
    return MeasuredCost.of(record)


# --- any study, compressed into seconds: random weights, made-up images, a handful of steps ------------------------


def smoke_study(study: StudyConfig, patch_size: int) -> StudyConfig:
    """Return the same study, small enough for a test. Its records say that they are smoke records.

    Every experiment keeps its method and its settings; only schedules, images, batches, seeds and threads shrink.
    Where bf16 is asked for the machine decides, so that no smoke study waits for emulated products.
    """
    data = smoke_config(study.data, patch_size)
    assert data.train_images is not None
    batch_size = -(-data.train_images // _SMOKE_STEPS)
    return study.model_copy(
        update={
            "seeds": study.seeds[:1],
            "backbone": BackboneConfig(library=study.backbone.library, model=study.backbone.model, weights="random"),
            "threads": 1,  # products this small only wait for a second thread, for minutes if the machine is busy
            "precision": "auto" if study.precision == "bf16" else study.precision,
            "data": data,
            "experiments": tuple(_compressed(experiment, batch_size) for experiment in study.experiments),
            "stopping": None,  # one seed
        }
    )


def _compressed(experiment: ExperimentConfig, batch_size: int) -> ExperimentConfig:
    training = experiment.training.with_batch_size(batch_size)
    if not experiment.is_probe:
        whole = dict.fromkeys(("steps", "validate_every", "patience", "warmup_share"))
        training = training.model_copy(update={"epochs": _SMOKE_EPOCHS, **whole})
    short = shorten(experiment, _ENDLESS, _SMOKE_EPOCHS * _SMOKE_STEPS)
    update: dict[str, object] = {"training": training}
    qa_lora = short.section(QaLoraConfig)
    if qa_lora is not None and qa_lora.adaptive_bits is not None:
        few = min(qa_lora.adaptive_bits.calibration_images, _SMOKE_CALIBRATION)
        bits = qa_lora.adaptive_bits.model_copy(update={"calibration_images": few})
        update["qa_lora"] = qa_lora = qa_lora.model_copy(update={"adaptive_bits": bits})
    if qa_lora is not None and qa_lora.rounding == "gptq":
        update["qa_lora"] = qa_lora.model_copy(update={"calibration_images": _SMOKE_CALIBRATION})
    return short.model_copy(update=update)
