"""What measures look at, what they return, and how they find the runs that a hypothesis is about."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from peft_vit.analysis.allocation import Allocation, allocations
from peft_vit.analysis.comparison import references
from peft_vit.analysis.measures.selection import Reference, Selection, settings_without
from peft_vit.analysis.quantization import QuantizationImpact, quantization_impacts
from peft_vit.analysis.studies import Run, Study
from peft_vit.config import ExperimentConfig, Frozen
from peft_vit.records import RunRecord

Unit = Literal["share", "log2 ratio", "ranks", "rho", "index", "factor", "nats", "s", "bytes"]

# Where the fields that not every record has come from; what is not named here, every finished run has.
_HOW_TO_RECORD = {
    "importance_history": "runs with adaptive ranks record it",
    "rank_history": "runs with adapters record it",
    "quantization": "runs on quantized weights record it",
    "removal": "set measures.removal_images in the configuration and run again",
    "overhead_s": "records of older versions lack it; run again",
    "steps": "records of older versions lack it; run again",
}


class NoDataError(Exception):
    """Nothing in the records speaks about a hypothesis; the message says why, and what would."""


@dataclass(frozen=True)
class Measured:
    """Values of one experiment, or of one pair of experiments; a positive one speaks for the sentence."""

    subject: str  # whose values these are
    values: tuple[float, ...]  # one for each of `labels`; empty if there are none
    labels: tuple[str, ...]  # what each value belongs to, as a rule a seed
    n_of: str  # what n counts, in the plural
    records: tuple[RunRecord, ...]  # all that the values come from
    note: str = ""  # what restricts them; for no values, why there are none
    # for a sentence about the most of several: the values against each rival, of which `values` are those with the
    # smallest mean; empty for any other sentence
    rivals: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Subject:
    """An experiment, and those of its finished runs that recorded what is needed."""

    experiment: ExperimentConfig
    runs: tuple[Run, ...]
    note: str

    @property
    def name(self) -> str:
        """Return the experiment's name."""
        return self.experiment.name


class Evidence:
    """One study, and what other parts of the analysis have made of it; that is computed when first asked for."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._rests: dict[tuple[str, tuple[str, ...]], str] = {}

    @cached_property
    def allocation(self) -> dict[str, Allocation]:
        """Return experiment -> what became of its ranks."""
        return {one.experiment.name: one for one in allocations(self.study)}

    @cached_property
    def quantization(self) -> dict[str, QuantizationImpact]:
        """Return experiment -> what quantization did."""
        return {one.experiment.name: one for one in quantization_impacts(self.study)}

    @cached_property
    def reference_lora(self) -> str | None:
        """Return the fixed-rank LoRA that others are compared with."""
        loras = {experiment.name for experiment in self.study.fixed_rank_loras()}
        return next((name for name in references(self.study) if name in loras), None)

    def subjects(self, selection: Selection, needs: Sequence[str]) -> tuple[Subject, ...]:
        """Return the selected experiments that have a finished run with everything that is needed.

        Raises:
            NoDataError: if there is none, with what is missing.
        """
        meant = [e for e in self.study.experiments if selection.takes(e, self.reference_lora)]
        finished = [(e, self.study.of(e.name)) for e in meant]
        if not any(runs for _, runs in finished):
            left = " has finished" if meant else ""
            raise NoDataError(f"no experiment {selection.words()}{left}")
        found = []
        for experiment, runs in finished:
            whole = tuple(run for run in runs if not _missing(run, needs))
            if whole:
                seeds = [run.seed for run in runs if _missing(run, needs)]
                note = f"seeds left out, whose records lack {joined(needs)}: {joined(seeds)}" if seeds else ""
                found.append(Subject(experiment, whole, together(note, self._unfinished(experiment))))
        if not found:
            lacking = sorted({field for _, runs in finished for run in runs for field in _missing(run, needs)})
            how = [f"no record has {field}: {_HOW_TO_RECORD.get(field, 'it was not recorded')}" for field in lacking]
            raise NoDataError("; ".join(how))
        return tuple(found)

    def partners(self, experiment: ExperimentConfig, reference: Reference) -> Iterator[ExperimentConfig]:
        """Yield the experiments with a finished run that an experiment is to be compared with."""
        for other in self.study.experiments:
            if (
                other.name != experiment.name
                and self.study.of(other.name)
                and reference.takes(other, self.reference_lora)
                and reference.differ(experiment, other)
                and (not reference.same_but or self._rest(experiment, reference) == self._rest(other, reference))
            ):
                yield other

    def _rest(self, experiment: ExperimentConfig, reference: Reference) -> str:
        """Return what must be equal; kept, since every pair of experiments asks for it."""
        key = experiment.name, reference.same_but
        if key not in self._rests:
            self._rests[key] = settings_without(experiment, reference.same_but)
        return self._rests[key]

    def _unfinished(self, experiment: ExperimentConfig) -> str:
        failed = [r.spec.seed for r in self.study.failed if r.spec.experiment.name == experiment.name]
        missing = [seed for name, seed in self.study.missing if name == experiment.name]
        return together(
            f"failed: seed {joined(failed)}" if failed else "", f"missing: seed {joined(missing)}" if missing else ""
        )


def _missing(run: Run, needs: Sequence[str]) -> list[str]:
    """Return the fields that a run's record leaves empty."""
    return [field for field in needs if getattr(run.record, field) in (None, [], {})]


