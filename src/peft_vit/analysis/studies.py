"""Records grouped by study, and everything that a reader must know before believing a number.

Smoke runs and real runs are never pooled: they form two studies, even under one name. Nothing is dropped in
silence: failed, incomplete and missing runs are named in `Study.notices`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from peft_vit.analysis.planned import STATES, Plan, runs_in_words, seeds_in_words, unfinished_runs
from peft_vit.config import METHOD_KINDS, ExperimentConfig, LoraConfig, PeftLoraConfig, StoppingConfig
from peft_vit.errors import DataWarning, UserError
from peft_vit.records import ByteCounts, Metrics, ParameterCounts, Provenance, RunRecord, SiteInfo
from peft_vit.records.progress import RunStatus

METHOD_ORDER = tuple(METHOD_KINDS)


@dataclass(frozen=True)
class Run:
    """A finished run: a record whose outcomes are all there."""

    record: RunRecord
    validation: Metrics | None  # None without validation images
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

    def configuration(self) -> str:
        """Return everything that was asked but for the seed, as text that is equal where it is."""
        return self.record.spec.model_copy(update={"seed": 0}).model_dump_json()

    def adapted_sites(self) -> list[SiteInfo]:
        """Return the sites that ever had a rank named, in the sites' order; none without adapters."""
        named = {name for entry in self.record.rank_history for name in entry.ranks}
        return [site for site in self.record.sites if site.name in named]

    def final_ranks(self) -> dict[str, int]:
        """Return adapted site -> rank at the end of the run; one that the last entry leaves out has rank 0."""
        return {site.name: self.record.rank_history[-1].ranks.get(site.name, 0) for site in self.adapted_sites()}

    def last_scores(self) -> dict[str, float]:
        """Return site -> score at the last decision; empty without scores."""
        return self.record.importance_history[-1].scores if self.record.importance_history else {}


@dataclass(frozen=True)
class Study:
    """All runs of one study, either real ones or smoke runs."""

    name: str
    smoke: bool  # whether these are smoke runs
    # in the order of methods, then of rank, then of name; those without a finished run included
    experiments: tuple[ExperimentConfig, ...]
    runs: tuple[Run, ...]  # finished runs, by experiment and seed
    failed: tuple[RunRecord, ...]  # records of runs that failed or that lack outcomes
    # runs that have no record that counts: planned ones, or where no study.json tells what was planned, pairs of an
    # experiment and a seed that occurs elsewhere
    unfinished: tuple[RunStatus, ...]
    notices: tuple[str, ...]  # sentences: what to know before believing a number
    plan: Plan  # what is known beside the records

    @property
    def missing(self) -> tuple[tuple[str, int], ...]:
        """Return experiment and seed of the runs that have no record that counts."""
        return tuple(run.key for run in self.unfinished)

    def counts(self) -> dict[str, int]:
        """Return the number of runs by state; their sum is the number of planned runs."""
        states = Counter(run.state for run in self.unfinished)
        return {"done": len(self.runs)} | {state: states[state] for state in STATES} | {"failed": len(self.failed)}

    @property
    def label(self) -> str:
        """Return the name, with the mark of a smoke study."""
        return f"{self.name} (smoke)" if self.smoke else self.name

    @property
    def disclaimer(self) -> str:
        """Return why no number here says anything about a method; empty if they do. It is one of the notices."""
        return _disclaimer(self.smoke, self.runs)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return all seeds that occur."""
        return tuple(sorted({run.seed for run in self.runs} | {record.spec.seed for record in self.failed}))

    @property
    def images_tested_by_seed(self) -> bool:
        """Return whether each seed draws its own test images; runs of one seed share them in any case."""
        return any(run.record.spec.data.tests_by_seed for run in self.runs)

    @property
    def stopping(self) -> StoppingConfig | None:
        """Return when its comparisons stop; None: the number of seeds did not depend on results."""
        return None if self.plan.declared is None else self.plan.declared.stopping

    @property
    def untested(self) -> str:
        """Return why tests that take the number of seeds as given decide nothing here; empty if they do."""
        if self.plan.seeds_added:
            return f"no verdict: {seeds_in_words(self.plan.seeds_added)} of {self.name} were added after results"
        return "" if self.stopping is None else "no verdict: looks at results decided how many seeds ran"

    def of(self, experiment: str) -> tuple[Run, ...]:
        """Return the finished runs of one experiment, by seed."""
        return self._by_experiment.get(experiment, ())

    @cached_property
    def _by_experiment(self) -> dict[str, tuple[Run, ...]]:
        found: dict[str, list[Run]] = {}  # with a thousand runs nobody should look through all each time
        for run in self.runs:
            found.setdefault(run.experiment.name, []).append(run)
        return {name: tuple(runs) for name, runs in found.items()}

    def with_method(self, *methods: str) -> tuple[ExperimentConfig, ...]:
        """Return the experiments of some methods that have a finished run."""
        return tuple(e for e in self.experiments if e.method in methods and self.of(e.name))

    def fixed_rank_loras(self) -> tuple[ExperimentConfig, ...]:
        """Return what others are compared with: our LoRA from nothing at one rank.

        LoRA that goes on from an adapter was trained before, and that of the PEFT library has one rank for the fused
        query, key and value: both stand under their own names, and are no reference.
        """
        return tuple(e for e in self.with_method("lora") if e.need(LoraConfig).rank is not None)


def make_study(name: str, smoke: bool, records: Iterable[RunRecord], plan: Plan, first: Sequence[str]) -> Study:
    """Return the study of some records, each run's once; the notices in `first` stand above those that follow."""
    group = {(record.spec.experiment.name, record.spec.seed): record for record in records}
    records = [group[key] for key in sorted(group)]
    candidates = [_finished(record) for record in records]
    runs = tuple(run for run in candidates if run is not None)
    failed = tuple(record for record, run in zip(records, candidates, strict=True) if run is None)
    by_name = {e.name: e for e in plan.experiments} | {r.spec.experiment.name: r.spec.experiment for r in records}
    experiments = tuple(sorted(by_name.values(), key=_order))
    seeds = sorted({seed for _, seed in group})
    unfinished = unfinished_runs(plan, group, [(e.name, seed) for e in experiments for seed in seeds])
    place = {e.name: index for index, e in enumerate(experiments)}
    unfinished = tuple(sorted(unfinished, key=lambda run: (place.get(run.experiment, len(place)), run.key)))
    runs = tuple(sorted(runs, key=lambda run: (_order(run.experiment), run.seed)))
    notices = (
        *first,
        *_notices(smoke, runs, failed),
        *_of_seeds(name, plan),
        *_progress(plan, len(runs), len(failed), unfinished),
        *_unplanned(plan, group),
        *_warnings(records),
        *_differences(runs),
    )
    return Study(name, smoke, experiments, runs, failed, unfinished, notices, plan)


