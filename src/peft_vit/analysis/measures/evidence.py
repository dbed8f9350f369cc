"""What measures look at, what they return, and how they find the runs that a sentence is about."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from peft_vit.analysis.allocation import Allocation, allocations
from peft_vit.analysis.comparison import references
from peft_vit.analysis.quantization import QuantizationImpact, quantization_impacts
from peft_vit.analysis.studies import Run, Study
from peft_vit.config import ExperimentConfig

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
    """Nothing in the records speaks about a sentence; the message says why, and what would."""


@dataclass(frozen=True)
class Group:
    """Some experiments of a study, told by what they are, never by their results."""

    words: str  # as they follow "no experiment"
    takes: Callable[[ExperimentConfig], bool]


@dataclass(frozen=True)
class Measured:
    """Values of one experiment, or of one pair of experiments; a positive one speaks for the sentence."""

    subject: str  # whose values these are
    values: tuple[float, ...]  # one for each of `labels`; empty if there are none
    labels: tuple[str, ...]  # what each value belongs to, as a rule a seed
    n_of: str  # what n counts, in the plural
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

    def subjects(self, of: Group, needs: Sequence[str] = ()) -> tuple[Subject, ...]:
        """Return the experiments of a group that have a finished run whose record has all fields that are needed.

        Raises:
            NoDataError: if there is none, with what is missing.
        """
        meant = [e for e in self.study.experiments if of.takes(e)]
        finished = [(e, self.study.of(e.name)) for e in meant]
        if not any(runs for _, runs in finished):
            left = " has finished" if meant else ""
            raise NoDataError(f"no experiment {of.words}{left}")
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

    def partners(self, one: ExperimentConfig, against: Group, same_but: tuple[str, ...]) -> Iterator[ExperimentConfig]:
        """Yield the experiments of a group that have a finished run and that an experiment is to be compared with.

        With `same_but` only those whose settings differ in some of these and in nothing else.
        """
        for other in self.study.experiments:
            if other.name != one.name and self.study.of(other.name) and against.takes(other):
                differ = any(value_at(one, path) != value_at(other, path) for path in same_but)
                if not same_but or (differ and self._rest(one, same_but) == self._rest(other, same_but)):
                    yield other

    def _rest(self, experiment: ExperimentConfig, same_but: tuple[str, ...]) -> str:
        """Return what must be equal; kept, since every pair of experiments asks for it."""
        key = experiment.name, same_but
        if key not in self._rests:
            self._rests[key] = settings_without(experiment, same_but)
        return self._rests[key]

    def _unfinished(self, experiment: ExperimentConfig) -> str:
        failed = [r.spec.seed for r in self.study.failed if r.spec.experiment.name == experiment.name]
        missing = [seed for name, seed in self.study.missing if name == experiment.name]
        return together(
            f"failed: seed {joined(failed)}" if failed else "", f"missing: seed {joined(missing)}" if missing else ""
        )


def value_at(experiment: ExperimentConfig, path: str) -> Any:
    """Return what a setting is by its dotted name, as in qa_lora.quantization_bits; None where its section is not."""
    value: Any = experiment
    for part in path.split("."):
        value = None if value is None else getattr(value, part)
    return value


def settings_without(experiment: ExperimentConfig, paths: Sequence[str]) -> str:
    """Return all settings but the name and the given ones, as text that is equal where they are."""
    settings: dict[str, Any] = experiment.model_dump(mode="json")
    for path in ("name", *paths):
        *sections, last = path.split(".")
        inner: Any = settings
        for section in sections:
            inner = inner.get(section) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner.pop(last, None)
    return json.dumps(settings, sort_keys=True)


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
        note=together(subject.note, note),
    )


def each_run(
    evidence: Evidence, of: Group, needs: Sequence[str], value: Callable[[Run], float | None], without: str
) -> tuple[Measured, ...]:
    """Return one value from each run of each experiment of a group, see `by_seed`."""
    return tuple(by_seed(subject, value, without) for subject in evidence.subjects(of, needs))
