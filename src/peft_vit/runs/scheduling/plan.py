"""From a study to its runs: everything is checked, counted and estimated here, before any expensive work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from peft_vit.base.errors import UserError, named
from peft_vit.core.adapters.peft_format import start_sha256
from peft_vit.core.backbones import architecture_of, check_weights, describe, interpolation_of, size_step_of
from peft_vit.core.config import (
    USUAL_TASK,
    AdaLoraConfig,
    ExperimentConfig,
    Precision,
    QaLoraConfig,
    StudyConfig,
    TrainingConfig,
)
from peft_vit.core.methods import check, shorten
from peft_vit.core.records import RunSpec, StudyFile
from peft_vit.core.tasks import TASKS
from peft_vit.core.training.images import check_augmentation
from peft_vit.data import ImageIndex, Splits, class_gaps, image_warnings, make_splits, open_index, smoke_config
from peft_vit.runs.costs.estimate import EstimateRequest, FinishedCost, MeasureSteps, Workload, estimate_runs
from peft_vit.runs.costs.memory_limit import MeasureStep, MemoryChoice, decide_memory
from peft_vit.runs.costs.timing_run import timing_run
from peft_vit.runs.planned import Plan, PlannedRun
from peft_vit.runs.records.storage import ADAPTER_FILE, RECORD_FILE, read_record, read_study_file, run_folder
from peft_vit.runs.records.study_yaml import SHARED
from peft_vit.runs.scheduling.scheduler import difference, go_on, study_file
from peft_vit.runs.this_machine import matmuls
from peft_vit.runs.this_machine.machine import choose_precision, resolve_device

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
        existing = read_study_file(results_dir / study.name)
        if smoke:
            study = smoke_study(study, size_step_of(architecture_of(study.backbone)))
        pretrained_with = interpolation_of(architecture_of(study.backbone))
        if study.data.interpolation is None and pretrained_with != "bicubic":
            data = study.data.model_copy(update={"interpolation": pretrained_with})
            study = study.model_copy(update={"data": data})
        begun = None if existing is None else existing.configuration.precision
        precision = choose_precision(study.precision, begun, resolve_device(study.device))
        study = study.model_copy(update={"precision": precision.chosen})
        study, compute_note = _as_begun(study, existing, smoke=smoke)
        index = open_index(study.data, smoke=smoke)
        study = _settled(study, index)
        requested = study_file(study, (), smoke=smoke, data_sha256=index.sha256)
        go_on(results_dir / study.name, existing, requested, source=str(file or "asked for"), part=part)
        splits = splits_of(index, study)
        first = splits[study.seeds[0]]
        workload = workload_of(study, index, first)
        for place, experiment in enumerate(study.experiments):
            with _below(place):
                check(experiment, workload.shape, experiment.total_steps(workload.train), workload.train)
                check_augmentation(experiment.training.augmentation, index.channels)
        study, choices, memory = _within_memory(study, workload, index, first, measure_step, smoke=smoke)
        wanted = []
        for place, experiment in enumerate(study.experiments):
            steps = experiment.total_steps(workload.train)
            specs = [spec_of(study, place, seed, smoke=smoke) for seed in study.seeds]
            kind = timing_run(specs[0], steps, workload.shape, index, first)
            digest = kind.digest()
            for spec in specs:
                wanted.append(EstimateRequest(spec, steps, kind, digest, _finished(results_dir, spec, index.sha256)))
        notices: list[str] = []
        if pending := [run.spec for run in wanted if run.finished is None]:
            notices = _slow_products(pending, workload.device, existing)
            weights_sha256 = check_weights(study.backbone)
            for run in wanted:
                if run.finished is not None and weights_sha256 not in (None, run.finished.weights_sha256):
                    file = run_folder(results_dir, run.spec) / RECORD_FILE
                    reason = "was made with other weights under the same path; choose another --output"
                    raise UserError(reason, file=file)
            notices += _notices(index, study, splits)
        runs = []
        for run, estimate in zip(wanted, estimate_runs(wanted, workload, None if smoke else measure), strict=True):
            choice = choices.get(run.spec.experiment.name)
            if choice is not None and estimate.basis == "estimate":  # its memory was measured for the limit
                estimate = replace(estimate, peak_memory_bytes=choice.cost.peak_bytes)  # noqa: PLW2901
            runs.append(PlannedRun(run.spec, run.steps, estimate, done=run.finished is not None))
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
            existing=existing,
            memory=tuple(memory),
        )


def _with_trainings(study: StudyConfig, decide: Callable[[int, ExperimentConfig], TrainingConfig]) -> StudyConfig:
    """Return the study with what is decided of each experiment's training; `decide` gets its place too."""
    decided = []
    for place, experiment in enumerate(study.experiments):
        decided.append(experiment.model_copy(update={"training": decide(place, experiment)}))
    return study.model_copy(update={"experiments": tuple(decided)})