def choose_study(studies: Sequence[Study], name: str | None, source: Path) -> Study:
    """Return the one study that is there, or the one of a name (or label, where smoke runs share it).

    Raises:
        UserError: if there are several, or none of the name; names them.
    """
    labels = ", ".join(study.label for study in studies)
    matching = [study for study in studies if name is None or name in (study.name, study.label)]
    exact = [study for study in matching if study.label == name and not study.smoke]
    if len(exact or matching) == 1:
        return (exact or matching)[0]
    if not matching:
        raise UserError(f"{name!r} is none of its studies, which are {labels}", file=source, field="--study")
    raise UserError(f"holds {len(studies)} studies ({labels}); choose one with --study NAME", file=source)


def _order(experiment: ExperimentConfig) -> tuple[int, int, str]:
    section = experiment.section(LoraConfig) or experiment.section(PeftLoraConfig)
    rank = section.rank if section is not None and section.rank is not None else 0
    return METHOD_ORDER.index(experiment.method), rank, experiment.name


def _finished(record: RunRecord) -> Run | None:
    test, parameters, bytes_, provenance = record.test, record.parameters, record.bytes, record.provenance
    if record.status != "done" or not (test and parameters and bytes_ and provenance):
        return None
    if record.validation is None and record.spec.data.validation_images:
        return None
    return Run(record, record.validation, test, parameters, bytes_, provenance)


def why_unfinished(record: RunRecord) -> str:
    """Return in one line why a record can't be used."""
    if record.status == "done":
        return "the record says done, but outcomes are missing in it"
    return record.error or "no error was recorded"


def _disclaimer(smoke: bool, runs: tuple[Run, ...]) -> str:
    if smoke:
        return (
            "Smoke runs: random weights, synthetic images and a compressed schedule. They show that the code "
            "runs. No number here says anything about a method."
        )
    names = sorted({run.experiment.name for run in runs if run.provenance.random_weights})
    if not names:
        return ""
    return (
        f"Random weights: the backbone of {', '.join(names)} was not pretrained. "
        "Nothing here carries over to fine-tuning a pretrained model."
    )


