"""One process holds a study; the others name it; the dead hold nothing."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from peft_vit.base.errors import UserError
from peft_vit.runs.records import progress
from peft_vit.runs.records.progress import LOCK_FILE, Owner, owner_of, study_lock

pytestmark = pytest.mark.part("runner")

# Takes the lock, starts a process that outlives it as a worker could, says so, and waits.
OWNER = """
import subprocess, sys, time
from pathlib import Path
from peft_vit.runs.records.progress import study_lock
with study_lock(Path(sys.argv[1])):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["fcntl", "msvcrt"])
def _locks(request, monkeypatch) -> None:
    """Lock as POSIX does, or as Windows: by one byte, for one descriptor, and with its own error."""

    def locking(descriptor: int, mode: int, count: int) -> None:
        assert os.lseek(descriptor, 0, os.SEEK_CUR) > 1 << 20  # others read what lies before
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None

    if request.param == "msvcrt":
        monkeypatch.setattr(progress, "fcntl", None)
        monkeypatch.setattr(progress, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2), raising=False)


@pytest.mark.usefixtures("_locks")
def test_the_owner_is_named_and_a_dead_one_holds_nothing(tmp_path) -> None:
    folder = tmp_path / "study"
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder), "--two words"], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    try:
        with pytest.raises(UserError) as caught, study_lock(folder):
            pass
        said = str(caught.value)
        assert said.startswith(f"{folder}: another command works on this study, process {owner.pid} on {os.uname()[1]}")
        assert f"-c {folder} '--two words'" in said
        assert said.endswith("wait for its end, or stop it")
        there = owner_of(folder)
        assert there is not None
        assert there.pid == owner.pid
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert owner_of(folder) is None
        os.kill(child, 0)  # what the owner started is still there
        with study_lock(folder):
            assert json.loads((folder / LOCK_FILE).read_bytes())["pid"] == os.getpid()
    finally:
        owner.kill()
        os.kill(child, signal.SIGKILL)
        owner.stdout.close()


@pytest.mark.usefixtures("_locks")
def test_it_is_free_again_at_the_end_and_an_empty_folder_is_gone(tmp_path) -> None:
    folder = tmp_path / "results" / "study"
    with pytest.raises(RuntimeError), study_lock(folder):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with study_lock(folder) as lock:
        assert lock.folder == folder
        (folder / "study.json").touch()
        assert owner_of(folder) is not None
    assert [file.name for file in folder.iterdir()] == ["study.json"]
    (tmp_path / "results" / "other").mkdir()
    with study_lock(tmp_path / "results" / "other"):
        pass
    assert list((tmp_path / "results" / "other").iterdir()) == []  # a folder that was there stays


@pytest.mark.usefixtures("_locks")
@pytest.mark.parametrize(
    ("content", "owner"),
    [
        *((content, None) for content in (b"", b"{", b"null", b"[1]", b"\xff", b'{"pid": "x", "host": 1}')),
        *((content, None) for content in (b"[" * 50_000, b'{"pid": null}', b"1" * 5000)),
        (
            b'{"pid": 7, "host": "h\\n\\nh", "since": "s", "command": "' + b"x" * 10_000 + b'"}',
            f"process 7 on h h since s: {'x' * 500}",
        ),
    ],
)
def test_an_owner_says_one_line_or_has_not_said_its_name(tmp_path, content, owner) -> None:
    with study_lock(tmp_path):
        (tmp_path / LOCK_FILE).write_bytes(content)
        assert owner_of(tmp_path) == Owner() if owner is None else str(owner_of(tmp_path)) == owner
        said = owner or "an unknown process"
        with pytest.raises(UserError, match=f"works on this study, {said}"), study_lock(tmp_path):
            pass


def test_asking_for_the_owner_disturbs_nobody(tmp_path) -> None:
    """Even while others ask all the time, the lock is got."""
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            owner_of(tmp_path)

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    try:
        for _ in range(20):
            with study_lock(tmp_path):
                pass
    finally:
        ended.set()
        for asker in askers:
            asker.join()
    assert owner_of(tmp_path / "nowhere") is None


def test_what_cannot_be_locked(tmp_path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / LOCK_FILE).symlink_to(tmp_path / "target")
    (tmp_path / "folder" / LOCK_FILE).mkdir(parents=True)
    for name in ("file", "linked", "folder", "n" * 300):
        with (
            pytest.raises(UserError, match=r"can't be written to \(.*\); make it writable or choose another"),
            study_lock(tmp_path / name),
        ):
            pass
    assert not (tmp_path / "target").exists()
    assert owner_of(tmp_path / "linked") is None
    os.mkfifo(Path(tmp_path / "pipe"))
    (tmp_path / "piped").mkdir()
    os.mkfifo(tmp_path / "piped" / LOCK_FILE)
    assert owner_of(tmp_path / "piped") is None


def test_where_there_are_no_locks(tmp_path, monkeypatch) -> None:
    def refused(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (tmp_path / LOCK_FILE).touch()
    monkeypatch.setattr("fcntl.flock", refused)
    assert owner_of(tmp_path) is None
    with pytest.raises(UserError, match="No locks available"), study_lock(tmp_path):
        pass