def _as_begun(study: StudyConfig, existing: StudyFile | None, *, smoke: bool) -> tuple[StudyConfig, str | None]:
    """Return the study with what it was begun with, on whatever machine that was, so that all its runs are alike.

    That is what was chosen for a `memory_limit`, and what frozen layers multiply; of a new study what is faster here.
    Any exact product may compute it. A line says what was decided now.
    """
    experiments = () if existing is None else existing.configuration.experiments
    begun = {experiment.name: experiment for experiment in experiments}
    others = [experiment for experiment in begun.values() if not experiment.kind.without_integers]
    note = None

    def decide(_: int, experiment: ExperimentConfig) -> TrainingConfig:
        nonlocal note
        training, same = experiment.training, begun.get(experiment.name)
        if training.is_undecided and same is not None and same.training.recomputed_blocks is not None:
            images = training.micro_batch_size or same.training.images_at_once
            training = training.decided(images, same.training.recomputed_blocks)
        earlier = same or next(iter(others), None)
        compute, bits = training.compute, training.integer_bits
        if compute == "auto" and (smoke or experiment.kind.without_integers):
            compute = "float"
        elif earlier is not None and compute in ("auto", earlier.training.compute):
            compute, bits = earlier.training.compute, bits or earlier.training.integer_bits
        elif compute != "float":
            choice = matmuls.choose_product(resolve_device(study.device), cast(Precision, study.precision), bits)
            if compute == "auto":
                compute = "int8" if choice.is_faster else "float"
                note = f"compute: auto is {compute}: {choice.times}" if choice.matmul else None
            bits = choice.matmul.bits if choice.matmul else bits
        return training.model_copy(update={"compute": compute, "integer_bits": bits if compute == "int8" else None})

    return _with_trainings(study, decide), note


def _slow_products(pending: Sequence[RunSpec], device: torch.device, existing: StudyFile | None) -> list[str]:
    """Return a line where products of integers that runs need are slower than those of floats.

    Raises:
        UserError: if this machine has none, or such slow ones that nobody would wait for them.
    """
    lines = []
    kinds = {(spec.precision, spec.experiment.training.integer_bits) for spec in pending if spec.multiplies_integers}
    for precision, bits in kinds:
        choice = matmuls.choose_product(device, precision, bits)
        remedy = "use float"
        if existing is not None:
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
        raise error.about(f"experiments[{place}].{error.field}") from None


def _within_memory(
    study: StudyConfig,
    workload: Workload,
    index: ImageIndex,
    splits: Splits,
    measure_step: MeasureStep | None,
    *,
    smoke: bool,
) -> tuple[StudyConfig, dict[str, MemoryChoice], list[str]]:
    """Return the study with what keeps within every limit, what was chosen now, by experiment, and a line on each.

    Of a smoke study nothing is measured, and as many blocks are computed again as saves anything.
    """
    choices: dict[str, MemoryChoice] = {}
    lines, blocks = list[str](), len(workload.shape.values_by_block)

    def decide(place: int, experiment: ExperimentConfig) -> TrainingConfig:
        training = experiment.training
        if not training.is_undecided:
            return training
        if smoke:
            return training.decided(training.images_at_once, training.recomputed_of(blocks))
        check_weights(study.backbone)
        spec, steps = spec_of(study, place, study.seeds[0]), experiment.total_steps(len(splits.train))
        with _below(place):
            if measure_step is None:
                raise UserError("is kept by measured steps, and none are done here", field="training.memory_limit")
            training, choice = decide_memory(spec, steps, workload, index, splits, measure_step)
        choices[experiment.name] = choice
        lines.append(choice.line(experiment, blocks))
        return training

    return _with_trainings(study, decide), choices, lines


