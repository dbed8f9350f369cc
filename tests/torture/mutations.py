"""A sound file of some kind, and ways to spoil it: bits, bytes and pieces at random, values replaced by nasty ones.

Whatever is drawn comes from the generator that is handed in, so that a case can be made again.
"""

from __future__ import annotations

import copy
import json
import struct
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

Mutation = Callable[[Random, bytes], bytes]


_LEADING_OUT = ("../../../../escaped", "/etc/passwd", "/dev/zero", "~root", "..", ".", "a/b", "a\\b", "\\\\server\\x")
_ODD_NAMES = ("", " ", "-rf", "CON", "a\0b", "x" * 300, "x" * 70_000, "__class__", "__proto__")
_CHARACTERS = ("\ud800", "\ufeff", "é", "日本語", "\x1b]0;x\x07", "\x1b[2J", "\x9b31m", "\u202egnp", "two\nlines")
_OTHER_TYPES = ("null", "true", "NaN", "-Infinity", "1e999", "0x10", "1_000", "09", "9" * 5000)
_OF_YAML = ("*a", "&a b", "<<", "? :", "---", "[")
_TEMPLATES = ("${HOME}", "{{ 7 * 7 }}", "%s%n", "=1+1", "<script>x()</script>")
_ADDRESSES = ("hf-hub:somebody/model", "local-dir:/tmp", "file:///etc/passwd", "http://127.0.0.1:9/x")
_WHOLE = (0, -1, 1, 2, 10**9, 2**31, 2**63, -(2**63), 10**400)
_NUMBERS = (*_WHOLE, 0.0, -0.0, 1e-300, 1e308, 0.5, float("nan"), float("inf"))
NASTY_VALUES: tuple[Any, ...] = (None, True, False, *_NUMBERS, [], {}, [[]], [None], {"": None}, {"a": {"a": {}}})


def nasty_texts(outside: str, marker: str) -> tuple[str, ...]:
    """Return texts that lead out, run something, or mean something to what may read them.

    Args:
        outside: a folder in which nothing may appear.
        marker: a folder that comes to be if one of them is run.
    """
    code = (
        *(f"!!python/object/{tag}:os.mkdir [{marker}]" for tag in ("apply", "new")),
        *(form.replace("*", f"mkdir {marker}") for form in ("$(*)", "`*`", "; *")),
        f"__import__('os').mkdir('{marker}')",
        f"cos\nmkdir\n(V{marker}\ntR.",
    )
    plain = (*_LEADING_OUT, *_ODD_NAMES, *_CHARACTERS, *_OTHER_TYPES, *_OF_YAML, *_TEMPLATES, *_ADDRESSES)
    return (f"{outside}/escaped", *code, *plain)


def of_bytes(tokens: Sequence[bytes], others: Sequence[bytes] = ()) -> Mutation:
    """Return a mutation that knows nothing of what it changes: one to four changes, one after the other.

    Args:
        tokens: what to insert and to overwrite with.
        others: sound files of the same kind, to splice in.
    """

    def change(rng: Random, content: bytes) -> bytes:
        place = rng.randrange(len(content) + 1)
        end = min(len(content), place + rng.choice((1, 2, 4, 8, 64, 1024)))
        match rng.randrange(9):
            case 0 | 1 if content:
                place = rng.randrange(len(content))
                return content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]
            case 2:
                return content[:place]
            case 3:
                return content[:place] + content[end:]
            case 4:
                return content[:end] + content[place:]
            case 5:
                return content[:place] + rng.choice(tokens) + content[place:]
            case 6:
                return content[:place] + rng.choice(tokens) + content[place + 8 :]
            case 7:
                width = rng.choice((1, 2, 4, 8))
                number = rng.choice((0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), rng.randrange(256)))
                return (
                    content[:place] + number.to_bytes(width, rng.choice(("little", "big"))) + content[place + width :]
                )
            case _ if others:
                other = rng.choice(others)
                cut = rng.randrange(len(other) + 1)
                return content[:place] + other[cut:]
        return content + rng.randbytes(16)

    def mutate(rng: Random, content: bytes) -> bytes:
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            content = change(rng, content)
        return content

    return mutate


def of_json(texts: Sequence[str]) -> Mutation:
    """Return a mutation of JSON that stays JSON: a value, a key, an item or a whole part is another one."""

    def mutate(rng: Random, content: bytes) -> bytes:
        data = json.loads(content)
        for _ in range(rng.choice((1, 1, 2))):
            data = changed_value(rng, data, texts)
        return json.dumps(data).encode()

    return mutate


