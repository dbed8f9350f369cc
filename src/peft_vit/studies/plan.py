"""From a study to its runs: everything is checked, counted and estimated here, before any expensive work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from peft_vit.adapters.peft_format import peft_sha256
from peft_vit.backbones import architecture_of, check_weights, describe, interpolation_of
from peft_vit.config import ExperimentConfig, Precision, StudyConfig, TrainingConfig
from peft_vit.data import ImageIndex, Splits, check_augmentation, class_gaps, image_warnings, make_splits, open_index
from peft_vit.errors import UserError, named
from peft_vit.forecasting.calibration import calibration_run
from peft_vit.forecasting.estimate import Estimate, EstimateRequest, Measure, MeasuredCost, Workload, estimate_runs
from peft_vit.forecasting.memory_limit import Choice, MeasureStep, as_begun, decide, unmeasured, with_decided
from peft_vit.methods import check
from peft_vit.records import ADAPTER_FILE, RECORD_FILE, RunSpec, read_record, run_folder
from peft_vit.records.migrations import LAST_VERSION_WITH_ALL
from peft_vit.records.study_file import StudyFile, read_study_file
from peft_vit.runs.machine import ChosenPrecision, choose_precision, resolve_device
from peft_vit.studies.smoke import smoke_study
from peft_vit.studies.study_file import difference, go_on, study_file


@dataclass(frozen=True)
class PlannedRun:
    """One run, what it will cost, and whether an earlier call has done it."""

    spec: RunSpec
    total_steps: int
    estimate: Estimate
    done: bool


@dataclass(frozen=True)
class Plan:
    """The runs of a study that are asked for, in their order.

    Attributes:
        study: as configured, or compressed for a smoke study, with `auto` decided; it may have more runs than are
            asked for.
        file: the configuration file.
        licence: of the images.
        data_sha256: of the images.
        runs: what is asked for, done or not.
        part: the study names only some of the experiments and seeds that its folder holds.
        precision: of the runs, and how it was decided.
        bf16_factor: time of a product in bf16 over fp32's, where runs to do have to emulate bf16.
        notices: what to know of the images before believing a number; none if nothing is to be done.
        before: what study.json says, read while planning; None: the study is new.
        memory: what was chosen now for each `memory_limit`, and its price.
    """

    study: StudyConfig
    file: Path
    licence: str
    data_sha256: str
    runs: tuple[PlannedRun, ...]
    precision: ChosenPrecision
    bf16_factor: float | None = None
    part: bool = False
    notices: tuple[str, ...] = ()
    before: StudyFile | None = None
    memory: tuple[str, ...] = ()

    @property
    def pending(self) -> tuple[PlannedRun, ...]:
        """Return the runs that are still to be done."""
        return tuple(run for run in self.runs if not run.done)

    def only(self, names: Sequence[str], seeds: Sequence[int], *, by_seed: bool) -> Plan:
        """Return the plan of the runs that there are of some experiments and seeds, in the order of both.

        Args:
            names: of the experiments.
            seeds: of the runs.
            by_seed: all runs of a seed before the next, so pairs complete early; otherwise all of an experiment.
        """
        runs = {(run.spec.experiment.name, run.spec.seed): run for run in self.runs}
        if by_seed:
            wanted = [(name, seed) for seed in seeds for name in names]
        else:
            wanted = [(name, seed) for name in names for seed in seeds]
        return replace(self, runs=tuple(runs[pair] for pair in wanted if pair in runs))


def plan_study(
    study: StudyConfig,
    results_dir: Path,
    *,
    file: Path,
    smoke: bool = False,
    part: bool = False,
    measure: Measure | None = None,
    measure_step: MeasureStep | None = None,
) -> Plan:
    """Check a study against its backbone and its data, and plan its runs.

    Args:
        study: from `config.load_study`.
        results_dir: where records lie; runs that are done there are not planned again.
        file: the configuration file, named in errors.
        smoke: compress the study, see `smoke.smoke_study`.
        part: the results directory may hold other experiments and seeds of this study.
        measure: measures what runs cost of which nothing is known yet; None: they are estimated. See `measure_costs`.
        measure_step: measures the steps among which a `memory_limit` chooses; None: it is refused if there is one.

    Raises:
        UserError: for anything that would fail later, with file, field and remedy; and if the results directory
            holds a study of this name that was configured otherwise, with the difference.
    """
    with named(file):
        return plan_begun_study(
            study,
            read_study_file(results_dir / study.name),
            results_dir,
            file=file,
            smoke=smoke,
            part=part,
            measure=measure,
            measure_step=measure_step,
        )


def plan_begun_study(
    study: StudyConfig,
    before: StudyFile | None,
    results_dir: Path,
    *,
    file: Path,
    smoke: bool = False,
    part: bool = False,
    measure: Measure | None = None,
    measure_step: MeasureStep | None = None,
) -> Plan:
    """Plan a study whose study.json is read already, as `plan_study`; errors about its configuration name no file.

    `before` is what study.json says; None: the study is new.
    """
    if smoke:
        study = smoke_study(study, describe(study.backbone, study.data.image_size).size_step)
        study = unmeasured(study, describe(study.backbone, study.data.image_size))
    known = interpolation_of(architecture_of(study.backbone))
    if study.data.interpolation is None and known != "bicubic":  # as the model's pretraining resized
        study = study.model_copy(update={"data": study.data.model_copy(update={"interpolation": known})})
    precision = decide_precision(study, before)
    study = as_begun(study.model_copy(update={"precision": precision.chosen}), before)
    index = open_index(study.data, smoke=smoke)
    asked = study_file(study, (), smoke=smoke, data_sha256=index.sha256)
    go_on(results_dir / study.name, before, asked, source=file, part=part)
    drawn = splits_of(index, study)
    splits = drawn[study.seeds[0]]
    workload = workload_of(study, index, splits)
    for place, experiment in enumerate(study.experiments):
        with _below(place):
            check(experiment, workload.shape, experiment.total_steps(workload.train), workload.train)
            check_augmentation(experiment.training.augmentation, index.channels)
    study, choices = _within_memory(study, workload, index, splits, measure_step)
    wanted = []
    for place, experiment in enumerate(study.experiments):
        steps = experiment.total_steps(workload.train)
        kind = calibration_run(spec_of(study, place, study.seeds[0], smoke=smoke), steps, workload.shape, index, splits)
        kind_sha256 = kind.digest()
        for seed in study.seeds:
            spec = spec_of(study, place, seed, smoke=smoke)
            wanted.append(EstimateRequest(spec, steps, kind, kind_sha256, _taken(results_dir, spec, index.sha256)))
    notices: tuple[str, ...] = ()
    pending = any(run.taken is None for run in wanted)
    if pending:
        check_weights(study.backbone)
        notices = (*_notices(index, study, drawn), *_unseen(study))
    estimates = estimate_runs(wanted, workload, None if smoke else measure)
    runs = []
    for run, estimate in zip(wanted, estimates, strict=True):
        choice = choices.get(run.spec.experiment.name)
        if choice is not None and estimate.basis == "estimate":  # its memory was measured for the limit
            estimate = replace(estimate, peak_memory_bytes=choice.cost.peak_bytes)  # noqa: PLW2901
        runs.append(PlannedRun(run.spec, run.steps, estimate, done=run.taken is not None))
    factor = workload.bf16_factor() if precision.emulated and pending and not smoke else None
    return Plan(
        study,
        file,
        index.licence,
        index.sha256,
        tuple(runs),
        precision,
        factor,
        part,
        notices,
        before=before,
        memory=tuple(
            choices[one.name].line(one, len(workload.shape.values_by_block))
            for one in study.experiments
            if one.name in choices
        ),
    )


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
) -> tuple[StudyConfig, dict[str, Choice]]:
    """Return the study with what keeps within every limit, and what was chosen now, by the names of experiments."""
    choices: dict[str, Choice] = {}

    def decide_measured(place: int, experiment: ExperimentConfig) -> TrainingConfig:
        check_weights(study.backbone)
        spec, steps = spec_of(study, place, study.seeds[0]), experiment.total_steps(len(splits.train))
        with _below(place):
            if measure_step is None:
                raise UserError("is kept by measured steps, and none are done here", field="training.memory_limit")
            training, choices[experiment.name] = decide(spec, steps, workload, index, splits, measure_step)
        return training

    return with_decided(study, decide_measured), choices


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


def _notices(index: ImageIndex, study: StudyConfig, drawn: dict[int, Splits]) -> tuple[str, ...]:
    """Return what to know of the images: of every split which classes it lacks, of the first one copies too."""
    seeds_of: dict[str, list[int]] = {}
    for seed, splits in drawn.items():
        first = seed == study.seeds[0]
        for text in image_warnings(index, splits, study.data.image_size) if first else class_gaps(index, splits):
            seeds_of.setdefault(text, []).append(seed)
    if len(drawn) == 1:
        return tuple(seeds_of)
    return tuple(f"{text} (seen with seed {', '.join(map(str, seeds))})" for text, seeds in seeds_of.items())


def _unseen(study: StudyConfig) -> tuple[str, ...]:
    """Return a line if some experiments are fitted to images that the others see changed."""
    probes = [one.name for one in study.experiments if one.is_probe]
    changes = dict.fromkeys(
        change.name for one in study.experiments for change in one.training.augmentation if change.flip is None
    )
    if not probes or not changes:
        return ()
    return (f"augmentation: of its changes only flips reach {', '.join(probes)}, not {', '.join(changes)}",)


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


def _taken(results_dir: Path, spec: RunSpec, data_sha256: str) -> MeasuredCost | None:
    """Return what a finished run took; one that failed or lost its adapter is run again, a changed one refused."""
    file = run_folder(results_dir, spec) / RECORD_FILE
    if not file.exists():
        return None
    record = read_record(file)
    if record.status != "done" or not (file.parent / ADAPTER_FILE).exists():
        return None
    if record.spec != spec:
        old, new = (one.model_dump(mode="json", exclude_none=True) for one in (record.spec, spec))
        raise UserError(
            "was made with another configuration, see below; "
            "give the study or the experiment another name, or choose another --output",
            file=file,
            details=difference(old, new, str(file), "asked for"),
        )
    if record.spec_digest != spec.digest():
        problem = "was made with a setting that this version no longer has; choose another --output, or go on with "
        raise UserError(f"{problem}peft-vit {LAST_VERSION_WITH_ALL}", file=file, field="spec_digest")
    if record.provenance is not None and record.provenance.data_sha256 != data_sha256:
        raise UserError("was made with other images under the same path; choose another --output", file=file)
    start = spec.experiment.start
    if start and record.provenance is not None and record.provenance.start_sha256 != peft_sha256(Path(start)):
        raise UserError("was made with another adapter under the same path; choose another --output", file=file)
    return MeasuredCost.of(record)
