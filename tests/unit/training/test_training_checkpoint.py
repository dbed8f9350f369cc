"""A checkpoint is whole or not there: killed, cut short, altered or out of room, the one before is what is read."""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from peft_vit.base.errors import UserError
from peft_vit.base.files import checkpoint_folders
from peft_vit.core.training import CheckpointKeeper, Checkpoints, CheckpointWarning, State, checkpoint
from peft_vit.core.training.checkpoint import read_checkpoint, tensors_sha256, write_checkpoint

pytestmark = pytest.mark.part("runner")
FILES = ("tensors.safetensors", "state.json")


def state(step: int = 1) -> State:
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "b": torch.randn(3, 4, generator=generator),
        "a": torch.randn(4, 6, generator=generator).T,  # lies column by column
        "one": torch.linalg.qr(torch.randn(8, 1, generator=generator)).Q.T,
        "column": torch.zeros_like(torch.randn(1, 64)[:, 0]),
        "none": torch.zeros(0, 5),
        "scalar": torch.tensor(2.5),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "counts": torch.arange(step, step + 3),
        "mask": torch.tensor([True, False]),
        "generator": generator.get_state(),
        "double": torch.randn(2, dtype=torch.float64, generator=generator),
    }
    values = {"loss": 0.1 + 0.2, "z": step, "a": {"y": [1, None, "ä"], "b": 1e-310, "none": float("nan")}, "e": {}}
    odd = {"$tuple": 1, "pair": (1, (torch.ones(2), "x")), 3: {"exp_avg": torch.zeros(2)}, "list": [(), [], {}]}
    return State(model=tensors, values=values, hooks=[odd])


def assert_same(value, other) -> None:
    """Check that two states are equal, in the order of their mappings and in how their tensors lie."""
    assert type(value) is type(other) or {type(value), type(other)} == {dict, State}
    if isinstance(value, torch.Tensor):
        assert (value.dtype, value.shape, value.stride()) == (other.dtype, other.shape, other.stride())
        assert torch.equal(value, other)
    elif isinstance(value, dict | list | tuple):
        assert len(value) == len(other)
        if isinstance(value, dict):
            assert list(value) == list(other)
            value, other = value.values(), other.values()
        for part, peer in zip(value, other, strict=True):
            assert_same(part, peer)
    else:
        assert repr(value) == repr(other)  # NaN equals NaN so


def written(folder: Path, *steps: int) -> None:
    for step in steps:
        write_checkpoint(folder, step, state(step))


def seal(place: Path, saved: dict | None = None) -> None:
    """Write hashes that fit a checkpoint's files, as an attacker would; `saved` is to stand instead of its values."""
    saved = json.loads((place / "state.json").read_bytes()) if saved is None else saved
    tensors = hashlib.sha256((place / "tensors.safetensors").read_bytes()).hexdigest()
    saved = {key: value for key, value in saved.items() if key != "sha256"} | {"tensors_sha256": tensors}
    digest = hashlib.sha256(json.dumps(saved).encode()).hexdigest()
    (place / "state.json").write_text(json.dumps({"sha256": digest, **saved}))


def newest(folder: Path) -> tuple[int, State | None, list[str]]:
    keeper = CheckpointKeeper(Checkpoints(folder))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state_read = keeper.newest()
    assert {entry.category for entry in caught} <= {CheckpointWarning}
    return keeper.step, state_read, [str(entry.message) for entry in caught]


# --- whole ------------------------------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_written_in_order_and_layout(tmp_path) -> None:
    written(tmp_path, 3, 12)
    step, state_read, warned = newest(tmp_path)
    assert (step, warned) == (12, [])
    assert_same(state_read, state(12))
    assert state_read["model"]["a"].stride() == (1, 6)
    assert state_read["model"]["column"].stride() == (64,)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in state_read["model"].values())  # as torch places its own
    assert state_read.source == tmp_path / "checkpoint-12"
    assert sorted(path.name for path in (tmp_path / "checkpoint-12").iterdir()) == sorted(FILES)
    before_sealing = (tmp_path / "checkpoint-12" / "state.json").read_text()
    seal(tmp_path / "checkpoint-12")
    assert (tmp_path / "checkpoint-12" / "state.json").read_text() == before_sealing
    assert torch.equal(load_file(tmp_path / "checkpoint-12" / FILES[0])["1"], state(12)["model"]["a"])


