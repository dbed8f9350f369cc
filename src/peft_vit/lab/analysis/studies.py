"""Records grouped by study, what was planned of it, and everything that a reader must know before believing a number.

Smoke runs and real runs are never pooled: they form two studies, even under one name. Nothing is dropped in
silence: failed, incomplete and missing runs are named in `Study.notices`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from peft_vit.base.errors import DataWarning, UserError
from peft_vit.base.statistics.descriptive import grouped
from peft_vit.core.config import METHOD_KINDS, ExperimentConfig, LoraConfig, PeftLoraConfig, StudyConfig
from peft_vit.core.records import ByteCounts, Metrics, ParameterCounts, Provenance, RunRecord, SiteInfo
from peft_vit.core.tasks import Scores, scores_of
from peft_vit.runs.records.progress import STATES_TO_COME, STATES_WITHOUT_RECORD, RunStatus, StudyStatus, run_of
from peft_vit.runs.records.scan import Contents, Problem, read_contents

# --- runs and what was planned ----------------------------------------------------------------------------------------


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

    @property
    def hardware(self) -> str:
        """Return what its times depend on, in words."""
        origin = self.provenance
        return f"{origin.device} on {origin.processor}, {origin.cpu_count} processors, {origin.threads} threads"

    @cached_property
    def scores(self) -> Scores:
        """Return by what runs are compared: accuracy of classes, of other tasks what decides."""
        return scores_of(self.record)

    @property
    def score(self) -> float:
        """Return what the test images say, a share of which more is better."""
        return self.scores.of(self.test)

    def configuration(self) -> str:
        """Return everything that was asked but for the seed, as text that is equal where it is."""
        return self.record.spec.model_copy(update={"seed": 0}).model_dump_json()

    def adapted_sites(self) -> list[SiteInfo]:
        """Return the sites that ever had a rank named, in the sites' order; none without adapters."""
        ranked = set[str]().union(*(entry.ranks for entry in self.record.rank_history))
        return [site for site in self.record.sites if site.name in ranked]

    def last_scores(self) -> dict[str, float]:
        """Return site -> score at the last decision; empty without scores."""
        return self.record.importance_history[-1].scores if self.record.importance_history else {}


def why_unfinished(record: RunRecord) -> str:
    """Return in one line why a record can't be used."""
    if record.status == "done":
        return "the record says done, but outcomes are missing in it"
    return record.error or "no error was recorded"


@dataclass(frozen=True)
class Plan:
    """What is known of a study beside its records."""

    folders: tuple[StudyStatus, ...] = ()  # those of this study; several if its results were brought together
    left_out: tuple[tuple[str, int, str], ...] = ()  # experiment and seed of runs whose records do not count, and why

    @cached_property
    def configurations(self) -> tuple[StudyConfig, ...]:
        """Return what was planned; empty if no study.json says it."""
        return tuple(folder.file.configuration for folder in self.folders if folder.file is not None)

    @property
    def seeds_added(self) -> tuple[int, ...]:
        """Return the seeds that were added when results were there, and that nothing had declared."""
        return tuple(sorted({seed for folder in self.folders if folder.file for seed in folder.file.seeds_added}))

    @cached_property
    def runs(self) -> frozenset[tuple[str, int]]:
        """Return experiment and seed of each planned run."""
        return frozenset(run_of(run) for folder in self.folders if folder.file is not None for run in folder.file.runs)


def runs_in_words(runs: Iterable[tuple[str, int]], between: str = " ") -> str:
    """Return experiments with their seeds, e.g. ``lora_r8 seeds 0–2, 5; lora_r4 seed 1``."""
    return "; ".join(f"{name}{between}{seeds_in_words(seeds)}" for name, seeds in grouped(runs).items())


def seeds_in_words(seeds: Sequence[int]) -> str:
    """Return seeds, three and more in a row as a range, e.g. ``seeds 0–2, 5``."""
    stretches = grouped((seed - place, seed) for place, seed in enumerate(sorted(seeds))).values()
    parts = [f"{row[0]}–{row[-1]}" if len(row) > 2 else ", ".join(map(str, row)) for row in stretches]
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(parts)}"


