"""A case: one sound file is spoiled, the package reads it, and what came of it is judged."""

from __future__ import annotations

import os
import random
import re
import resource
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import guard
import sound_files
from kinds import KINDS
from mutations import Nasty, Target, is_one_line, nasty_texts

from peft_vit.base.errors import UserError

SLOW_S = 20.0  # of processor time
_CLEARED_EVERY = 100  # cases, of the cache that they fill
_PLACE = re.compile(r":\d+: |line \d+|: .+?: ")  # a line or a field, which may be any text
_NO_PLACE = re.compile("larger than|expected a mapping|more than|Expecting|readable|deeper")  # the fault is everywhere


class Cases:
    """Spoiled files by number: what case 17 does follows from the seed and 17 alone."""

    def __init__(self, root: Path, seed: int, *, onnx: bool, kinds: Sequence[str] = (), watched: bool = True) -> None:
        self.sound = sound_files.make_sound_files(root, onnx=onnx)
        self._seed = seed
        nasty = Nasty(nasty_texts(str(self.sound.outside), str(self.sound.marker)))
        chosen = {name: make for name, make in KINDS.items() if not kinds or name in kinds}
        self.targets = {name: make(self.sound, nasty) for name, make in chosen.items()}
        for targets in self.targets.values():
            for target in targets:
                target.open()  # what is spoiled has to be sound before
        os.chdir(self.sound.root / "tmp")
        self._seen: list[str] = []
        if watched:
            guard.install([self.sound.root], self._seen.append)
        self._memory_kb = 0

    def kind(self, number: int) -> str:
        names = list(self.targets)
        return names[number % len(names)]

    @contextmanager
    def spoiled(self, kind: str, number: int) -> Iterator[Target]:
        """Put a spoiled file in its place for a while."""
        rng = random.Random(f"{self._seed}/{kind}/{number}")
        target = rng.choice(self.targets[kind])
        before = {target.file: target.file.read_bytes()}
        content = rng.choice(target.spoil)(rng, before[target.file])
        after = {target.file: content, **target.believed(content)}
        before |= {file: file.read_bytes() for file in after}
        try:
            for file, changed in after.items():
                file.write_bytes(changed)
            yield target
        finally:
            for file, sound in before.items():
                file.write_bytes(sound)

    def do(self, number: int) -> tuple[str | None, bool]:
        """Do a case; return its fault, if it has one, and whether the package took the file."""
        name = f"{self.kind(number)}:{self._seed}:{number}"
        if number % _CLEARED_EVERY == 0:
            files = {target.file for targets in self.targets.values() for target in targets}
            for folder in ("pixels", "hashes"):
                for path in (self.sound.cache / folder).rglob("*"):
                    if path.is_file() and path not in files:
                        path.unlink()
        with self.spoiled(self.kind(number), number) as target:
            self._seen.clear()
            started = time.process_time()
            fault, read = judged(target)
            seconds = time.process_time() - started
            seen = list(self._seen)
        memory_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if self._memory_kb and memory_kb - self._memory_kb > 1 << 20:
            fault = fault or f"took {(memory_kb - self._memory_kb) >> 10} MiB of memory"
        self._memory_kb = memory_kb
        if seconds > SLOW_S:
            fault = fault or f"took {seconds:.0f} s"
        fault = self.sound.fault_outside() or fault or (f"did {seen[:3]}" if seen else None)
        return (None if fault is None else f"{name}: {target.file.name}: {fault}"), read


def judged(target: Target) -> tuple[str | None, bool]:
    """Return what is wrong with the way a spoiled file is taken, and whether it was read."""
    try:
        target.open()
    except UserError as error:
        return fault_of(str(error), target, error.field), False
    except Exception:
        return traceback.format_exc()[-3000:], False
    return None, True


def fault_of(line: str, target: Target, field: str | None = None) -> str | None:
    """Return what a refusal lacks: it is one line that names the file and, where there is one, the field or the line.

    Args:
        line: what the package said.
        target: what it had to read.
        field: the one that the error bears, if it is at hand; else it is looked for in the line.
    """
    if not is_one_line(line) or len(line) > 4000:
        return f"says {line[:300]!r}"
    if not any(str(name) in line for name in (target.file.name, *target.names)):
        return f"does not name the file: {line[:500]}"
    if target.places and field is None and not _PLACE.search(line) and not _NO_PLACE.search(line):
        return f"names neither field nor line: {line[:500]}"
    return None