@pytest.mark.parametrize("change", ["value", "dtype", "shape", "name", "plain"])
def test_a_hash_of_a_state_sees_every_change(change) -> None:
    tensors, values = state()["model"], {"b": 1e-310}
    digest = tensors_sha256(tensors, values)
    assert digest == tensors_sha256(dict(reversed(tensors.items())), values)
    if change == "value":
        tensors["scalar"] = -tensors["scalar"]
    elif change == "dtype":
        tensors["counts"] = tensors["counts"].view(torch.float64)
    elif change == "shape":
        tensors["b"] = tensors["b"].reshape(4, 3)
    elif change == "name":
        tensors["c"] = tensors.pop("b")
    else:
        values["b"] = 2e-310
    assert tensors_sha256(tensors, values) != digest


# --- kept -------------------------------------------------------------------------------------------------------------


def test_the_last_two_are_kept_and_leftovers_go(tmp_path) -> None:
    (tmp_path / ".checkpoint-abc").mkdir(parents=True)
    (tmp_path / "record.json").write_text("{}")
    keeper = CheckpointKeeper(Checkpoints(tmp_path, 0))
    assert keeper.newest() is None
    assert keeper.step == 0
    for step in range(1, 5):
        keeper.keep(step, lambda step=step: state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4", "record.json"]
    before = (tmp_path / "checkpoint-4" / "state.json").stat().st_ino
    keeper.keep(4, lambda: pytest.fail("it is there already"))
    assert (tmp_path / "checkpoint-4" / "state.json").stat().st_ino == before


def test_a_damaged_one_does_not_count_as_one_of_two(tmp_path) -> None:
    written(tmp_path, 5, 6)
    (tmp_path / "checkpoint-6" / "state.json").unlink()
    keeper = CheckpointKeeper(Checkpoints(tmp_path))
    with pytest.warns(CheckpointWarning, match="left aside"):
        keeper.newest()
    assert keeper.step == 5
    keeper.keep(6, lambda: state(6))
    assert sorted(checkpoint_folders(tmp_path)) == [5, 6]
    assert newest(tmp_path)[::2] == (6, [])


def test_one_is_due_after_the_interval_and_a_hundred_times_its_cost(tmp_path) -> None:
    now = [0.0]
    keeper = CheckpointKeeper(Checkpoints(tmp_path, 30), clock=lambda: now[0])

    def due_at(*seconds: float) -> list[bool]:
        return [keeper.is_due() for now[0] in seconds]

    def write(step: int, seconds: float) -> None:
        def take() -> State:
            now[0] += seconds
            return state(step)

        keeper.keep(step, take)

    assert due_at(0, 29.9, 30, 1000) == [False, False, True, True]
    write(1, 0.2)
    assert due_at(1000.2, 1030.1, 1030.3) == [False, False, True]
    write(2, 5)  # once: no reason to wait for minutes
    assert due_at(1065.2, 1065.4) == [False, True]
    write(3, 5)
    assert due_at(1570.3, 1570.5) == [False, True]
    assert CheckpointKeeper(Checkpoints(tmp_path / "always", 0), clock=lambda: 7.0).is_due()


# --- damaged ----------------------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def to_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def to_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def to_link(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


DAMAGE = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "flipped": flip,
    "cut": lambda file: os.truncate(file, file.stat().st_size - 2),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b" \0"),
    "pipe": to_pipe,
    "folder": to_folder,
    "link": to_link,
    "garbage": lambda file: file.write_bytes(os.urandom(100)),
    "pickle": lambda file: file.write_bytes(pickle.dumps({"a": 1})),
    "deep": lambda file: file.write_bytes(b"[" * 100_000),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_named_and_the_one_before_is_read(tmp_path, file, damage) -> None:
    written(tmp_path, 9, 10)
    DAMAGE[damage](tmp_path / "checkpoint-10" / file)
    step, state_read, warned = newest(tmp_path)
    assert step == 9
    assert_same(state_read, state(9))
    assert len(warned) == 1
    assert f"checkpoint-10{os.sep}{file}: " in warned[0]
    assert len(warned[0].splitlines()) == 1