# --- studies ----------------------------------------------------------------------------------------------------------


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
    file_notices: tuple[str, ...]  # about the files that it was read from
    plan: Plan  # what is known beside the records

    @cached_property
    def notices(self) -> tuple[str, ...]:
        """Return sentences: what to know before believing a number."""
        return *self.file_notices, *_notices(self)

    def counts(self) -> dict[str, int]:
        """Return the number of runs by state; their sum is the number of planned runs."""
        states = Counter(run.state for run in self.unfinished)
        return (
            {"done": len(self.runs)}
            | {state: states[state] for state in STATES_WITHOUT_RECORD}
            | {"failed": len(self.failed)}
        )

    @property
    def label(self) -> str:
        """Return the name, with the mark of a smoke study."""
        return f"{self.name} (smoke)" if self.smoke else self.name

    @property
    def disclaimer(self) -> str:
        """Return why no number here says anything about a method; empty if they do. It is one of the notices."""
        if self.smoke:
            return (
                "Smoke runs have random weights, synthetic images and a short schedule. They show "
                "that the code runs. No number here says anything about a method."
            )
        names = sorted({run.experiment.name for run in self.runs if run.provenance.random_weights})
        if not names:
            return ""
        return (
            f"The backbone of {', '.join(names)} has random weights and was not pretrained. Nothing here carries "
            "over to fine-tuning a pretrained model."
        )

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return all seeds that occur."""
        return tuple(sorted({run.seed for run in self.runs} | {record.spec.seed for record in self.failed}))

    @property
    def scores(self) -> Scores:
        """Return by what its runs are compared; they have one task."""
        return self.runs[0].scores if self.runs else Scores()

    @property
    def images_tested_by_seed(self) -> bool:
        """Return whether each seed draws its own test images; runs of one seed share them in any case."""
        return any(run.record.spec.data.tests_by_seed for run in self.runs)

    @property
    def untested(self) -> str:
        """Return why tests that take the number of seeds as given decide nothing here; empty if they do."""
        if self.plan.seeds_added:
            return f"no verdict: {seeds_in_words(self.plan.seeds_added)} of {self.name} were added after results"
        stops = any(configuration.stopping is not None for configuration in self.plan.configurations)
        return "no verdict: looks at results decided how many seeds ran" if stops else ""

    def runs_of(self, experiment: str) -> tuple[Run, ...]:
        """Return the finished runs of one experiment, by seed."""
        return self._by_experiment.get(experiment, ())

    @cached_property
    def _by_experiment(self) -> dict[str, tuple[Run, ...]]:  # with a thousand runs nobody should look through all
        return {name: tuple(runs) for name, runs in grouped((run.experiment.name, run) for run in self.runs).items()}

    def with_method(self, *methods: str) -> tuple[ExperimentConfig, ...]:
        """Return the experiments of some methods that have a finished run."""
        return tuple(e for e in self.experiments if e.method in methods and self.runs_of(e.name))

    def fixed_rank_loras(self) -> tuple[ExperimentConfig, ...]:
        """Return what others are compared with: our LoRA from nothing at one rank.

        LoRA that continues from an adapter was trained before, and that of the PEFT library has one rank for the fused
        query, key and value: both are under their own names, and are not a reference.
        """
        return tuple(e for e in self.with_method("lora") if e.need(LoraConfig).rank is not None)


def make_study(name: str, smoke: bool, records: Iterable[RunRecord], plan: Plan, file_notices: Sequence[str]) -> Study:
    """Return the study of some records, each run's once."""
    group = {_run_of(record): record for record in records}
    by_name = {e.name: e for configuration in plan.configurations for e in configuration.experiments}
    by_name |= {name: group[name, seed].spec.experiment for name, seed in sorted(group)}

    def order(experiment: ExperimentConfig) -> tuple[int, int, str]:
        section = experiment.section(LoraConfig) or experiment.section(PeftLoraConfig)
        return [*METHOD_KINDS].index(experiment.method), (section.rank if section else None) or 0, experiment.name

    place = {experiment.name: index for index, experiment in enumerate(sorted(by_name.values(), key=order))}
    finished: dict[tuple[str, int], Run | None] = {}
    for run in sorted(group, key=lambda run: (place[run[0]], run)):
        record = group[run]
        test, parameters, bytes_, provenance = record.test, record.parameters, record.bytes, record.provenance
        validated = record.validation is not None or not record.spec.data.validation_images
        finished[run] = (
            Run(record, record.validation, test, parameters, bytes_, provenance)
            if record.status == "done" and test and parameters and bytes_ and provenance and validated
            else None
        )
    planned = (status for folder in plan.folders if folder.file is not None for status in folder.runs)
    planned_of = grouped((status.key, status) for status in planned)
    reasons = {(experiment, seed): reason for experiment, seed, reason in plan.left_out}
    # Without a plan every experiment with every seed that occurs counts.
    expected = plan.runs if plan.configurations else {(name, seed) for name in place for _, seed in group}
    unfinished: list[RunStatus] = []
    for run in sorted({*expected, *reasons} - group.keys(), key=lambda run: (place.get(run[0], len(place)), run)):
        of_run = "{}/seed_{}".format(*run)
        states = [status for state in STATES_TO_COME for status in planned_of.get(run, ()) if status.state == state]
        if run in reasons:
            states = [RunStatus(of_run, "left out", note=reasons[run])]
        # Planned without a state: the record in its folder is of another run, or has come since records were read.
        unfinished.append(states[0] if states else RunStatus(of_run, "pending" if run in plan.runs else "missing"))
    return Study(
        name=name,
        smoke=smoke,
        experiments=tuple(by_name[name] for name in place),
        runs=tuple(run for run in finished.values() if run is not None),
        failed=tuple(group[run] for run in sorted(group) if finished[run] is None),
        unfinished=tuple(unfinished),
        file_notices=tuple(file_notices),
        plan=plan,
    )


