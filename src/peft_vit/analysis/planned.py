"""What was planned of a study and has no record that counts: each run once, with what has become of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peft_vit.config import ExperimentConfig, StudyConfig
from peft_vit.records import StudyStatus
from peft_vit.records.progress import RunStatus, State, run_of

# Of a run without a record that counts, as a report lists them; in one of several folders it may have got further.
STATES: tuple[State, ...] = ("failed", "left out", "running", "pending", "skipped", "missing")
_FURTHEST_FIRST: tuple[State, ...] = (
    "running",
    "pending",
    "skipped",
)  # in one of several folders it may have got further


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
) -> tuple[RunStatus, ...]:
    """Return the runs that have no record that counts, by experiment and seed; `recorded` are those that have one.

    Without a plan `expected` counts: what the records make one expect, every experiment with every seed.
    """
    planned = set(plan.runs)
    found: dict[tuple[str, int], RunStatus] = {}
    for experiment, seed, reason in plan.left_out:
        found[experiment, seed] = RunStatus(f"{experiment}/seed_{seed}", "left out", note=reason)
    left_out = set(found)
    for state in _FURTHEST_FIRST:
        for folder in plan.folders:
            for status in folder.runs if folder.file is not None else ():
                if status.state == state:
                    found.setdefault(status.key, status)
    runs = {*(planned if plan.is_known else expected), *left_out} - set(recorded)
    for experiment, seed in runs - found.keys():
        # Planned all the same: the record in its folder is of another run, or has come since records were read.
        state = "pending" if (experiment, seed) in planned else "missing"
        found[experiment, seed] = RunStatus(f"{experiment}/seed_{seed}", state)
    return tuple(found[run] for run in sorted(runs))


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
