"""One YAML file to plain values and the line of each, or one line that says what is wrong with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from peft_vit.errors import CONTROL_CHARACTER, UserError

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
        self._nodes = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        for attribute, what in (("anchor", "anchors and aliases (&name, *name)"), ("tag", "tags (!name)")):
            if getattr(event, attribute, None) is not None:
                self._refuse(f"{what} are not accepted; write the value out", event)
        if self._nodes >= _MAX_NODES:  # PyYAML takes a millisecond for some
            self._refuse(f"more than {_MAX_NODES} keys and values; split it into several studies", event)
        if self._depth > _MAX_DEPTH:
            self._refuse(f"nested deeper than {_MAX_DEPTH} levels; flatten it", event)
        self._nodes += 1
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _refuse(self, problem: str, event: Any) -> NoReturn:
        raise yaml.constructor.ConstructorError(None, None, problem, event.start_mark)


for _tag, _pattern, _first in (
    ("null", r"(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)$", list("-+0123456789")),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$", list("-+.0123456789")),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)

_MAX_BYTES = 1 << 17
_MAX_NODES = 5000
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
            problem = f"a key must be text, not {key!r}" if scalar else "a key must be text, not a list or a mapping"
            raise UserError(f"{problem}; rename it or put it in quotes", file=where, field=dotted(path))
        if key in mapping:
            raise UserError("this key stands twice; remove one", file=where, field=dotted((*path, key)))
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
        problem = f"cannot be read ({error.strerror}); give the path of a YAML file"
        raise UserError(problem, file=file) from None
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
