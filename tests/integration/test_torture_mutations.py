"""A few hundred of the spoiled files of `make torture`, and that a fault would be found."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TORTURE = Path(__file__).parents[1] / "torture"
KINDS = {"configuration", "record", "adapter", "exported model", "weights", "data set", "cache", "study", "checkpoint"}


def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_spoiled_files_are_read_or_refused_in_one_line() -> None:
    done = python(
        TORTURE / "mutated_files.py", "--trials", "225", "--commands", "2", "--seed", "5", "--without-onnx", "--dry"
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert set(re.findall(r"^(.+), in process: 25 of 25$", done.stdout, re.MULTILINE)) == KINDS
    (read,) = re.findall(r"^(\d+) of 225 spoiled files were read in process$", done.stdout, re.MULTILINE)
    assert 25 < int(read) < 200  # both happens often
    assert len(re.findall("through the command line: 1 of 1", done.stdout)) == 2


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

    from peft_vit.errors import UserError

    def raising(error: Exception) -> Target:
        def read() -> None:
            raise error

        return Target(tmp_path / "record.json", (), read, (), places=True)

    target = raising(ValueError("bad"))
    fault, _ = judged(target)
    assert fault is not None
    assert fault.endswith("ValueError: bad\n")
    assert judged(raising(UserError("expected 1", file=target.file, field="seed"))) == (None, False)
    assert fault_of(f"{target.file}:7: expected 1", target) is None
    for line, said in (
        ("expected 1", "does not name the file"),
        (f"{target.file}: expected 1", "names neither field nor line"),
        (f"{target.file}: seed: two\nlines", "says "),
        (f"{target.file}: seed: \x1b[2J", "says "),
        (f"{target.file}: seed: \u202egnp", "says "),
    ):
        assert (fault_of(line, target) or "").startswith(said)