def _notices(smoke: bool, runs: tuple[Run, ...], failed: tuple[RunRecord, ...]) -> list[str]:
    disclaimer = _disclaimer(smoke, runs)
    reasons: dict[str, list[RunRecord]] = {}
    for record in failed:
        reasons.setdefault(why_unfinished(record), []).append(record)
    own = [f"Failed: {_runs(records)}: {reason}" for reason, records in reasons.items()]
    return [disclaimer, *own] if disclaimer else own


def _of_seeds(name: str, plan: Plan) -> list[str]:
    """Say what results had to do with the number of seeds."""
    notices = []
    if plan.seeds_added:
        notices.append(
            f"Continued: {seeds_in_words(plan.seeds_added)} of {name} were added when results were there, and that "
            "was not declared. Tests take the number of seeds as given, so nothing here gets a verdict: estimates and "
            "intervals describe."
        )
    if plan.declared is not None and plan.declared.stopping is not None:
        notices.append(
            f"Comparisons with {plan.declared.stopping.control} stop when they are decided (`stopping`). Their "
            "intervals and p-values account for the looks. All other intervals are as if the number of seeds had been "
            "fixed, and nothing else gets a verdict."
        )
    return notices


def _progress(plan: Plan, done: int, failed: int, unfinished: Sequence[RunStatus]) -> list[str]:
    """Say which planned runs there is nothing of, and who works on them."""
    notices = [f"In progress: {folder.owner}." for folder in plan.folders if folder.owner is not None]
    runs_in = {
        state: [run.key for run in unfinished if run.state == state]
        for state in ("running", "pending", "skipped", "missing")
    }
    missing = runs_in.pop("missing")
    if plan.declared is not None:  # then what is left out is left to the looks
        runs_in.pop("skipped")
    open_ = sum(map(len, runs_in.values()))
    if open_:
        which = ". ".join(f"{state.capitalize()}: {runs_in_words(runs)}" for state, runs in runs_in.items() if runs)
        notices.append(
            f"Incomplete: {open_} of {done + failed + len(unfinished)} planned runs are not done yet, and no "
            f"number here has anything of them. {which}."
        )
    if missing:
        notices.append(f"Missing: no record of {runs_in_words(missing)}. The study is incomplete or still running.")
    return notices


def _unplanned(plan: Plan, recorded: Iterable[tuple[str, int]]) -> list[str]:
    foreign = sorted(set(recorded) - set(plan.runs)) if plan.is_known else []
    if not foreign:
        return []
    return [f"Not planned: study.json does not name {runs_in_words(foreign)}, of which there are records. They count."]


def _warnings(records: Sequence[RunRecord]) -> list[str]:
    """Return each distinct warning of the records once, with the runs that gave it."""
    runs_of: dict[str, list[RunRecord]] = {}
    for record in records:
        for text in dict.fromkeys(record.warnings):
            runs_of.setdefault(text, []).append(record)
    return [
        f"{text if text.startswith(DataWarning.PREFIX) else f'Warning: {text}'}. Runs: {_runs(own)}."
        for text, own in runs_of.items()
    ]


def _runs(records: Sequence[RunRecord]) -> str:
    return runs_in_words(((record.spec.experiment.name, record.spec.seed) for record in records), ", ")


def _differences(runs: tuple[Run, ...]) -> list[str]:
    """Name what differs among runs that are about to be compared."""
    notices = []
    configurations: dict[str, set[str]] = {}
    for run in runs:
        configurations.setdefault(run.experiment.name, set()).add(run.configuration())
    for name, own in configurations.items():
        if len(own) > 1:
            notices.append(f"Configurations differ between the seeds of {name}: its mean mixes them.")
    units: dict[str, list[str]] = {}
    for run in runs:
        if any(entry.budget is not None for entry in run.record.rank_history):
            units.setdefault(run.record.rank_history[0].unit, []).append(run.experiment.name)
    if len(units) > 1:
        named = "; ".join(f"{unit}: {', '.join(dict.fromkeys(names))}" for unit, names in sorted(units.items()))
        notices.append(f"Budgets are in different units ({named}): they are not comparable, parameters and bytes are.")
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
    ("numbers of threads", lambda run: run.provenance.threads, "last bits and seconds may differ"),
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