def _settled(study: StudyConfig, index: ImageIndex) -> StudyConfig:
    """Return the study with its task, and what `metric: auto` is for these images, those of their own test left out.

    Raises:
        UserError: for what the task does not have.
    """
    task = index.task
    if study.measures.removal_images is not None:
        task.need_one_class("measures.removal_images")
    if task is not TASKS[study.data.task or USUAL_TASK]:
        study = study.model_copy(update={"data": study.data.model_copy(update={"task": task.name})})
    metric = task.deciding(index.class_counts(index.dev)).name

    def settle(place: int, experiment: ExperimentConfig) -> TrainingConfig:
        training = experiment.training
        qa_lora, adalora = experiment.section(QaLoraConfig), experiment.section(AdaLoraConfig)
        of_one_class = {
            "training.label_smoothing": training.label_smoothing,
            "qa_lora.adaptive_bits": qa_lora is not None and qa_lora.adaptive_bits,
            "adalora.importance_metric": adalora is not None and adalora.importance_metric == "fisher",
        }
        if training.metric == "auto":
            training = training.model_copy(update={"metric": metric})
        with _below(place):
            for field, is_set in of_one_class.items():
                if is_set:
                    task.need_one_class(field)
            task.check(training)
        return training

    return _with_trainings(study, settle)


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
    first = splits[study.seeds[0]]
    seeds_of: dict[str, list[str]] = {}
    for seed, drawn in splits.items():
        texts = image_warnings(index, drawn, study.data.image_size) if drawn is first else class_gaps(index, drawn)
        for text in texts:
            seeds_of.setdefault(text, []).append(str(seed))
    notices = list(seeds_of)
    if len(splits) > 1:
        notices = [f"{text} (seen with seed {', '.join(seeds)})" for text, seeds in seeds_of.items()]
    for how in dict.fromkeys(experiment.training.class_weights for experiment in study.experiments):
        if how != "none":
            weights = index.task.loss_weights(index.class_counts(first.train), how)
            ends = (f"'{index.class_names[k]}' {weights[k]:.2g}" for k in (weights.argmax(), weights.argmin()))
            notices.append(f"class weights in the loss, {how}: from {' to '.join(ends)}")
    probes = [experiment.name for experiment in study.experiments if experiment.is_probe]
    augmentation = [change for experiment in study.experiments for change in experiment.training.augmentation]
    changes = dict.fromkeys(change.name for change in augmentation if change.flip is None)
    if probes and changes:
        notices.append(f"augmentation: of its changes only flips reach {', '.join(probes)}, not {', '.join(changes)}")
    return notices


def spec_of(study: StudyConfig, place: int, seed: int, *, smoke: bool = False) -> RunSpec:
    """Return what a run of a study, whose precision is decided, is specified by; `place` is its experiment's."""
    shared: dict[str, Any] = {name: getattr(study, name) for name in SHARED}
    return RunSpec(study=study.name, seed=seed, experiment=study.experiments[place], smoke=smoke, **shared)


def _finished(results_dir: Path, spec: RunSpec, data_sha256: str) -> FinishedCost | None:
    """Return what a finished run took; one that failed or lost its adapter is run again, a changed one refused."""
    file = run_folder(results_dir, spec) / RECORD_FILE
    if not file.exists():
        return None
    record = read_record(file)
    if record.status != "done" or not (file.parent / ADAPTER_FILE).exists():
        return None
    if record.spec != spec:
        old, new = (values.model_dump(mode="json", exclude_none=True) for values in (record.spec, spec))
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
    if start and record.provenance is not None and record.provenance.start_sha256 != start_sha256(Path(start)):
        raise UserError("was made with another adapter under the same path; choose another --output", file=file)
    return FinishedCost.of(record)


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
            "backbone": study.backbone.model_copy(update={"weights": "random", "file": None, "sha256": None}),
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
