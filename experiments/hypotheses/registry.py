"""The registry of hypotheses: sentences written down before the data, and what decides each of them.

`hypotheses.yaml` beside this file holds what texts state; a study's own file adds to it. A verdict on a sentence is
registered if it stood there, as it does now, before the study's runs: git knows, by the commit that a run's record
names. Records of version 0.2.0 and before hold the sentences' digests themselves.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, ValidationError, model_validator

from experiments.hypotheses import measures
from experiments.hypotheses.conclusions import Conclusion, Mark, MarkedFinding, Registered, Unit
from experiments.hypotheses.measures import Evidence, Group, NoDataError
from experiments.hypotheses.selection import Reference, Selection
from experiments.hypotheses.several_studies import gain_where_importance_varies, importance_between_data_sets
from peft_vit.base.errors import UserError
from peft_vit.base.statistics import Verdict
from peft_vit.base.statistics.estimates import Estimate
from peft_vit.core.config import Frozen, Name
from peft_vit.core.config.from_yaml import Lines, dotted, read_mapping
from peft_vit.core.records import RunRecord
from peft_vit.lab.analysis.comparison import accuracy_on_test
from peft_vit.lab.analysis.convergence import late_loss_deviation, roughness
from peft_vit.lab.analysis.findings import Finding, judge
from peft_vit.lab.analysis.studies import Run, Study

TEXTS = Path(__file__).with_name("hypotheses.yaml")
ROOT = TEXTS.parents[2]
FORMER_FOLDER = "experiments/configs"  # of the files, until version 0.2.0
ALL_STUDIES = "all studies together"
Test = Literal["superiority", "noninferiority", "equivalence", "counted", "described", "untestable"]
_Text = Annotated[str, StringConstraints(min_length=1, max_length=1000, strip_whitespace=True)]

_SAID = ("measure", "unit")
_TESTED = ("refuted_by", "family", *_SAID)
_FIELDS: dict[Test, tuple[tuple[str, ...], tuple[str, ...]]] = {  # what each test needs, and what it may have besides
    "superiority": (_TESTED, ("margin", "parameters", "needs")),
    "noninferiority": (("margin", *_TESTED), ("parameters", "needs")),
    "equivalence": (("margin", *_TESTED), ("expected", "parameters", "needs")),
    "counted": (("refuted_by", "margin", *_SAID), ("parameters", "needs")),
    "described": (("reason", *_SAID), ("parameters", "needs")),
    "untestable": (("reason",), ()),
}


# --- measures by name -------------------------------------------------------------------------------------------------


class OfParameters(Frozen):
    """What a hypothesis says under `parameters`: the experiments, and in subclasses what else a measure asks."""

    of: Selection


class RankLeadParameters(OfParameters):
    """Of `rank_lead`."""

    matrix: Literal["query"]
    over: Literal["each", "mean"]


class RankSpreadParameters(OfParameters):
    """Of `rank_spread`."""

    index: Literal["gini", "entropy"]


class RemovalParameters(OfParameters):
    """Of `removal_cost`."""

    group: Literal["mlp"]


class OverheadParameters(OfParameters):
    """Of `overhead_below`."""

    parts: tuple[Literal["scoring", "reallocation"], ...] = Field(min_length=1)
    limit: float = Field(ge=measures.OVERHEAD_LIMIT, le=measures.OVERHEAD_LIMIT)


class MemoryParameters(OfParameters):
    """Of `memory_factor`."""

    scope: Literal["layers", "model"]


Quantity = Literal[
    "test_accuracy",
    "validation_accuracy",
    "balanced_accuracy",
    "nll",
    "ece",
    "late_loss_deviation",
    "roughness",
    "rank_gini",
    "rank_entropy",
    "seconds_per_step",
    "own_memory_bytes",
]
_QUANTITIES: dict[Quantity, tuple[Unit, Callable[[Run], float | None]]] = {
    "test_accuracy": ("share", accuracy_on_test),
    "validation_accuracy": ("share", lambda run: None if run.validation is None else run.validation.accuracy),
    "balanced_accuracy": ("share", lambda run: run.test.balanced_accuracy),
    "nll": ("nats", lambda run: run.test.nll),
    "ece": ("share", lambda run: run.test.ece),
    "late_loss_deviation": ("nats", late_loss_deviation),
    "roughness": ("nats", roughness),
    "rank_gini": ("index", measures.rank_gini),
    "rank_entropy": ("index", measures.rank_entropy),
    "seconds_per_step": ("s", lambda run: run.record.seconds_per_step),
    "own_memory_bytes": ("bytes", lambda run: run.record.own_memory_bytes),
}


class DifferenceParameters(OfParameters):
    """Of `difference`."""

    against: Reference
    quantity: Quantity
    better: Literal["higher", "lower"]


def _difference(evidence: Evidence, of: Group, asked: DifferenceParameters) -> tuple[Estimate, ...]:
    return measures.difference(
        evidence,
        of,
        asked.against.group,
        same_but=asked.against.same_but,
        value=_QUANTITIES[asked.quantity][1],
        lower_is_better=asked.better == "lower",
    )


def _rank_lead(evidence: Evidence, of: Group, asked: RankLeadParameters) -> tuple[Estimate, ...]:
    return (measures.query_over_each if asked.over == "each" else measures.query_over_mean)(evidence, of)


def _rank_spread(evidence: Evidence, of: Group, asked: RankSpreadParameters) -> tuple[Estimate, ...]:
    return (measures.spread_gini if asked.index == "gini" else measures.spread_entropy)(evidence, of)


def _overhead_below(evidence: Evidence, of: Group, asked: OverheadParameters) -> tuple[Estimate, ...]:
    return measures.overhead_below(evidence, of, set(asked.parts))


def _memory_factor(evidence: Evidence, of: Group, asked: MemoryParameters) -> tuple[Estimate, ...]:
    return (measures.layers_factor if asked.scope == "layers" else measures.model_factor)(evidence, of)


@dataclass(frozen=True)
class Measure:
    """A function from studies to values, and what a hypothesis has to say to use it."""

    parameters: type[OfParameters]  # model of what stands under `parameters`
    unit: Unit | None  # of the values, and so of the margin; None: that of the quantity
    of_study: Callable[[Evidence, Group, Any], tuple[Estimate, ...]] | None = None  # None where it is over several
    of_studies: Callable[[Sequence[tuple[Evidence, Group]]], tuple[Estimate, ...]] | None = None

    def unit_of(self, asked: OfParameters) -> Unit:
        """Return the unit of the values."""
        if isinstance(asked, DifferenceParameters):
            return _QUANTITIES[asked.quantity][0]
        assert self.unit is not None
        return self.unit


def _plain(unit: Unit, measure: Callable[[Evidence, Group], tuple[Estimate, ...]]) -> Measure:
    return Measure(OfParameters, unit, lambda evidence, of, _: measure(evidence, of))


MEASURES: dict[str, Measure] = {
    "above_majority": _plain("share", measures.above_majority),
    "accuracy_against_float": _plain("share", measures.against_float),
    "accuracy_at_equal_parameters": _plain("share", measures.at_equal_parameters),
    "attention_over_mlp": _plain("log2 ratio", measures.attention_over_mlp),
    "difference": Measure(DifferenceParameters, None, _difference),
    "gain_where_importance_varies": Measure(OfParameters, "share", of_studies=gain_where_importance_varies),
    "importance_against_harm": _plain("rho", measures.against_harm),
    "importance_between_data_sets": Measure(OfParameters, "rho", of_studies=importance_between_data_sets),
    "importance_between_seeds": _plain("rho", measures.between_seeds),
    "memory_factor": Measure(MemoryParameters, "factor", _memory_factor),
    "overhead_below": Measure(OverheadParameters, "share", _overhead_below),
    "parameters_at_equal_accuracy": _plain("log2 ratio", measures.parameters_at_equal_accuracy),
    "rank_lead": Measure(RankLeadParameters, "ranks", _rank_lead),
    "rank_spread": Measure(RankSpreadParameters, "index", _rank_spread),
    "removal_cost": Measure(
        RemovalParameters, "share", lambda evidence, of, _: measures.cost_of_removing_mlp(evidence, of)
    ),
}


# --- the files --------------------------------------------------------------------------------------------------------


class Hypothesis(Frozen):
    """One sentence, worded so that a positive value speaks for it."""

    id: Name
    sentence: _Text
    test: Test
    measure: str | None = Field(default=None, description="name of a measure; not with test: untestable")
    parameters: dict[str, Any] = Field(default={}, description="of the measure, see its model")
    unit: str | None = Field(default=None, description="of the measure's values and the margin; says it, sets nothing")
    margin: float | None = Field(default=None, description="in the unit; superiority takes 0 if it is left out")
    expected: float | None = Field(default=None, description="equivalence: the value that the sentence names, else 0")
    family: Name | None = Field(default=None, description="tests of one family in one study are corrected together")
    needs: tuple[str, ...] = Field(default=(), description="fields that the measure reads; says it, sets nothing")
    refuted_by: _Text | None = Field(default=None, description="in words")
    reason: _Text | None = Field(default=None, description="why it is only described, or no data can test it")
    source: _Text = Field(description="who states it")

    @model_validator(mode="after")
    def _fits_its_test(self) -> Self:
        required, optional = _FIELDS[self.test]
        for name in required:
            if getattr(self, name) is None:
                raise ValueError(f"test: {self.test} needs the field '{name}'; add it")
        for name in ("margin", "expected", "family", "measure", "parameters", "unit", "needs", "refuted_by", "reason"):
            if name in self.model_fields_set and name not in (*required, *optional):
                raise ValueError(f"'{name}' has no effect with test: {self.test}; remove it")
        if self.test in ("noninferiority", "equivalence") and not (self.margin or 0) > 0:
            raise ValueError(f"test: {self.test} needs a margin above 0")
        unknown = [name for name in self.needs if name not in RunRecord.model_fields]
        if unknown:
            raise ValueError(f"a record has no field {unknown[0]!r}; correct needs")
        return self

    @property
    def is_about_several(self) -> bool:
        """Return whether it needs more than one study."""
        return self.test != "untestable" and self.how.of_studies is not None

    @property
    def how(self) -> Measure:
        """Return its measure.

        Raises:
            LookupError: for an untestable sentence.
        """
        return MEASURES[self.measure or ""]

    def arguments(self) -> OfParameters:
        """Return the parameters as the measure takes them."""
        return self.how.parameters.model_validate_json(json.dumps(self.parameters))

    def as_sentence(self) -> Registered:
        """Return the sentence as findings hold it."""
        return Registered(
            id=self.id,
            text=self.sentence,
            test="described" if self.test == "untestable" else self.test,
            unit=self.unit or "",
            source=self.source,
            refuted_by=self.refuted_by,
            reason=self.reason or "",
            margin=self.margin,
            expected=self.expected,
            family=self.family or "",
        )


def _measured(hypothesis: Hypothesis, *studies: Evidence) -> tuple[Estimate, ...]:
    """Return values of the first study, or over all of them; a reason in place of values if there are none."""
    try:
        if hypothesis.test == "untestable":
            raise NoDataError(f"no data can test it: {hypothesis.reason}")
        how, asked = hypothesis.how, hypothesis.arguments()
        if how.of_studies is not None:
            return how.of_studies([(one, asked.of.group) for one in studies])
        assert how.of_study is not None
        return how.of_study(studies[0], asked.of.group, asked)
    except NoDataError as reason:
        return (Estimate(name="", note=str(reason)),)


class _File(Frozen):
    hypotheses: tuple[dict[str, Any], ...] = Field(min_length=1)


@dataclass(frozen=True)
class Registry:
    """All hypotheses of one or two files."""

    files: tuple[Path, ...]
    hypotheses: tuple[Hypothesis, ...]  # in the order of the files
    digests: dict[str, str]  # id -> SHA-256 of what the registry says under it and under the others of its family
    _at_commits: dict[str, dict[str, str]] = field(default_factory=dict, compare=False, repr=False)

    def was_registered(self, id: str, run: Run) -> bool:
        """Return whether a sentence stood written down, as it does now, before a run began."""
        known = run.record.registration
        if known is not None:
            return known.hypotheses.get(id) == self.digests[id]
        commit = run.provenance.git_hash
        if commit is None or run.provenance.git_dirty is not False:
            return False
        if commit not in self._at_commits:
            self._at_commits[commit] = _digests_at(commit, self.files)
        return self._at_commits[commit].get(id) == self.digests[id]

    def mark(self, id: str, studies: Iterable[Study]) -> Mark:
        """Return whether a sentence was registered before every finished run of some studies."""
        before = all(self.was_registered(id, run) for study in studies for run in study.runs)
        return "registered" if before else "exploratory"


def load_registry(own: Path | None = None) -> Registry:
    """Read the hypotheses of texts, and a study's own, which add to them.

    Raises:
        UserError: with file, line, field and remedy, for anything that is not a valid registry.
    """
    files = (TEXTS, *([] if own is None else [own]))
    found: list[Hypothesis] = []
    plain: list[dict[str, Any]] = []
    for file in files:
        raw, lines = _read(file)
        entries = [_entry(one, place, lines, file) for place, one in enumerate(raw)]
        for place, one in enumerate(entries):
            earlier = {e.id for e in entries[:place]}
            if one.id in earlier or one.id in {e.id for e in found}:
                also = "stands twice" if one.id in earlier else f"stands in {TEXTS.name} already"
                raise _fault(f"the id {one.id!r} {also}; rename one", ("hypotheses", place, "id"), lines, file)
        found += entries
        plain += raw
    return Registry(files, tuple(found), digests_of(plain))


def digests_of(entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return id -> digest that also covers the family, whose size is part of the test.

    Otherwise a sentence could lose the others that it was to be corrected with after the run, and stay registered.
    """
    digests = {one["id"]: digest_of(one) for one in entries}
    families: dict[str, list[str]] = {}
    for one in entries:
        families.setdefault(one.get("family") or f"alone: {one['id']}", []).append(one["id"])
    covered = {}
    for members in families.values():
        whole = sorted(digests[member] for member in members)
        for member in members:
            alone = len(members) == 1
            covered[member] = digests[member] if alone else digest_of({"entry": digests[member], "family": whole})
    return {id: covered[id] for id in digests}