def test_whatever_stands_in_its_place_is_no_checkpoint(tmp_path) -> None:
    written(tmp_path, 1)
    elsewhere = tmp_path / "elsewhere"
    written(elsewhere, 4)
    (tmp_path / "checkpoint-4").symlink_to(elsewhere / "checkpoint-4")
    (tmp_path / "checkpoint-5").write_text("a file")
    os.mkfifo(tmp_path / "checkpoint-6")
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "checkpoint-7")  # of another step
    (tmp_path / "checkpoint-08x").mkdir()
    step, _, warned = newest(tmp_path)
    assert step == 1
    assert len(warned) == 4
    keeper = CheckpointKeeper(Checkpoints(tmp_path, 0))
    with pytest.warns(CheckpointWarning):
        keeper.newest()
    for number in (4, 5, 6, 7):
        keeper.keep(number, lambda number=number: state(number))
    assert newest(tmp_path)[::2] == (7, [])
    assert newest(elsewhere)[::2] == (4, [])  # a link is removed, not what it leads to


def test_want_of_memory_is_no_damage(tmp_path, monkeypatch) -> None:
    written(tmp_path, 1, 2)
    monkeypatch.setattr("peft_vit.core.training.checkpoint.load_file", lambda file: torch.empty(1 << 50))
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        CheckpointKeeper(Checkpoints(tmp_path, 0)).newest()


def test_without_a_whole_one_the_run_starts_anew_and_says_so(tmp_path) -> None:
    written(tmp_path, 1, 2)
    for step in (1, 2):
        flip(tmp_path / f"checkpoint-{step}" / "tensors.safetensors")
    step, state_read, warned = newest(tmp_path)
    assert (step, state_read, len(warned)) == (0, None, 3)
    assert "no checkpoint is whole; the run starts from its beginning" in warned[-1]
    assert newest(tmp_path / "nowhere") == (0, None, [])


@st.composite
def edits(draw) -> tuple[str, int, bytes, int]:
    """Replace some bytes of a file by others, of any number."""
    return (
        draw(st.sampled_from(FILES)),
        draw(st.integers(0, 3000)),
        draw(st.binary(max_size=12)),
        draw(st.integers(0, 40)),
    )


def no_pickle(*_, **__):
    raise AssertionError("something was unpickled")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    written(folder, 9, 10)
    return folder