def _run_of(record: RunRecord) -> tuple[str, int]:
    return record.spec.experiment.name, record.spec.seed


def choose_study(studies: Sequence[Study], name: str | None, source: Path) -> Study:
    """Return the one study that is there, or the one of a name (or label, where smoke runs share it).

    Raises:
        UserError: if there are several, or none of the name; names them.
    """
    labels = ", ".join(study.label for study in studies)
    matching = [study for study in studies if name is None or name in (study.name, study.label)]
    chosen = [study for study in matching if study.label == name and not study.smoke] or matching
    if len(chosen) == 1:
        return chosen[0]
    if not matching:
        raise UserError(f"{name!r} is not one of its studies, which are {labels}", file=source, field="--study")
    raise UserError(f"holds {len(studies)} studies ({labels}); choose one with --study NAME", file=source)


# --- what to know before believing a number ---------------------------------------------------------------------------


def _notices(study: Study) -> Iterator[str]:
    plan = study.plan
    if study.disclaimer:
        yield study.disclaimer
    for reason, failed in grouped((why_unfinished(record), _run_of(record)) for record in study.failed).items():
        yield f"Failed: {runs_in_words(failed, ', ')}: {reason}"
    if plan.seeds_added:
        yield (
            f"Not declared: {seeds_in_words(plan.seeds_added)} of {study.name} were added after results were "
            "there. Tests assume a fixed number of seeds, so nothing here gets a verdict, only estimates and "
            "intervals."
        )
    yield from (f"In progress: {folder.owner}." for folder in plan.folders if folder.owner is not None)
    runs_in = grouped((run.state, run.key) for run in study.unfinished)
    if named := [state for state in STATES_TO_COME if state in runs_in]:
        which = ". ".join(f"{state.capitalize()}: {runs_in_words(runs_in[state])}" for state in named)
        planned = len(study.runs) + len(study.failed) + len(study.unfinished)
        yield (
            f"Incomplete: {sum(len(runs_in[state]) for state in named)} of {planned} planned runs are not done "
            f"yet and are in no number here. {which}."
        )
    if missing := runs_in.get("missing"):
        yield f"Missing: there is no record of {runs_in_words(missing)}. The study is incomplete or still running."
    records = sorted((*(run.record for run in study.runs), *study.failed), key=_run_of)
    foreign = [run for run in map(_run_of, records) if run not in plan.runs]
    if foreign and plan.configurations:
        yield f"Not planned: study.json does not name {runs_in_words(foreign)}, of which there are records. They count."
    warned = grouped((text, _run_of(record)) for record in records for text in dict.fromkeys(record.warnings))
    for text, runs in warned.items():
        notice = text if text.startswith(DataWarning.PREFIX) else f"Warning: {text}"
        yield f"{notice}. Runs: {runs_in_words(runs, ', ')}."
    yield from _differences(study.runs)


def _differences(runs: tuple[Run, ...]) -> Iterator[str]:
    """Name what differs among runs that are about to be compared."""
    for name, configurations in grouped((run.experiment.name, run.configuration()) for run in runs).items():
        if len(set(configurations)) > 1:
            yield f"Configurations differ between the seeds of {name}: its mean mixes them."
    units = grouped(
        (run.record.rank_history[0].unit, run.experiment.name)
        for run in runs
        if any(entry.budget is not None for entry in run.record.rank_history)
    )
    if len(units) > 1:
        named = "; ".join(f"{unit}: {', '.join(dict.fromkeys(names))}" for unit, names in sorted(units.items()))
        yield f"Budgets are in different units ({named}): they are not comparable, parameters and bytes are."
    for what, key, consequence in _SHOULD_AGREE:
        count = len({key(run) for run in runs})
        if count > 1:
            yield f"The runs used {count} different {what}: {consequence}."


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