def digest_of(entry: Mapping[str, Any]) -> str:
    """Return the SHA-256 of an entry's content, whatever the order of its keys, its line breaks and its comments."""
    return hashlib.sha256(json.dumps(entry, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _digests_at(commit: str, files: Sequence[Path]) -> dict[str, str]:
    """Return the digests of the files as they were at a commit; what was not there, or no registry, has none."""
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            if (content := _at_commit(commit, file)) is not None:
                (copy := Path(folder) / file.name).write_bytes(content)
                try:
                    entries += _read(copy)[0]
                except UserError:
                    return {}
    return digests_of([one for one in entries if "id" in one])


def _at_commit(commit: str, file: Path) -> bytes | None:
    if not file.resolve().is_relative_to(ROOT):
        return None
    for path in (file.resolve().relative_to(ROOT).as_posix(), f"{FORMER_FOLDER}/{file.name}"):
        shown = subprocess.run(["git", "show", f"{commit}:{path}"], cwd=ROOT, capture_output=True, check=False)
        if shown.returncode == 0:
            return shown.stdout
    return None


def _read(file: Path) -> tuple[list[dict[str, Any]], Lines]:
    if not file.is_file():
        raise UserError("is no file; give the path of a YAML file with hypotheses", file=file)
    data, lines = read_mapping(file)
    try:
        return list(_File.model_validate_json(json.dumps(data)).hypotheses), lines
    except ValidationError as error:
        raise _refused(error, (), lines, file) from None


def _entry(raw: dict[str, Any], place: int, lines: Lines, file: Path) -> Hypothesis:
    path = ("hypotheses", place)
    try:
        hypothesis = Hypothesis.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise _refused(error, path, lines, file) from None
    if hypothesis.test == "untestable":
        return hypothesis
    if hypothesis.measure not in MEASURES:
        problem = f"there is no measure {hypothesis.measure!r}; there are {', '.join(sorted(MEASURES))}"
        raise _fault(problem, (*path, "measure"), lines, file)
    try:
        asked = hypothesis.arguments()
    except ValidationError as error:
        raise _refused(error, (*path, "parameters"), lines, file) from None
    unit = hypothesis.how.unit_of(asked)
    if hypothesis.unit != unit:
        raise _fault(f"the measure's unit is {unit!r}, not {hypothesis.unit!r}", (*path, "unit"), lines, file)
    return hypothesis


def _refused(error: ValidationError, below: tuple[str | int, ...], lines: Lines, file: Path) -> UserError:
    """Return the first fault; an unknown key first, since a misspelled one is also reported as missing."""
    first = min(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
    said = {"extra_forbidden": "unknown key here; remove it or correct its spelling", "missing": "is missing; add it"}
    message = said.get(first["type"], first["msg"].removeprefix("Value error, "))
    return _fault(message, (*below, *first["loc"]), lines, file)


def _fault(problem: str, path: tuple[str | int, ...], lines: Lines, file: Path) -> UserError:
    line = next(lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in lines)
    return UserError(problem, file=f"{file}:{line}", field=dotted(path))


# --- findings ---------------------------------------------------------------------------------------------------------


def find(studies: Sequence[Evidence], registry: Registry, name: str, *, several: bool | None = None) -> Findings:
    """Return what studies say about every hypothesis, in the registry's order.

    Args:
        studies: the first is asked about what one study tells, all about what several do, of which one may stand alone.
        registry: what is asked.
        name: what the studies are called.
        several: only what is about several studies, or what is not; None: everything.
    """
    asked = [one for one in registry.hypotheses if several in (None, one.is_about_several)]
    measured = [(one.as_sentence(), values) for one in asked for values in _measured(one, *studies)]
    untested = next(filter(None, (one.study.untested for one in studies)), "")
    of = [one.study for one in studies]
    return tuple(
        _marked(found, sentence, name, registry.mark(sentence.id, of))
        for found, (sentence, _) in zip(judge(measured, untested), measured, strict=True)
    )


def _marked(found: Finding, sentence: Registered, study: str, mark: Mark) -> MarkedFinding:
    """Return a finding as that of a study, with its mark; of what nothing is tested, with the reason."""
    known = {**vars(found), "sentence": sentence, "study": study}
    if not found.by_seed:
        nothing = {"verdict": Verdict.NO_DATA, "outcome": found.note or "no finished run shows it", "note": ""}
        return MarkedFinding(**known | nothing)
    if sentence.test == "described":
        known["outcome"] = f"described, not tested: {sentence.reason}"
    return MarkedFinding(**known, mark=mark)


Findings = tuple[MarkedFinding, ...]


def all_findings(studies: Sequence[Study], registry: Registry) -> dict[str, Findings]:
    """Return study -> what it says about what one study tells; then what all of them say about the rest."""
    evidence = [Evidence(study) for study in studies]
    found = {one.study.label: find([one], registry, one.study.label, several=False) for one in evidence}
    together = find(evidence, registry, ALL_STUDIES, several=True)
    return {**found, ALL_STUDIES: together} if together else found


def mark_of(conclusion: Conclusion) -> Mark | None:
    """Return registered if every finding with data is; None without data."""
    marks = {found.mark for found in conclusion.findings if isinstance(found, MarkedFinding)}
    if conclusion.verdict == "no data":
        return None
    return "registered" if marks == {"registered"} else "exploratory"


def unknown_registrations(studies: Iterable[Study], known: Iterable[str]) -> tuple[str, ...]:
    """Return the ids that records hold as registered and that are not among the known ones."""
    held = [run.record.registration for study in studies for run in study.runs]
    return tuple(sorted({id for one in held if one is not None for id in one.hypotheses}.difference(known)))
