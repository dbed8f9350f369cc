"""A ledger gives back what was written, sets a torn end aside, and names the line that is damaged."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_vit.errors import UserError
from peft_vit.records.ledger import LEDGER_FILE, Row, encode, last_rows, read_ledger, sound_rows
from peft_vit.studies.ledger import Ledger, rewrite_ledger

pytestmark = pytest.mark.part("runner")

ROWS = [
    Row(at="2030-01-01T00:00:00+00:00", run="a/seed_0", event="started", attempt=1, worker="µ", total_steps=9),
    Row(at="2030-01-01T00:00:01+00:00", run="a/seed_0", event="interrupted", attempt=1, step=4),
    Row(at="2030-01-01T00:00:02+00:00", run="b/seed_7", event="failed", attempt=2, error='a\n"b\ud800', retried=True),
    Row(at="2030-01-01T00:00:03+00:00", run="a/seed_0", event="done", attempt=2, seconds=0.1, adapter_sha256="ff"),
]
LINES = [encode(row) for row in ROWS]
WHOLE = b"".join(LINES)
ENDS = [len(b"".join(LINES[:count])) for count in range(len(LINES) + 1)]
NEXT = Row(at="2030-01-02T00:00:00+00:00", run="c/seed_1", event="started", attempt=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


def lay(folder: Path, content: bytes) -> Path:
    """Put a ledger into an otherwise empty folder."""
    for file in folder.iterdir():
        file.unlink()
    (folder / LEDGER_FILE).write_bytes(content)
    return folder / LEDGER_FILE


def test_rows_come_back_as_they_were_written(folder) -> None:
    file = lay(folder, b"")
    ledger = Ledger(folder)
    for row in ROWS:
        ledger.append(row)
        assert read_ledger(file).rows[-1] == row  # at once, also for other processes
    ledger.close()
    assert file.read_bytes() == WHOLE
    assert list(read_ledger(file).rows) == ledger.rows == ROWS
    assert last_rows(ROWS) == {"a/seed_0": ROWS[3], "b/seed_7": ROWS[2]}
    assert json.loads(LINES[1])["row"] == {
        "at": "2030-01-01T00:00:01+00:00",
        "run": "a/seed_0",
        "event": "interrupted",
        "attempt": 1,
        "step": 4,
    }


def test_no_ledger_has_no_rows(tmp_path) -> None:
    assert read_ledger(tmp_path / LEDGER_FILE).rows == ()


def test_a_ledger_that_is_cut_short_anywhere(folder, monkeypatch) -> None:
    """What is torn is moved away and nothing is appended to it, whether or not its last byte is all that lacks."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and of no account here
    for length in range(len(WHOLE)):
        file = lay(folder, WHOLE[:length])
        count = max(index for index, end in enumerate(ENDS) if end <= length)
        torn = WHOLE[ENDS[count] : length]
        content = read_ledger(file)
        assert (list(content.rows), content.sound_bytes, content.torn) == (ROWS[:count], ENDS[count], torn)
        assert file.read_bytes() == WHOLE[:length]  # reading changes nothing
        ledger = Ledger(folder)
        ledger.append(NEXT)
        ledger.close()
        assert file.read_bytes() == WHOLE[: ENDS[count]] + encode(NEXT)
        aside = folder / "ledger.torn-1"
        assert ledger.set_aside == (aside if torn else None)
        assert (aside.read_bytes() if aside.exists() else b"") == torn


def test_what_was_set_aside_before_stays(folder) -> None:
    lay(folder, WHOLE[:-1])
    Ledger(folder).close()
    with (folder / LEDGER_FILE).open("ab") as file:
        file.write(b"half a li")
    ledger = Ledger(folder)
    ledger.close()
    assert ledger.set_aside == folder / "ledger.torn-2"
    assert (folder / "ledger.torn-1").read_bytes() == LINES[-1][:-1]
    assert (folder / "ledger.torn-2").read_bytes() == b"half a li"


changes = st.one_of(
    st.tuples(st.just("replace"), st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=4)),
    st.tuples(st.just("insert"), st.integers(0, len(WHOLE)), st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("delete"), st.integers(0, len(WHOLE) - 1), st.integers(1, 200)),
)


def mutated(kind, place, what) -> bytes:
    if kind == "replace":
        return WHOLE[:place] + what + WHOLE[place + len(what) :]
    if kind == "insert":
        return WHOLE[:place] + what + WHOLE[place:]
    return WHOLE[:place] + WHOLE[place + what :]


@settings(max_examples=150)
@given(changes)
def test_a_ledger_that_was_changed_is_never_believed(folder, change) -> None:
    """No row comes out that was not written; what is not the last line is an error that names its line."""
    content = mutated(*change)
    file = lay(folder, content)
    try:
        found = read_ledger(file)
    except UserError as error:
        place, _, said = str(error).partition(": ")
        name, _, number = place.rpartition(":")
        assert name == str(file)
        assert f"`peft-vit repair {folder}`" in said
        assert content.split(b"\n")[int(number) - 1] + b"\n" not in LINES
        rows, damaged = sound_rows(file)
        assert damaged >= 1
        aside = rewrite_ledger(folder, rows)
        assert aside is not None
        assert aside.read_bytes() == content
        assert list(read_ledger(file).rows) == rows
    else:
        rows = list(found.rows)
        assert content[: found.sound_bytes] + found.torn == content
    assert set(map(encode, rows)) <= set(LINES)


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_any_bytes_at_all_are_a_torn_line_or_an_error(folder, content) -> None:
    file = lay(folder, content)
    try:
        found = read_ledger(file)
    except UserError as error:
        assert error.file.startswith(f"{file}:")  # noqa: PT017 - most examples raise nothing
    else:
        assert (found.rows, found.torn) == ((), content)


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"row":{},"sha256":"44136fa355b3678a"}',
        b'{"row":' + b"9" * 5000 + b',"sha256":""}',
        b"\xff",
        b'{"row":NaN,"sha256":""}',
        b'{"sha256":""}',
        b"null",
    ],
)
def test_odd_lines_are_damaged_ones(folder, line) -> None:
    file = lay(folder, LINES[0] + line + b"\n" + LINES[1])
    with pytest.raises(UserError, match=r"ledger\.jsonl:2: this line is damaged \(.*peft-vit repair"):
        read_ledger(file)


def test_a_row_cannot_name_a_place_outside_the_study() -> None:
    for name in ("../seed_1", "a/../seed_1", "/a/seed_1", "a/b/seed_1", "a/seed_1/..", "a/seed_x", "a\0/seed_1", "a"):
        with pytest.raises(ValueError, match="run"):
            Row(at="", run=name, event="done", attempt=1)
