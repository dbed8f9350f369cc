"""A YAML file to a study: shared settings are filled in, and every fault is one line that names where it stands.

A list of learning rates in a file stands for an experiment a rate; nothing outside this module knows of such lists.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from pydantic import ValidationError

from peft_vit.base.errors import CONTROL_CHARACTER, UserError, problem_of
from peft_vit.base.settings import AS_WRITTEN, Request
from peft_vit.core.config.methods import METHOD_KINDS
from peft_vit.core.config.study import PROBE_READS, ExperimentConfig, StudyConfig
from peft_vit.core.config.training import TrainingConfig

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

KeyPath = tuple[str | int, ...]
Lines = dict[KeyPath, int]


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema, and without anchors, aliases and tags.

    YAML 1.1, which PyYAML follows, reads 1e-3 as text, 010 as eight, 1:30 as ninety, no as false and 2024-1-1
    as a date. Here the first is a number and the others are text, refused wherever a number is due.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012  # filled below; PyYAML declares it on the instance

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        for attribute, what in (("anchor", "anchors and aliases (&name, *name)"), ("tag", "tags (!name)")):
            if getattr(event, attribute, None) is not None:
                self._refuse(f"{what} are not accepted; write the value out", event)
        if self._depth > _MAX_DEPTH:
            self._refuse(f"nested deeper than {_MAX_DEPTH} levels; flatten it", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _refuse(self, reason: str, event: Any) -> NoReturn:
        raise yaml.constructor.ConstructorError(None, None, reason, event.start_mark)


for _tag, _pattern, _first in (
    ("null", r"(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)$", list("-+0123456789")),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$", list("-+.0123456789")),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)

_MAX_BYTES = 1 << 16
_MAX_DEPTH = 20
_LINE_BREAKS = str.maketrans("", "", "\n\t")  # the only control characters that a text may hold


def dotted(path: KeyPath) -> str | None:
    """Return ``experiments[2].lora.rank``; odd keys are quoted and long ones cut."""
    text = ""
    for part in path:
        name = part if isinstance(part, int) or part.isidentifier() else repr(part)
        text += f"[{name}]" if isinstance(part, int) else f".{name}"[:65]
    return text.lstrip(".") or None


def _scalar(node: yaml.Node, loader: _StrictLoader, where: str, field: str | None) -> Any:
    try:
        value = loader.construct_object(node)
    except ValueError:
        raise UserError("is a number of too many digits", file=where, field=field) from None
    if isinstance(value, str) and CONTROL_CHARACTER.search(value.translate(_LINE_BREAKS)):
        raise UserError("holds a control character or half a character; remove it", file=where, field=field)
    return value


def _read(node: yaml.Node, loader: _StrictLoader, path: KeyPath, lines: Lines, file: Path) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)  # a mapping has already set the line of the key
    where = f"{file}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        return [_read(child, loader, (*path, i), lines, file) for i, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return _scalar(node, loader, where, dotted(path))
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        where = f"{file}:{key_node.start_mark.line + 1}"
        scalar = isinstance(key_node, yaml.ScalarNode)
        key = _scalar(key_node, loader, where, dotted(path)) if scalar else None
        if not isinstance(key, str):
            message = f"a key must be text, not {key!r}" if scalar else "a key must be text, not a list or a mapping"
            raise UserError(f"{message}; rename it or put it in quotes", file=where, field=dotted(path))
        if key in mapping:
            raise UserError("this key occurs twice; remove one", file=where, field=dotted((*path, key)))
        lines[*path, key] = key_node.start_mark.line + 1
        mapping[key] = _read(value_node, loader, (*path, key), lines, file)
    return mapping


def read_mapping(file: Path) -> tuple[dict[str, Any], Lines]:
    """Read a file whose top is a mapping; also return the line of each key and list item, for messages.

    Raises:
        UserError: with file and line, for anything else.
    """
    try:
        with file.open("rb") as handle:
            raw = handle.read(_MAX_BYTES + 1)  # no more than that: it could be any file
    except OSError as error:
        message = f"cannot be read ({error.strerror}); give the path of a YAML file"
        raise UserError(message, file=file) from None
    if len(raw) > _MAX_BYTES:
        raise UserError(f"is larger than {_MAX_BYTES} bytes; a configuration is small", file=file)
    lines: Lines = {}
    text = ""
    try:
        text = raw.decode("utf-8")
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        data = None if node is None else _read(node, loader, (), lines, file)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError("is not UTF-8 text; save it as UTF-8", file=f"{file}:{line}") from None
    except yaml.reader.ReaderError as error:
        where = f"{file}:{text.count(chr(10), 0, error.position) + 1}"
        raise UserError("holds a control character; a configuration is plain text", file=where) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise UserError(f"is not valid YAML here: {error.problem or error.context}", file=where) from None
    if not isinstance(data, dict):
        raise UserError("expected a mapping (key: value) at the top, with the keys of a study", file=file)
    return data, lines


_LARGEST_RATE = 1e6
_KEYS = {*StudyConfig.model_fields, *ExperimentConfig.model_fields}  # with which what a configuration says begins


def load_study(file: str | Path) -> StudyConfig:
    """Read and check one configuration file.

    Raises:
        UserError: with file, line, field and remedy, for anything that is not a valid study.
    """
    file = Path(file)
    data, lines = read_mapping(file)
    shared, experiments = data.pop("training", {}), data.get("experiments")
    if not isinstance(shared, dict):
        message = f"expected a mapping of settings, got {reprlib.repr(shared)}"
        raise UserError(message, file=f"{file}:{lines['training',]}", field="training")
    if not isinstance(experiments, list) or not all(
        isinstance(experiment, dict) and isinstance(experiment.get("training", {}), dict) for experiment in experiments
    ):
        if isinstance(experiments, list):
            data["experiments"] = [{"training": shared, **one} if isinstance(one, dict) else one for one in experiments]
        return study_from_mapping(data, file=file, lines=lines)  # which names what is of a wrong shape
    filled = {**data, "experiments": _fill_training(experiments, shared, lines, file)}
    _check_rates(filled, lines, file)
    at_first = at_rates(filled, first=True)
    study = study_from_mapping(at_first, file=file, lines=lines)  # names faults where they stand, once
    expanded = at_rates(filled, first=False)
    return study if expanded == filled else study_from_mapping(expanded, file=file)


def study_from_mapping(data: dict[str, Any], *, file: Path, lines: Lines | None = None) -> StudyConfig:
    """Check a mapping of the shape of a configuration file; `file` is only named in errors."""
    try:
        # Through JSON, so that strict checking still turns lists into tuples.
        return StudyConfig.model_validate_json(json.dumps(data, default=str), context=AS_WRITTEN)
    except ValidationError as error:
        raise _one_line(error, lines or {}, file) from None
    except ValueError as error:
        raise UserError(str(error), file=file) from None


@contextmanager
def named_as_typed(request: type[Request]) -> Iterator[None]:
    """Name options in errors of what they fill in: fields, and keys of a configuration, of which others go unnamed."""
    typed = [request.option(field) for field in request.model_fields]
    options = {option.name[2:].replace("-", "_"): option.name for option in typed if not option.is_argument}
    options |= {key: option.name for option in typed for key in option.keys}
    try:
        yield
    except UserError as error:
        field = error.field or ""
        if field not in options and re.split(r"[.\[]", field)[0] not in _KEYS:
            raise
        raise error.about(options.get(field.rpartition(".")[2])) from None


def _fill_training(
    experiments: list[dict[str, Any]], shared: dict[str, Any], lines: Lines, file: Path
) -> list[dict[str, Any]]:
    """Return the experiments with the study's `training:` under each one's own.

    What one experiment can't read is for the others. Where none reads it, it goes to all, and is refused.
    """
    own = [experiment.get("training", {}) for experiment in experiments]
    is_probe = [
        isinstance(method := experiment.get("method"), str)
        and method in METHOD_KINDS
        and METHOD_KINDS[method].trains == "head"
        for experiment in experiments
    ]
    fits_probe = [
        probe or {**shared, **training}.get("head_start") == "probe"
        for probe, training in zip(is_probe, own, strict=True)
    ]
    filled = []
    for place, training in enumerate(own):
        merged = dict(shared)
        if is_probe[place] and not all(is_probe):
            merged = {key: value for key, value in shared.items() if key in PROBE_READS}
            if isinstance(changes := merged.get("augmentation"), list):
                flips = (change == "flip" or (isinstance(change, dict) and "flip" in change) for change in changes)
                merged["augmentation"] = [change for change, is_flip in zip(changes, flips, strict=True) if is_flip]
        if any(fits_probe) and not fits_probe[place]:
            merged.pop("probe_l2", None)
        if {"epochs", "steps"} & training.keys():  # a length of one's own replaces the study's, however either is said
            merged = {key: value for key, value in merged.items() if key not in ("epochs", "steps")}
        merged |= training
        merged.setdefault("compute", "auto")
        for key in merged if is_probe[place] else ():
            if key in TrainingConfig.model_fields and key not in PROBE_READS:
                path: KeyPath = ("experiments", place, "training", key)
                path = path if path in lines else path[2:]
                message = "has no effect on a linear probe, which is fitted to convergence; remove it"
                raise UserError(message, file=f"{file}:{lines[path]}", field=dotted(path))
        filled.append({**experiments[place], "training": merged})
    return filled


def _check_rates(study: dict[str, Any], lines: Lines, file: Path) -> None:
    """Refuse lists that hold anything but learning rates that differ, in a study with `training` filled in."""
    for place, experiment in enumerate(study["experiments"]):
        rates = experiment["training"].get("learning_rate")
        if not isinstance(rates, list):
            continue
        sound = all(type(rate) in (int, float) and 0 < rate <= _LARGEST_RATE for rate in rates)
        if not (sound and rates and len(set(rates)) == len(rates)):
            own = ("experiments", place, "training", "learning_rate")
            path = own if own in lines else own[2:]
            message = f"expected a number above 0, or a list of some that differ, got {reprlib.repr(rates)}"
            raise UserError(message, file=f"{file}:{lines[path]}", field=dotted(path))


def at_rates(study: dict[str, Any], *, first: bool) -> dict[str, Any]:
    """Return the study with an experiment a rate in the place of each with a list: `lora` becomes `lora_lr_1e-3`.

    With `first` it stays one, under its own name, at the first rate of its list.
    """
    experiments = []
    for experiment in study["experiments"]:
        rates = experiment.get("training", {}).get("learning_rate")
        if not isinstance(rates, list):
            experiments.append(experiment)
            continue
        for rate in rates[:1] if first else rates:
            at_rate = {**experiment, "training": {**experiment["training"], "learning_rate": rate}}
            if not first:
                at_rate["name"] = f"{experiment.get('name')}_lr_{_as_name(rate)}"
            experiments.append(at_rate)
    return {**study, "experiments": experiments}


def _as_name(rate: float) -> str:
    """Return 3e-4 for 0.0003 and 2_5e-4 for 0.00025: a name holds no full stop."""
    mantissa, exponent = f"{rate:.14e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace(".", "_")


def _one_line(error: ValidationError, lines: Lines, file: Path) -> UserError:
    """Return the first fault with its line, and how many more there are."""
    details = error.errors(include_url=False)
    echoes = {detail["loc"][:n] for detail in details for n in range(len(detail["loc"]))}
    faults: dict[KeyPath, ErrorDetails] = {}
    for detail in details:
        path: KeyPath = detail["loc"]
        shared: KeyPath = ("training", *path[3:])
        if path[2:3] == ("training",) and path not in lines and shared in lines:
            path = shared  # where it stands in the file: the study's `training` was copied to the experiments
        # A list whose items have faults is also too short for pydantic, which counts only the sound ones.
        if detail["type"] != "too_short" or path not in echoes:
            faults.setdefault(path, detail)
    # An unknown key first: a misspelled one is also reported as missing, which misleads.
    path, first = min(faults.items(), key=lambda fault: fault[1]["type"] != "extra_forbidden")
    message = problem_of(first)
    if len(faults) > 1:
        message += f" ({len(faults) - 1} more fault{'s' if len(faults) > 2 else ''} in this file)"
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    return UserError(message, file=f"{file}:{line}" if line else str(file), field=dotted(path))