# --- all studies of a directory ---------------------------------------------------------------------------------------

_StudyKey = tuple[str, bool]  # a study's name, and whether it is of smoke runs


@dataclass(frozen=True)
class Results:
    """What was read."""

    directory: Path  # from where
    studies: tuple[Study, ...]  # by name, smoke studies after real ones; what concerns one stands in its notices too
    problems: tuple[Problem, ...]  # what was left out, or stands there beside, by file

    @property
    def is_complete(self) -> bool:
        """Tell whether everything that may be a result counts."""
        return not any(problem.left_out for problem in self.problems)

    def lines(self) -> list[str]:
        """Return the problems as lines for the terminal: "left out: ..." or "note: ..."."""
        return [problem.line(self.directory) for problem in self.problems]


def read_results(directory: Path) -> Results:
    """Read what can be read below a directory, and group it by study.

    A run that occurs twice is counted once if both records are the same, and not at all if they differ, since nothing
    says which of them is the evidence.

    Raises:
        UserError: if the directory does not exist, or if there is no record and no study in it that can be read.
    """
    contents = read_contents(directory)
    records, of_copies = _once(contents)
    problems = (*contents.problems, *of_copies)
    groups = grouped((_key(record), record) for record in records)
    files = [(folder, folder.file) for folder in contents.studies]
    folders = grouped(((file.configuration.name, file.smoke), folder) for folder, file in files if file is not None)
    keys = sorted({*groups, *folders})
    for folder, file in files:
        for key in keys:
            if file is None and key[0] == folder.name:  # an earlier version made it, or its study.json is damaged
                folders.setdefault(key, []).append(folder)
    root = Path(directory).absolute().name
    key_of_file = {file: _key(record) for file, record in contents.records}
    concerned: list[tuple[Problem, set[_StudyKey]]] = []  # a problem, and the studies whose notices have it
    for problem in problems:
        by_place = {key for key in keys if key[0] in {root, *Path(problem.file).parts}} or set(keys)
        recorded = key_of_file.get(problem.file)
        concerned.append((problem, {recorded} if recorded in keys else by_place))
    studies = []
    for key in keys:
        left_out = tuple(
            (*run_of(problem.run[1]), problem.message)
            for problem in problems
            if problem.left_out and problem.run is not None and (problem.run[0] or root) == key[0]
        )
        file_notices = _file_notices([problem for problem, of_studies in concerned if key in of_studies])
        plan = Plan(tuple(folders.get(key, ())), left_out)
        studies.append(make_study(*key, groups.get(key, ()), plan, file_notices))
    return Results(directory, tuple(studies), problems)


def load_studies(directory: Path) -> tuple[Study, ...]:
    """Read all studies below a directory for those who need everything or nothing, such as an export.

    Raises:
        UserError: as in `read_results`, and if anything that may be a result can't be read or occurs twice.
    """
    results = read_results(directory)
    for problem in results.problems:
        if problem.left_out:
            raise UserError(problem.message, file=directory / problem.file)
    return results.studies


def _key(record: RunRecord) -> _StudyKey:
    return record.spec.study, record.spec.smoke


def _once(contents: Contents) -> tuple[list[RunRecord], list[Problem]]:
    """Return the records that count, and what is to be said of runs that stand twice."""
    copies = grouped(((r.spec.run_id, r.spec.smoke), (file, r)) for file, r in contents.records)
    records, problems = [], []
    for (run, _), of_run in copies.items():
        files = [file for file, _ in of_run]
        if len(of_run) == 1 or len({record.model_dump_json() for _, record in of_run}) == 1:
            records.append(of_run[0][1])
            same = f"is the same record of {run!r} as {files[0]}; it counts once"
            problems += [Problem(file, same, left_out=False) for file in files[1:]]
            continue
        for file in files:
            others = ", ".join(other for other in files if other != file)
            message = (
                f"holds the run {run!r}, and {others} hold it with other results; move away what is not the result"
            )
            problems.append(Problem(file, message))
    return records, problems


def _file_notices(problems: Sequence[Problem]) -> list[str]:
    """Return each distinct problem once, with its files."""
    files = grouped(((not problem.left_out, problem.message), problem.file) for problem in problems)
    return [
        f"{'Note' if is_note else 'Left out'}: {', '.join(names)}: {message}."
        for (is_note, message), names in sorted(files.items(), key=lambda item: item[0][0])
    ]
