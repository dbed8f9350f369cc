"""Shards: tar files in webdataset's layout, of which any image is one seek and one read away.

Files of a sample lie in one tar and share a name up to its first dot, such as `0001.jpg` and `0001.cls`. A tar is read
through once; where its images begin, their hashes and their labels are then remembered in the cache. Nothing is
unpacked, and names and places alone stay in memory. A stream of shards would be shuffled in a buffer, and repeats or
drops images where processes get shards of different lengths; with places, an epoch is one permutation of all images.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from peft_vit.base.errors import UserError, foreign_fault
from peft_vit.base.files import LARGEST_BYTES
from peft_vit.data.files import HIDDEN, IMAGE_SUFFIXES, FileTree, Hashes, fixed_part, matching, remembered, stamps

_LABELS = (".cls", ".json", ".txt")  # the first of them that a sample has says its label
_KEYS = ("label", "class")  # in a .json
_MOST_TEXT = 1 << 20  # bytes of a label
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"(\xb5/\xfd": "unzstd"}
_BLOCK = 512  # bytes; two of zeros end a tar
_REMEDY = "write it again"


class _Sample(NamedTuple):
    """A sample of a shard as the cache has it; of its image, name, first byte, bytes and SHA-256, and of its label."""

    key: str
    image: str = ""
    offset: int = 0
    size: int = 0
    sha256: str = ""
    label: str = ""
    kind: str = ""  # of the label: what it is written in, and whether as number or as name
    fault: str = ""  # why it can't be used


def read_shards(path: Path) -> tuple[FileTree, list[tuple[str, str, str]], dict[str, str]]:
    """Find the samples of a tar, or of those that a pattern matches.

    Returns:
        Their images, by names that begin with the shard's; name, label and shard of each sample; and why, by name,
        samples without one image and one label are left out.

    Raises:
        UserError: if a tar is compressed or damaged, or labels are written in several ways.
    """
    root = fixed_part(path)
    places: dict[str, tuple[Path, _Sample]] = {}
    rows: list[tuple[str, str, str]] = []
    left_out: dict[str, str] = {}
    first: tuple[str, str] | None = None  # kind of a label, and whose
    for file in matching(path):
        shard = file.relative_to(root).as_posix()
        for sample in _samples(file):
            name = f"{shard}/{sample.image or sample.key}"
            if sample.fault:
                left_out[name] = sample.fault
                continue
            first = first or (sample.kind, name)
            if sample.kind != first[0]:
                message = f"has a label as {sample.kind}, and {first[1]} as {first[0]}; write all in one way"
                raise UserError(message, file=root / name)
            places[name] = file, sample
            rows.append((name, sample.label, shard))

    def read(name: str) -> bytes:
        file, sample = places[name]
        with file.open("rb") as tar:
            tar.seek(sample.offset)
            return tar.read(sample.size)

    def hashed(used: list[str]) -> Hashes:
        return Hashes.of({name: places[name][1].sha256 for name in used})

    return FileTree(path, tuple(sorted(places)), read, hashed, base=root), rows, left_out


def _samples(file: Path) -> list[_Sample]:
    def compute() -> list[_Sample]:
        with foreign_fault("is not a tar that can be read", file, remedy=_REMEDY), file.open("rb") as content:
            return list(_found_in(content, file))

    return remembered("hashes", stamps({"samples": file}), compute, lambda saved: [_Sample(*one) for one in saved])


def _found_in(content: BinaryIO, file: Path) -> Iterable[_Sample]:
    start = content.read(6)
    for magic, command in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(f"is compressed, so no image in it can be found alone; unpack it with {command}", file=file)
    content.seek(0)
    found: dict[str, list[tuple[str, int, int]]] = {}  # members by sample
    with tarfile.open(fileobj=content, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would hold all of them
            path = PurePosixPath(member.name)
            if member.isreg() and not member.issparse() and not HIDDEN.search(str(path)):
                if ".." in path.parts or path.is_absolute() or "\\" in member.name:
                    raise UserError(f"holds a file of the name {member.name!r}, which leads out of it", file=file)
                key = str(path.parent / path.name.partition(".")[0])
                found.setdefault(key, []).append((str(path), member.offset_data, member.size))
        content.seek(tar.offset)
        if any(content.read(_BLOCK)):  # tarfile takes what it can't read for the end
            raise UserError(f"is damaged at byte {tar.offset:,}; {_REMEDY}", file=file)

    def read(at: int, size: int) -> bytes:
        content.seek(at)
        return content.read(size)

    for key, members in sorted(found.items()):
        yield _sample(key, members, read)


def _sample(key: str, members: list[tuple[str, int, int]], read: Callable[[int, int], bytes]) -> _Sample:
    """Return what members of one sample come to: name, first byte and bytes of each."""
    images = [member for member in members if member[0].lower().endswith(IMAGE_SUFFIXES)]
    if len(images) != 1:
        names = " and ".join(PurePosixPath(name).name for name, *_ in images[:2])
        return _Sample(key, fault=f"has {len(images)} images ({names}), not one" if images else "has no image")
    (name, offset, size) = images[0]
    fault = partial(_Sample, key, name)
    if size > LARGEST_BYTES:
        return fault(fault=f"is larger than {LARGEST_BYTES} bytes")
    said: tuple[str, str] | None = None
    for suffix in _LABELS:
        for other, at, length in members:
            if said is None and other.lower().endswith(suffix):
                try:
                    if length > _MOST_TEXT:
                        raise ValueError
                    said = _label(suffix, read(at, length).decode("utf-8-sig"))
                except ValueError:
                    return fault(fault=f"has a {suffix} that can't be read")
    if said is None:
        return fault(fault=f"has no label ({' '.join(_LABELS)})")
    return _Sample(key, name, offset, size, hashlib.sha256(read(offset, size)).hexdigest(), *said)


def _label(suffix: str, text: str) -> tuple[str, str] | None:
    """Return a label as a table has it and how it is written; None: there is none."""
    if suffix != ".json":
        text = text.strip()
        kind = suffix if suffix == ".txt" else f"{suffix} with a {'number' if text.isdecimal() else 'name'}"
        return (text, kind) if text else None
    content: Any = json.loads(text)
    value = next((content[key] for key in _KEYS if key in content), None) if isinstance(content, dict) else None
    if isinstance(value, list):
        return "|".join(map(str, value)), ".json with a list"
    if isinstance(value, str):
        return value.strip(), ".json with a name"
    return (str(value), ".json with a number") if isinstance(value, int | float) else None
