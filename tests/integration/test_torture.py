"""Files that are spoiled, runs that are killed: a few of `make torture`; full disks, two commands at once, Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TORTURE = Path(__file__).parents[1] / "torture"
KINDS = {"configuration", "record", "adapter", "exported model", "weights", "data set", "cache", "study", "checkpoint"}


def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=1800, check=False
    )


@pytest.mark.slow
def test_spoiled_files_are_read_or_refused_in_one_line() -> None:
    done = python(TORTURE / "mutated_files.py", "--trials", "225", "--seed", "5", "--without-onnx")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert set(re.findall(r"^(.+): 25 of 25$", done.stdout, re.MULTILINE)) == KINDS
    (read,) = re.findall(r"^(\d+) of 225 spoiled files were read$", done.stdout, re.MULTILINE)
    assert 25 < int(read) < 200  # both happens often


MISDEEDS = {
    "os.system": "os.system('true')",
    "subprocess.Popen": "subprocess.run(['true'])",
    "open": "open(outside / 'file', 'w')",
    "os.mkdir": "(outside / 'folder').mkdir()",
    "os.rename": "os.rename(inside / 'file', outside / 'file')",
    "os.symlink": "os.symlink('x', outside / 'link')",
    "socket.getaddrinfo": "socket.getaddrinfo('localhost', 9)",
    "pickle.find_class": "pickle.loads(pickle.dumps(pathlib.Path('x')))",
}


def test_misdeeds_are_seen(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside").mkdir()
    lines = [
        "import os, pathlib, pickle, socket, subprocess, sys",
        f"sys.path.insert(0, {str(TORTURE)!r})",
        f"inside, outside = pathlib.Path({str(tmp_path / 'inside')!r}), pathlib.Path({str(tmp_path / 'outside')!r})",
        "import guard",
        "guard.install([inside], print)",
        "(inside / 'folder').mkdir()",
        "(inside / 'file').write_text('x')",
        "(inside / 'file').read_text()",
        f"open({__file__!r}).read()",
        *MISDEEDS.values(),
    ]
    done = python("-c", "\n".join(lines))
    seen = [line.split()[0] for line in done.stdout.splitlines()]
    assert sorted(set(seen)) == sorted(MISDEEDS), done


def test_what_a_refusal_lacks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TORTURE))
    from mutations import Target
    from spoiled_cases import fault_of, judged

    from peft_vit.base.errors import UserError

    def raising(error: Exception) -> Target:
        def read() -> None:
            raise error

        return Target(tmp_path / "record.json", (), read, places=True)

    target = raising(ValueError("bad"))
    assert (judged(target)[0] or "").endswith("ValueError: bad\n")
    assert judged(raising(UserError("expected 1", file=target.file, field="seed"))) == (None, False)
    assert fault_of(f"{target.file}:7: expected 1", target) is None
    for line, said in (
        ("expected 1", "does not name the file"),
        (f"{target.file}: expected 1", "names neither field nor line"),
        *((f"{target.file}: seed: {text}", "says ") for text in ("two\nlines", "\x1b[2J", "\u202egnp")),
    ):
        assert (fault_of(line, target) or "").startswith(said)


@pytest.mark.slow
@pytest.mark.part("runner")
def test_killed_runs_end_as_undisturbed_ones(cache: str) -> None:
    ended = python(TORTURE / "killed_runs.py", "--kills", "3", "--methods", "adalora", "--seed", "5")
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-5000:]
    sums = re.findall(r"^(?:driver|worker|whole).*: (\d+) of (\d+)$", ended.stdout, re.MULTILINE)
    assert all(passed == tried for passed, tried in sums)
    assert sum(int(tried) for _, tried in sums) >= 3


@pytest.mark.slow
@pytest.mark.part("runner")
@pytest.mark.parametrize(
    ("mode", "said"), [("crash_everywhere", "crash points"), ("full_disk", "full disks"), ("pair", "one winner")]
)
def test_a_study_survives(tmp_path, mode, said) -> None:
    ended = python(TORTURE.with_name("crash_study.py"), mode, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert said in ended.stdout
    assert "Traceback" not in ended.stderr
    assert not ended.stdout.startswith("0 ")


STUDY = """
name: long
seeds: [0]
threads: 1
device: cpu
precision: fp32
backbone: {model: test_vit, weights: random}
data: {dataset: digits, image_size: 32, train_images: 200, validation_images: 50, test_images: 50}
training: {epochs: 2000, learning_rate: 1e-3}
experiments:
  - {name: whole, method: full}
"""
# A test runner in the background may hand down an ignored SIGINT.
MAIN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from peft_vit.cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.part("runner")
def test_ctrl_c_is_one_line_and_exit_code_130(tmp_path: Path, cache: str) -> None:
    config = tmp_path / "long.yaml"
    config.write_text(STUDY)
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "run", str(config), "--output", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "already done and skipped" in line:  # the plan stands; the worker starts
            break
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    assert [line for line in errors.splitlines() if line] == ["stopped; the same command does what is left"]
    assert not list((tmp_path / "out").rglob("record.json"))
