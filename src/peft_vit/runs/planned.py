"""A study's plan: which runs there are, and what each costs. `scheduling.plan` makes it; it is read without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from peft_vit.core.config import StudyConfig
from peft_vit.core.records import RunSpec, StudyFile

if TYPE_CHECKING:
    from peft_vit.runs.costs.estimate import RunCost
    from peft_vit.runs.this_machine.machine import ChosenPrecision


@dataclass(frozen=True)
class PlannedRun:
    """One run, what it will cost, and whether an earlier call has done it."""

    spec: RunSpec
    total_steps: int
    estimate: RunCost
    done: bool


@dataclass(frozen=True)
class Plan:
    """The runs of a study that are asked for, in their order.

    Attributes:
        study: as configured, or compressed for a smoke study, with `auto` decided; it may have more runs than are
            asked for.
        file: the configuration file, if there is one.
        licence: of the images.
        data_sha256: of the images.
        runs: what is asked for, done or not.
        part: the study names only some of the experiments and seeds that its folder holds.
        precision: of the runs, and how it was decided.
        compute_note: a line that says what `compute: auto` became and why; None if nothing was decided.
        notices: what to know of the images before believing a number; none if nothing is to be done.
        existing: what study.json says, read while planning; None: the study is new.
        memory: what was chosen now for each `memory_limit`, and its price.
    """

    study: StudyConfig
    file: Path | None
    licence: str
    data_sha256: str
    runs: tuple[PlannedRun, ...]
    precision: ChosenPrecision
    compute_note: str | None = None
    part: bool = False
    notices: tuple[str, ...] = ()
    existing: StudyFile | None = None
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
        wanted = [(name, seed) for seed in seeds for name in names]
        if not by_seed:
            wanted = [(name, seed) for name in names for seed in seeds]
        return replace(self, runs=tuple(runs[pair] for pair in wanted if pair in runs))
