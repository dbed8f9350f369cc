"""The hypothesis registry: sentences written down before the data, and what decides each of them.

One file comes with the package (`analysis/hypotheses.yaml`); a user's own file adds to it. Before a run begins,
`Registry.registration` goes into its record: who changes a sentence, a margin or a test afterwards has another digest,
and the verdict on it is exploratory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, ValidationError, model_validator

from peft_vit.analysis.measures import MEASURES, Measure, OfParameters
from peft_vit.config import Frozen, Lines, Name, one_line, read_mapping
from peft_vit.errors import UserError
from peft_vit.records import Registration, RunRecord

PACKAGED = Path(__file__).with_name("hypotheses.yaml")
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
    needs: tuple[str, ...] = Field(default=(), description="fields that records must have filled in")
    refuted_by: _Text | None = Field(default=None, description="in words")
    reason: _Text | None = Field(default=None, description="why it is only described, or no data can test it")
    source: _Text = Field(description="who states it")

    @model_validator(mode="after")
    def _fits_its_test(self) -> Self:
        required, optional = _FIELDS[self.test]
        for field in required:
            if getattr(self, field) is None:
                raise ValueError(f"test: {self.test} needs the field '{field}'; add it")
        for field in ("margin", "expected", "family", "measure", "parameters", "unit", "needs", "refuted_by", "reason"):
            if field in self.model_fields_set and field not in (*required, *optional):
                raise ValueError(f"'{field}' has no effect with test: {self.test}; remove it")
        if self.test in ("noninferiority", "equivalence") and not (self.margin or 0) > 0:
            raise ValueError(f"test: {self.test} needs a margin above 0")
        unknown = [field for field in self.needs if field not in RunRecord.model_fields]
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


class _File(Frozen):
    hypotheses: tuple[dict[str, Any], ...] = Field(min_length=1)


@dataclass(frozen=True)
class Registry:
    """All hypotheses of one or two files."""

    hypotheses: tuple[Hypothesis, ...]  # in the order of the files
    sha256: str  # of the files' bytes, one after the other
    digests: dict[str, str]  # id -> SHA-256 of what the registry says under it and under the others of its family

    def registration(self) -> Registration:
        """Return what goes into the record of a run that is about to begin."""
        return Registration(sha256=self.sha256, hypotheses=self.digests)

    def was_registered(self, hypothesis: Hypothesis, record: RunRecord) -> bool:
        """Return whether a hypothesis stood written down, as it does now, before a run began."""
        registration = record.registration
        return registration is not None and registration.hypotheses.get(hypothesis.id) == self.digests[hypothesis.id]


def load_registry(own: Path | None = None) -> Registry:
    """Read the hypotheses that come with the package, and a user's own, which add to them.

    Raises:
        UserError: with file, line, field and remedy, for anything that is not a valid registry.
    """
    found: list[Hypothesis] = []
    digests: dict[str, str] = {}
    content = hashlib.sha256()
    for file in (PACKAGED, *([] if own is None else [own])):
        entries, raw, lines = _read(file)
        for place, (one, plain) in enumerate(zip(entries, raw, strict=True)):
            if one.id in digests:
                where = f"{file}:{lines['hypotheses', place, 'id']}"
                also = "stands twice" if one.id in {e.id for e in entries[:place]} else "comes with peft-vit already"
                raise UserError(f"the id {one.id!r} {also}; rename one", file=where, field=f"hypotheses[{place}].id")
            digests[one.id] = digest_of(plain)
        found += entries
        content.update(_bytes_of(file))
    return Registry(tuple(found), content.hexdigest(), _with_families(found, digests))


def _with_families(hypotheses: Sequence[Hypothesis], digests: dict[str, str]) -> dict[str, str]:
    """Return digests that also cover the family, whose size is part of the test.

    Otherwise a sentence could lose the others that it was to be corrected with after the run, and stay registered.
    """
    families: dict[str, list[str]] = {}
    for one in hypotheses:
        families.setdefault(one.family or f"alone: {one.id}", []).append(one.id)
    covered = {}
    for members in families.values():
        whole = sorted(digests[member] for member in members)
        for member in members:
            alone = len(members) == 1
            covered[member] = digests[member] if alone else digest_of({"entry": digests[member], "family": whole})
    return {one.id: covered[one.id] for one in hypotheses}


def digest_of(entry: dict[str, Any]) -> str:
    """Return the SHA-256 of an entry's content, whatever the order of its keys, its line breaks and its comments."""
    return hashlib.sha256(json.dumps(entry, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _read(file: Path) -> tuple[list[Hypothesis], list[dict[str, Any]], Lines]:
    if not file.is_file():
        raise UserError("is no file; give the path of a YAML file with hypotheses", file=file)
    data, lines = read_mapping(file)
    try:
        raw = _File.model_validate_json(json.dumps(data)).hypotheses
    except ValidationError as error:
        raise one_line(error, lines, file) from None
    return [_entry(one, place, lines, file) for place, one in enumerate(raw)], list(raw), lines


def _entry(raw: dict[str, Any], place: int, lines: Lines, file: Path) -> Hypothesis:
    path = ("hypotheses", place)
    try:
        hypothesis = Hypothesis.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise one_line(error, lines, file, path) from None
    if hypothesis.test == "untestable":
        return hypothesis
    if hypothesis.measure not in MEASURES:
        problem = f"there is no measure {hypothesis.measure!r}; there are {', '.join(sorted(MEASURES))}"
        raise _fault(problem, (*path, "measure"), lines, file)
    try:
        arguments = hypothesis.arguments()
    except ValidationError as error:
        raise one_line(error, lines, file, (*path, "parameters")) from None
    unit = hypothesis.how.unit_of(arguments)
    if hypothesis.unit != unit:
        raise _fault(f"the measure's unit is {unit!r}, not {hypothesis.unit!r}", (*path, "unit"), lines, file)
    return hypothesis


def _fault(problem: str, path: tuple[str | int, ...], lines: Lines, file: Path) -> UserError:
    return UserError(problem, file=f"{file}:{lines[path]}", field=f"hypotheses[{path[1]}].{path[-1]}")


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", file=file) from None
