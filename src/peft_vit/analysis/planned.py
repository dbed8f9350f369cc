"""What was planned of a study and has no record that counts: each run once, with what has become of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from peft_vit.config import ExperimentConfig, StudyConfig
from peft_vit.records import StudyStatus
from peft_vit.records.progress import RunStatus

# missing: no record, and no study.json that would tell whether it was ever planned.
State = Literal["failed", "left out", "running", "pending", "skipped", "missing"]
# Of a run without a record: in one of several folders it may have got further.
_FURTHEST_FIRST: tuple[State, ...] = ("running", "pending", "skipped")


@dataclass(frozen=True)
class UnfinishedRun:
    """A run without a record that counts; `note` says why, or how far it is."""

    experiment: str
    seed: int
    state: State
    note: str = ""

    @property
    def run(self) -> tuple[str, int]:
        """Return experiment and seed."""
        return self.experiment, self.seed


@dataclass(frozen=True)
class Plan:
    """What is known of a study beside its records."""

    folders: tuple[StudyStatus, ...] = ()  # those of this study; several if its results were brought together
    left_out: tuple[tuple[str, int, str], ...] = ()  # experiment and seed of runs whose records do not count, and why

    @property
    def is_known(self) -> bool:
        """Tell whether a study.json says which runs there are."""
        return any(folder.file is not None for folder in self.folders)

    @property
    def declared(self) -> StudyConfig | None:
        """Return the configuration whose `stopping` says when comparisons stop; None without one."""
        files = [folder.file for folder in self.folders if folder.file is not None]
        return next((file.configuration for file in files if file.configuration.stopping is not None), None)

    @property
    def seeds_added(self) -> tuple[int, ...]:
        """Return the seeds that were added when results were there, and that nothing had declared."""
        files = [folder.file for folder in self.folders if folder.file is not None]
        return tuple(sorted({seed for file in files for seed in file.seeds_added}))

    @property
    def experiments(self) -> tuple[ExperimentConfig, ...]:
        """Return the planned experiments."""
        return tuple(e for f in self.folders if f.file is not None for e in f.file.configuration.experiments)

    @property
    def runs(self) -> tuple[tuple[str, int], ...]:
        """Return experiment and seed of each planned run."""
        return tuple(run_of(run) for folder in self.folders if folder.file is not None for run in folder.file.runs)


def unfinished_runs(
    plan: Plan, recorded: Iterable[tuple[str, int]], expected: Iterable[tuple[str, int]]
) -> tuple[UnfinishedRun, ...]:
    """Return the runs that have no record that counts, by experiment and seed; `recorded` are those that have one.

    Without a plan `expected` counts: what the records make one expect, every experiment with every seed.
    """
    why = {(experiment, seed): reason for experiment, seed, reason in plan.left_out}
    planned = set(plan.runs)
    known: dict[tuple[str, int], list[RunStatus]] = {}
    for folder in plan.folders:
        for status in folder.runs:
            known.setdefault(run_of(status.run), []).append(status)

    def unfinished(run: tuple[str, int]) -> UnfinishedRun:
        if run in why:
            return UnfinishedRun(*run, "left out", why[run])
        for state in _FURTHEST_FIRST:
            for status in known.get(run, ()):
                if status.state == state:
                    return UnfinishedRun(*run, state, status.note)
        # Planned all the same: the record in its folder is of another run, or has come since records were read.
        return UnfinishedRun(*run, "pending" if run in planned else "missing")

    return tuple(map(unfinished, sorted({*(planned if plan.is_known else expected), *why} - set(recorded))))


def run_of(run: str) -> tuple[str, int]:
    """Return experiment and seed of ``lora_r8/seed_0``."""
    experiment, _, seed = run.partition("/seed_")
    return experiment, int(seed)


def runs_in_words(runs: Iterable[tuple[str, int]], between: str = " ") -> str:
    """Return experiments with their seeds, e.g. ``lora_r8 seeds 0–2, 5; lora_r4 seed 1``."""
    seeds: dict[str, list[int]] = {}
    for experiment, seed in runs:
        seeds.setdefault(experiment, []).append(seed)
    return "; ".join(f"{name}{between}{seeds_in_words(own)}" for name, own in seeds.items())


def seeds_in_words(seeds: Sequence[int]) -> str:
    """Return seeds, three and more in a row as a range, e.g. ``seeds 0–2, 5``."""
    stretches: list[list[int]] = []
    for seed in sorted(seeds):
        if stretches and seed == stretches[-1][-1] + 1:
            stretches[-1].append(seed)
        else:
            stretches.append([seed])
    parts = [f"{one[0]}–{one[-1]}" if len(one) > 2 else ", ".join(str(seed) for seed in one) for one in stretches]
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(parts)}"


STATES: tuple[State, ...] = get_args(State)
