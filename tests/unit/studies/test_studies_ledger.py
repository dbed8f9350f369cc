"""A ledger gives back what was written, drops a torn end, and passes over what is no row."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_vit.records.ledger import LEDGER_FILE, Row, encode, last_rows, read_ledger, unreadable_lines
from peft_vit.studies.ledger import Ledger

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
    assert json.loads(LINES[1]) == {
        "at": "2030-01-01T00:00:01+00:00",
        "run": "a/seed_0",
        "event": "interrupted",
        "attempt": 1,
        "step": 4,
    }


def test_no_ledger_has_no_rows(tmp_path) -> None:
    assert read_ledger(tmp_path / LEDGER_FILE).rows == ()


def test_rows_of_an_older_ledger_stand_beside_a_checksum(folder) -> None:
    file = lay(folder, b'{"row":' + LINES[1].rstrip() + b',"sha256":"0123456789abcdef"}\n' + LINES[3])
    assert list(read_ledger(file).rows) == [ROWS[1], ROWS[3]]


def test_a_ledger_that_is_cut_short_anywhere(folder, monkeypatch) -> None:
    """Nothing is appended to what is torn, whether or not its last byte is all that lacks."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and of no account here
    for length in (end + more for end in ENDS[:-1] for more in (0, 1, 17, len(LINES[1]) - 1)):
        file = lay(folder, WHOLE[:length])
        count = max(index for index, end in enumerate(ENDS) if end <= length)
        content = read_ledger(file)
        assert (list(content.rows), content.whole_bytes, content.unreadable) == (ROWS[:count], ENDS[count], ())
        assert file.read_bytes() == WHOLE[:length]  # reading changes nothing
        ledger = Ledger(folder)
        ledger.append(NEXT)
        ledger.close()
        assert file.read_bytes() == WHOLE[: ENDS[count]] + encode(NEXT)


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
def test_a_change_costs_the_lines_that_it_touches(folder, change) -> None:
    content = mutated(*change)
    found = read_ledger(lay(folder, content))
    lines = content.split(b"\n")[:-1]
    assert len(found.rows) + len(found.unreadable) == len(lines)
    assert found.whole_bytes == sum(len(line) + 1 for line in lines)
    untouched = [line + b"\n" for line in lines if line + b"\n" in LINES]
    assert set(untouched) <= {encode(row) for row in found.rows}


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_any_bytes_at_all_are_no_rows(folder, content) -> None:
    found = read_ledger(lay(folder, content))
    assert (found.rows, len(found.unreadable)) == ((), content.count(b"\n"))


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
def test_odd_lines_are_passed_over(folder, line) -> None:
    content = read_ledger(lay(folder, LINES[0] + line + b"\n" + LINES[1]))
    assert list(content.rows) == ROWS[:2]
    assert unreadable_lines(content).startswith("line 2 can't be read, so nothing of it counts; `peft-vit repair`")


def test_a_row_cannot_name_a_place_outside_the_study() -> None:
    for name in ("../seed_1", "a/../seed_1", "/a/seed_1", "a/b/seed_1", "a/seed_1/..", "a/seed_x", "a\0/seed_1", "a"):
        with pytest.raises(ValueError, match="run"):
            Row(at="", run=name, event="done", attempt=1)
