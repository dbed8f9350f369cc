"""Records grouped by study, and everything that a reader must know before believing a number.

Smoke runs and real runs are never pooled: they form two studies, even under one name. Nothing is dropped in
silence: failed, incomplete and missing runs are named in `Study.notices`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_vit.config import ExperimentConfig
from peft_vit.errors import UserError
from peft_vit.records import ByteCounts, Metrics, ParameterCounts, Provenance, RunRecord, read_records

METHOD_ORDER = ("linear", "full", "lora", "peft_lora", "adalora", "peft_adalora", "qa_lora", "qa_adalora")


@dataclass(frozen=True)
class Run:
    """A finished run: a record whose outcomes are all there."""

    record: RunRecord
    validation: Metrics
    test: Metrics
    parameters: ParameterCounts
    bytes: ByteCounts
    provenance: Provenance

    @property
    def seed(self) -> int:
        """Return the run's seed."""
        return self.record.spec.seed

    @property
    def experiment(self) -> ExperimentConfig:
        """Return what was asked."""
        return self.record.spec.experiment

    def final_ranks(self) -> dict[str, int]:
        """Return site -> rank at the end of the run; empty without adapters."""
        return dict(self.record.rank_history[-1].ranks) if self.record.rank_history else {}


@dataclass(frozen=True)
class Study:
    """All runs of one study, either real ones or smoke runs.

    Attributes:
        name: the study's name.
        smoke: whether these are smoke runs.
        experiments: in the order of methods, then of rank, then of name; those with failed runs only
            included. runs: finished runs, by experiment and seed. failed: records of runs that failed or that
            lack outcomes. missing: (experiment, seed) pairs for which there is no record, although the seed
            occurs elsewhere. notices: sentences that stand above every number.
    """

    name: str
    smoke: bool
    experiments: tuple[ExperimentConfig, ...]
    runs: tuple[Run, ...]
    failed: tuple[RunRecord, ...]
    missing: tuple[tuple[str, int], ...]
    notices: tuple[str, ...]

    @property
    def label(self) -> str:
        """Return the name, with the mark of a smoke study."""
        return f"{self.name} (smoke)" if self.smoke else self.name

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return all seeds that occur."""
        return tuple(sorted({run.seed for run in self.runs} | {record.spec.seed for record in self.failed}))

    def of(self, experiment: str) -> tuple[Run, ...]:
        """Return the finished runs of one experiment, by seed."""
        return tuple(run for run in self.runs if run.experiment.name == experiment)

    def with_method(self, *methods: str) -> tuple[ExperimentConfig, ...]:
        """Return the experiments of some methods that have a finished run."""
        return tuple(e for e in self.experiments if e.method in methods and self.of(e.name))

    def fixed_rank_loras(self) -> tuple[ExperimentConfig, ...]:
        """Return what others are compared with: our LoRA from nothing at one rank.

        LoRA that goes on from an adapter was trained before, and that of the PEFT library has one rank for the fused
        query, key and value: both stand under their own names, and are no reference.
        """
        return tuple(e for e in self.with_method("lora") if e.lora is not None and e.lora.rank is not None)


def load_studies(results_dir: Path) -> tuple[Study, ...]:
    """Read every record below a directory and group it by study.

    Raises:
        UserError: if there is no record, if one is unreadable, or if a run stands twice.
    """
    return group_by_study(read_records(results_dir), source=results_dir)


def group_by_study(records: Iterable[RunRecord], *, source: Path) -> tuple[Study, ...]:
    """Group records by study and by whether they are smoke runs; `source` is only named in errors."""
    groups: dict[tuple[str, bool], dict[tuple[str, int], RunRecord]] = {}
    for record in records:
        spec = record.spec
        group = groups.setdefault((spec.study, spec.smoke), {})
        key = (spec.experiment.name, spec.seed)
        if key in group:
            raise UserError(
                f"holds the run {spec.run_id!r} twice, which would count it twice as evidence; "
                "give the directory of one set of results, or move the copy away",
                file=source,
            )
        group[key] = record
    return tuple(_study(name, smoke, group) for (name, smoke), group in sorted(groups.items()))


def _study(name: str, smoke: bool, group: dict[tuple[str, int], RunRecord]) -> Study:
    records = [group[key] for key in sorted(group)]
    candidates = [_finished(record) for record in records]
    runs = tuple(run for run in candidates if run is not None)
    failed = tuple(record for record, run in zip(records, candidates, strict=True) if run is None)
    by_name = {record.spec.experiment.name: record.spec.experiment for record in records}
    experiments = tuple(sorted(by_name.values(), key=_order))
    seeds = sorted({seed for _, seed in group})
    missing = tuple((e.name, seed) for e in experiments for seed in seeds if (e.name, seed) not in group)
    runs = tuple(sorted(runs, key=lambda run: (_order(run.experiment), run.seed)))
    notices = (*_notices(smoke, runs, failed, missing), *_without_effect(records), *_differences(runs))
    return Study(name, smoke, experiments, runs, failed, missing, notices)


def _order(experiment: ExperimentConfig) -> tuple[int, int, str]:
    section = experiment.lora or experiment.peft_lora
    rank = section.rank if section is not None and section.rank is not None else 0
    return METHOD_ORDER.index(experiment.method), rank, experiment.name


def _finished(record: RunRecord) -> Run | None:
    parts = (record.validation, record.test, record.parameters, record.bytes, record.provenance)
    validation, test, parameters, bytes_, provenance = parts
    if record.status != "done" or not (validation and test and parameters and bytes_ and provenance):
        return None
    return Run(record, validation, test, parameters, bytes_, provenance)


def why_unfinished(record: RunRecord) -> str:
    """Return in one line why a record can't be used."""
    if record.status == "done":
        return "the record says done, but outcomes are missing in it"
    return record.error or "no error was recorded"


