"""A message is one line of bounded length that does nothing to the terminal it is printed on."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_vit.errors import UserError, named, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\nb\tc\x7f", r"a\nb\tc\x7f"),
        ("\x9b31m", r"\x9b31m"),
        ("\u202egnp.exe\u2029", r"\u202egnp.exe\u2029"),
        ("\udce9", r"\udce9"),
        ("Grüße, 日本語 \U0001f44b\u200d", "Grüße, 日本語 \U0001f44b\u200d"),
    ],
)
def test_what_would_move_a_terminal_is_written_out(text: str, shown: str) -> None:
    assert printable(text) == shown
    line = str(UserError("is wrong", file=f"{text}.yaml", field=text))
    assert line == f"{shown}.yaml: {shown}: is wrong"
    line.encode()


def test_a_long_name_does_not_hide_the_remedy() -> None:
    line = str(UserError("is wrong; do this", file="x" * 10_000, field="y" * 10_000))
    assert line.endswith(": is wrong; do this")
    assert len(line) < 1100
    assert len(str(UserError("z" * 10_000))) < 2100


def test_a_file_is_named_where_none_was() -> None:
    with pytest.raises(UserError, match=r"^a: seed: is wrong$"), named(Path("a")):
        raise UserError("is wrong", field="seed", details="more")
    with pytest.raises(UserError, match=r"^b: is wrong$"), named(Path("a")):
        raise UserError("is wrong", file="b")