def changed_value(rng: Random, data: Any, texts: Sequence[str]) -> Any:
    """Return plain values with one change somewhere in them."""
    data = copy.deepcopy(data)
    holder, node = None, data
    while isinstance(node, dict | list) and node and (holder is None or rng.random() < 0.85):
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        holder, node = (node, key), node[key]
    if holder is None:
        return rng.choice(NASTY_VALUES)
    parent, key = holder
    other = rng.choice(texts) if rng.random() < 0.4 else copy.deepcopy(rng.choice(NASTY_VALUES))
    match rng.randrange(8):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[rng.choice(texts)] = parent.pop(key)
        case 2 if isinstance(parent, dict):
            parent[rng.choice(texts)] = copy.deepcopy(node)
        case 3 if isinstance(parent, list):
            parent.insert(key, copy.deepcopy(node))
        case 4 if isinstance(node, str) and node:
            cut = rng.randrange(len(node) + 1)
            parent[key] = node[:cut] + rng.choice(("", "x", "é", "\n", "0")) + node[cut + 1 :]
        case 5 if type(node) in (int, float):
            half = node / 2 if isinstance(node, float) else node // 2  # large ones are no floats
            parent[key] = rng.choice((node + 1, node - 1, -node, node * 10**6, half, str(node)))
        case _:
            parent[key] = other
    return data


def of_lines(texts: Sequence[str]) -> Mutation:
    """Return a mutation of YAML or CSV by its lines: values replaced, lines moved, doubled, indented, dropped."""

    def mutate(rng: Random, content: bytes) -> bytes:
        lines = content.decode().split("\n")
        for _ in range(rng.choice((1, 1, 2))):
            place = rng.randrange(len(lines))
            line = lines[place]
            separator = ":" if ":" in line else ","
            match rng.randrange(8):
                case 0 | 1 | 2:
                    head, _, _ = line.partition(separator)
                    lines[place] = f"{head}{separator} {rng.choice(texts)}"
                case 3:
                    lines.insert(rng.randrange(len(lines) + 1), line)
                case 4:
                    del lines[place]
                    lines = lines or [""]
                case 5:
                    lines[place] = rng.choice((" ", "  ", "\t", "- ", "")) + line.lstrip(rng.choice((" ", "- ")))
                case 6:
                    lines.insert(place, rng.choice(texts))
                case _:
                    words = line.split(" ")
                    words[rng.randrange(len(words))] = rng.choice(texts)
                    lines[place] = " ".join(words)
        return "\n".join(lines).encode(errors="surrogatepass")

    return mutate


def of_safetensors(texts: Sequence[str]) -> Mutation:
    """Return a mutation of a safetensors file's header, its JSON metadata included, that leaves the rest in place."""

    def mutate(rng: Random, content: bytes) -> bytes:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        metadata = header.get("__metadata__", {})
        if metadata and rng.random() < 0.7:
            key = rng.choice(list(metadata))
            try:
                metadata[key] = json.dumps(changed_value(rng, json.loads(metadata[key]), texts))
            except ValueError:
                metadata[key] = rng.choice(texts)
        else:
            header = changed_value(rng, header, texts)
        encoded = json.dumps(header).encode()
        return len(encoded).to_bytes(8, "little") + encoded + content[8 + size :]

    return mutate


def of_png(inner: Mutation) -> Mutation:
    """Return a mutation of one chunk of a PNG, whose checksum is made to fit again."""

    def mutate(rng: Random, content: bytes) -> bytes:
        chunks, place = [], 8
        while place + 8 <= len(content):
            (size,) = struct.unpack(">I", content[place : place + 4])
            chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + size]))
            place += 12 + size
        index = rng.randrange(len(chunks))
        kind, data = chunks[index]
        chunks[index] = (kind, inner(rng, data))
        body = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
        return content[:8] + b"".join(body)

    return mutate


def within(unwrap: Callable[[bytes], bytes], wrap: Callable[[bytes], bytes], inner: Mutation) -> Mutation:
    """Return a mutation of what a file holds packed."""
    return lambda rng, content: wrap(inner(rng, unwrap(content)))


@dataclass(frozen=True)
class Target:
    """A sound file to spoil."""

    file: Path
    spoil: tuple[Mutation, ...]  # ways to do it; one is drawn
    open: Callable[[], object]  # what the package does with it; may raise UserError and nothing else
    # What else changes with the content, so that hashes do not give it away at once.
    believed: Callable[[bytes], dict[Path, bytes]] = lambda _: {}
    names: tuple[Path, ...] = ()  # what a refusal may name instead of the file, such as the folder that is opened
    places: bool = False  # whether a refusal has to name a field or a line, beside the file


@dataclass(frozen=True)
class Nasty:
    """What mutations put into files: texts, and the same as bytes."""

    texts: tuple[str, ...]

    @property
    def tokens(self) -> tuple[bytes, ...]:
        """Return the texts as bytes, and some that are no text."""
        others = (b"\0", b"\xff" * 8, b"\x80\x04\x95", b"PK\3\4")
        return (*(text.encode(errors="surrogatepass") for text in self.texts), *others)

    def of_bytes(self, *others: Path) -> Mutation:
        """Return a mutation of bytes."""
        return of_bytes(self.tokens, [other.read_bytes() for other in others])


def is_one_line(text: str) -> bool:
    """Return whether a terminal shows a text as one line and does nothing else: it ends no line, moves no cursor."""
    return not any(
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(character) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
        for character in text
    )