def _notices(
    smoke: bool, runs: tuple[Run, ...], failed: tuple[RunRecord, ...], missing: tuple[tuple[str, int], ...]
) -> tuple[str, ...]:
    notices = []
    if smoke:
        notices.append(
            "Smoke runs: random weights, synthetic images and a compressed schedule. They show that the code "
            "runs. No number here says anything about a method."
        )
    elif any(run.provenance.random_weights for run in runs):
        names = sorted({run.experiment.name for run in runs if run.provenance.random_weights})
        notices.append(
            f"Random weights: the backbone of {', '.join(names)} was not pretrained. "
            "Nothing here carries over to fine-tuning a pretrained model."
        )
    notices += [f"Failed: {r.spec.experiment.name}, seed {r.spec.seed}: {why_unfinished(r)}" for r in failed]
    if missing:
        names_and_seeds = ", ".join(f"{name} seed {seed}" for name, seed in missing)
        notices.append(f"Missing: no record of {names_and_seeds}. The study is incomplete or still running.")
    return tuple(notices)


def _without_effect(records: Sequence[RunRecord]) -> list[str]:
    """Return each distinct warning of the records once, with the runs that gave it."""
    seeds_of: dict[str, dict[str, list[int]]] = {}
    for record in records:
        for text in dict.fromkeys(record.warnings):
            seeds_of.setdefault(text, {}).setdefault(record.spec.experiment.name, []).append(record.spec.seed)
    notices = []
    for text, by_name in seeds_of.items():
        runs = "; ".join(f"{name}, {_seeds(seeds)}" for name, seeds in by_name.items())
        notices.append(f"Little or no effect: {text}. Runs: {runs}.")
    return notices


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(str(seed) for seed in seeds)}"


def _differences(runs: tuple[Run, ...]) -> list[str]:
    """Name what differs among runs that are about to be compared."""
    notices = []
    for name in dict.fromkeys(run.experiment.name for run in runs):
        own = [run for run in runs if run.experiment.name == name]
        if len({_configuration(run) for run in own}) > 1:
            notices.append(f"Configurations differ between the seeds of {name}: its mean mixes them.")
    for what, key, consequence in _SHOULD_AGREE:
        count = len({key(run) for run in runs})
        if count > 1:
            notices.append(f"The runs used {count} different {what}: {consequence}.")
    return notices


_SHOULD_AGREE: tuple[tuple[str, Callable[[Run], object], str], ...] = (
    (
        "backbone weights",
        lambda run: (run.record.spec.backbone.model, run.provenance.weights_sha256),
        "runs that differ in this are not paired",
    ),
    ("data sets", lambda run: run.provenance.data_sha256, "runs that differ in this are not paired"),
    (
        "numbers of threads",
        lambda run: run.provenance.threads,
        "last bits and seconds may differ",
    ),
    (
        "machines",
        lambda run: (run.provenance.processor, run.provenance.cpu_count, run.provenance.device),
        "seconds and memory are not comparable among all of them",
    ),
    (
        "sets of package versions",
        lambda run: tuple(sorted(run.provenance.packages.items())),
        "numbers may differ for that reason",
    ),
)


def _configuration(run: Run) -> str:
    spec = run.record.spec
    return spec.model_copy(update={"seed": 0}).model_dump_json()