def joined(values: Iterable[object]) -> str:
    """Return values as a list in prose."""
    return ", ".join(str(value) for value in values)


def together(*notes: str) -> str:
    """Return notes as one."""
    return "; ".join(note for note in notes if note)


def by_seed(subject: Subject, value: Callable[[Run], float | None], without: str) -> Measured:
    """Return one value a run; `without` says why a run has none, or one that is not finite."""
    values = {run.seed: value(run) for run in subject.runs}
    known = {seed: one for seed, one in values.items() if one is not None and math.isfinite(one)}
    left_out = [seed for seed in values if seed not in known]
    note = f"seeds left out, {without}: {joined(left_out)}" if left_out else ""
    return Measured(
        subject=subject.name,
        values=tuple(known.values()),
        labels=tuple(str(seed) for seed in known),
        n_of="seeds",
        records=tuple(run.record for run in subject.runs if run.seed in known),
        note=together(subject.note, note),
    )


def records_of(study: Study, experiments: Iterable[str], seeds: Iterable[int]) -> tuple[RunRecord, ...]:
    """Return the records of some experiments' finished runs at some seeds."""
    wanted = set(seeds)
    return tuple(run.record for name in experiments for run in study.of(name) if run.seed in wanted)


class OfParameters(Frozen):
    """What a hypothesis says under `parameters`: the experiments, and in subclasses what else a measure asks."""

    of: Selection


Subjects = tuple[Subject, ...]


@dataclass(frozen=True)
class Measure:
    """A function from studies to values, and what a hypothesis has to say to use it."""

    parameters: type[OfParameters]  # model of what stands under `parameters` in the registry
    unit: Unit | Callable[[Any], Unit]  # of the values, and so of the margin
    # values of one study's selected experiments; None where several studies are needed
    of_study: Callable[[Evidence, Subjects, Any], tuple[Measured, ...]] | None = None
    # values over all studies of a directory, each with its selected experiments, if any; None where one study is enough
    of_studies: Callable[[Sequence[tuple[Evidence, Subjects]], Any], tuple[Measured, ...]] | None = None

    def unit_of(self, parameters: OfParameters) -> Unit:
        """Return the unit of the values."""
        return self.unit(parameters) if callable(self.unit) else self.unit


def each_run(
    value: Callable[[Run, Any], float | None], without: str
) -> Callable[[Evidence, Subjects, Any], tuple[Measured, ...]]:
    """Return the measure that takes one value from each run; `without` as in `by_seed`."""

    def measured(_: Evidence, subjects: Subjects, parameters: Any) -> tuple[Measured, ...]:
        return tuple(by_seed(subject, lambda run: value(run, parameters), without) for subject in subjects)

    return measured