@settings(max_examples=150)
@given(changes=st.lists(edits(), min_size=1, max_size=3), hidden=st.booleans())
def test_any_edit_leads_to_the_same_state_or_the_one_before(two, changes, hidden) -> None:
    """Hidden edits come with hashes that fit them, as an attacker would write them; they must only not be run."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        shutil.copytree(two, folder, dirs_exist_ok=True)
        place = folder / "checkpoint-10"
        for file, start, new, removed in changes:
            content = (place / file).read_bytes()
            at = start % (len(content) + 1)
            (place / file).write_bytes(content[:at] + new + content[at + removed :])
        if hidden:
            with contextlib.suppress(ValueError, AttributeError):  # no JSON, or no mapping, any more
                seal(place)
        for module, attribute in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
            patch.setattr(module, attribute, no_pickle)
        step, state_read, warned = newest(folder)
        assert sorted(os.listdir(folder)) == ["checkpoint-10", "checkpoint-9"]
    if step == 9:
        assert_same(state_read, state(9))
        assert len(warned) == 1
    elif not hidden:
        assert_same(state_read, state(10))  # e.g. a space into JSON


@pytest.mark.parametrize("strides", [[1], [-1, 1], [1, 1], [0, 0], [10**9, 1], [3, 1, 1], "row", None, [1.5, 1]])
def test_an_impossible_layout_is_refused(tmp_path, strides) -> None:
    written(tmp_path, 3)
    place = tmp_path / "checkpoint-3"
    saved = json.loads((place / "state.json").read_text())
    saved["state"]["model"]["b"]["$tensor"][1] = strides
    seal(place, saved)
    if strides is None:
        assert_same(read_checkpoint(place), state(3))
    else:
        with pytest.raises(UserError, match=r"state\.json: is not a readable state"):
            read_checkpoint(place)


@pytest.mark.parametrize("content", [{"tensors": {}, "values": {}}, {"format": 2, "step": 3}])
def test_one_of_another_version_is_said_to_be_one_and_the_run_starts_anew(tmp_path, content) -> None:
    written(tmp_path, 3)
    (tmp_path / "checkpoint-3" / "state.json").write_text(json.dumps(content))
    step, state_read, warned = newest(tmp_path)
    assert (step, state_read) == (0, None)
    assert "state.json: is of another version of this program" in warned[0]
    assert "the run starts from its beginning" in warned[1]


# --- interrupted while writing ----------------------------------------------------------------------------------------

CALLS = {
    "mkdtemp": (checkpoint.tempfile, "mkdtemp"),
    "tensors": (checkpoint, "save_file"),
    "text": (Path, "write_text"),
    "fsync": (os, "fsync"),
    "rename": (os, "replace"),
    "open": (os, "open"),
    "chmod": (os, "chmod"),
}


def nth(patch: pytest.MonkeyPatch, name: str, count: int, then) -> list[int]:
    """Let the count-th call of a function do something else; return how many calls were made, as a list of one."""
    owner, attribute = CALLS[name]
    call, made = getattr(owner, attribute), [0]

    def replacement(*arguments, **named):
        made[0] += 1
        if made[0] == count:
            return then(call, *arguments, **named)
        return call(*arguments, **named)

    patch.setattr(owner, attribute, replacement)
    return made


def points() -> list[tuple[str, int]]:
    """Return every call that writing one checkpoint makes."""
    calls = []
    for name in CALLS:
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
            written(Path(folder), 7)
            made = nth(patch, name, -1, None)
            written(Path(folder), 8)
            calls += [(name, count) for count in range(1, made[0] + 1)]
    return calls


@pytest.mark.parametrize(("name", "count"), points())
def test_without_room_the_last_one_still_loads_and_nothing_is_left(tmp_path, monkeypatch, name, count) -> None:
    def full(_call, *_arguments, **_named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    keeper = CheckpointKeeper(Checkpoints(tmp_path, 0))
    for step in (6, 7):
        keeper.keep(step, lambda step=step: state(step))
    with monkeypatch.context() as patch:
        nth(patch, name, count, full)
        with pytest.raises(OSError, match="No space left"):
            keeper.keep(8, lambda: state(8))
    assert not list(tmp_path.glob(".checkpoint-*"))
    step, state_read, warned = newest(tmp_path)
    assert warned == []
    assert step == 7 or (name in ("open", "fsync") and (name, count + 1) not in points())  # 8 after the renaming
    assert_same(state_read, state(step))
    keeper.keep(9, lambda: state(9))
    assert newest(tmp_path)[::2] == (9, [])


@pytest.mark.parametrize(("name", "count"), points())
def test_killed_at_any_call_the_last_one_still_loads(tmp_path, name, count) -> None:
    def half(call, *arguments, **named):
        if name == "tensors":
            call(*arguments, **named)
            os.truncate(arguments[1], 50)
        elif name == "text":
            call(arguments[0], arguments[1][: len(arguments[1]) // 2], **named)
        os._exit(9)

    written(tmp_path, 6, 7)
    child = os.fork()
    if child == 0:
        try:
            with pytest.MonkeyPatch.context() as patch:
                nth(patch, name, count, half)
                written(tmp_path, 8)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    step, state_read, warned = newest(tmp_path)
    assert warned == []
    assert step in (7, 8)
    assert_same(state_read, state(step))
    assert not list(tmp_path.glob(".checkpoint-*"))
