"""What a kind of file is to the torture tests: a sound file, ways to spoil it, and what the package does with it."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mutations
from mutations import Mutation


@dataclass(frozen=True)
class Target:
    """A sound file to spoil."""

    file: Path
    spoil: tuple[Mutation, ...]  # ways to do it; one is drawn
    open: Callable[[], object]  # what the package does with it; may raise UserError and nothing else
    command: tuple[object, ...]  # the same through the command line
    # What else changes with the content, so that hashes do not give it away at once.
    believed: Callable[[bytes], dict[Path, bytes]] = lambda _: {}
    names: tuple[Path, ...] = ()  # what a refusal may name in place of the file, such as the folder that is opened
    places: bool = False  # whether a refusal has to name a field or a line, beside the file
    prepare: Callable[[], object] = lambda: None  # what the command needs, called when the file is spoiled


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
        return mutations.of_bytes(self.tokens, [other.read_bytes() for other in others])


def is_one_line(text: str) -> bool:
    """Return whether a terminal shows a text as one line and does nothing else: it ends no line, moves no cursor."""
    return not any(
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(character) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
        for character in text
    )
