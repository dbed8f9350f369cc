"""Spoil sound files in thousands of ways, and see that each is read or refused in one line, and does nothing else.

    .venv/bin/python tests/torture/mutated_files.py --trials 10000 --commands 100    as `make torture` does
    .venv/bin/python tests/torture/mutated_files.py --only record:1:4711             one case again, with its traceback

A case has passed if reading the spoiled file ends in seconds, well or with a UserError that is one line and names the
file (and, in configurations and records, the field or the line), if no program was started, no address asked and
nothing written outside of the folders that were given, and if memory has not grown by a gigabyte.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import guard
import harness

if TYPE_CHECKING:  # the process that waits for others needs no torch
    from harness import Tally
    from kinds_of_files import Target
    from spoiled_cases import Cases

PROMISE = "mutated files are read or refused"
HERE = Path(__file__).resolve().parent
_REASONS = ("error: ", "left out: ", "  ")  # what lines start with that say why a command failed
CASE_CPU_S = 60  # more than that is a hang; of processor time, since the machine may be busy
CASE_S = 600.0  # a case that waits for something uses no processor
COMMAND_S = 600.0


# --- in process: a child does the cases and says what came out, a parent sees to it that it says so -------------------


def in_process(folder: Path, asked: argparse.Namespace, tally: Tally) -> int:
    """Do the cases that are asked for in child processes; return how many files the package took."""
    options = ["--seed", str(asked.seed), *(["--kinds", *asked.kinds] if asked.kinds else [])]
    options += ["--without-onnx"] if asked.without_onnx else []
    case = read = 0
    while case < asked.trials:
        child = ["--child", str(folder / f"from-{case}"), str(case), str(asked.trials)]
        case, took = _follow([sys.executable, __file__, *child, *options], case, asked.seed, tally)
        read += took
    return read


def _follow(command: list[str], case: int, seed: int, tally: Tally) -> tuple[int, int]:
    """Read what a child says until it ends; return the case to go on from, and how many files the package took."""
    read = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        complaints: list[str] = []
        drain = threading.Thread(target=lambda: complaints.extend(child.stderr or ()))
        drain.start()
        kind = "?"
        deadline = threading.Timer(3 * CASE_S, child.kill)  # it makes its files first
        deadline.start()
        for line in child.stdout:
            deadline.cancel()
            said = json.loads(line)
            if "begins" in said:
                kind = said["begins"]
            else:
                tally.add(f"{kind}, in process", said["fault"])
                read += said["read"]
                if said["fault"] is not None:
                    print(said["fault"], file=sys.stderr, flush=True)
                case += 1
            deadline = threading.Timer(CASE_S, child.kill)
            deadline.start()
        deadline.cancel()
        code = child.wait()
        drain.join()
    if code != 0:
        if kind == "?":
            raise RuntimeError(f"the sound files could not be made:\n{''.join(complaints)[-4000:]}")
        fault = f"{kind}:{seed}:{case}: the process ended with {code}: {''.join(complaints)[-500:]}"
        print(fault, file=sys.stderr, flush=True)
        tally.add(f"{kind}, in process", fault)
        case += 1
    return case, read


def _child(root: Path, first: int, end: int, seed: int, *, onnx: bool, kinds: Sequence[str]) -> None:
    """Do cases, and say before and after each what it is and what came out."""
    from spoiled_cases import Cases

    cases = Cases(root, seed, onnx=onnx, kinds=kinds)
    for number in range(first, end):
        kind = cases.kind(number)
        print(json.dumps({"begins": kind}), flush=True)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + CASE_CPU_S, resource.RLIM_INFINITY))
        fault, read = cases.do(number)
        print(json.dumps({"fault": fault, "read": read}), flush=True)


# --- the command line -------------------------------------------------------------------------------------------------


def by_command(folder: Path, asked: argparse.Namespace, tally: Tally) -> None:
    """Do cases through the real command line, each a process of its own that is watched from inside and outside."""
    from spoiled_cases import Cases

    cases = Cases(folder / "files", asked.seed, onnx=not asked.without_onnx, kinds=asked.kinds, watched=False)
    hook = folder / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        f"import sys\nsys.path.append({str(HERE)!r})\nimport guard\nsys.path.pop()\nguard.install_from_environment()\n"
    )
    trap = _trap(folder / "files" / "tmp" / "here", cases.sound.marker)
    for number in range(asked.commands):
        kind = cases.kind(number)
        with cases.spoiled(kind, number) as target:
            fault = _commanded(cases, target, hook, trap)
        if fault is not None:
            fault = f"{kind}:{asked.seed}:{number}: {' '.join(map(str, target.command))}: {fault}"
            print(fault, file=sys.stderr, flush=True)
        tally.add(f"{kind}, through the command line", fault)


def _trap(folder: Path, marker: Path) -> Path:
    """Return a folder to work in whose files would be run by whoever looks for modules there."""
    folder.mkdir()
    for name in ("pickle", "yaml", "torch", "tempfile", "struct", "selectors", "sitecustomize", "usercustomize"):
        (folder / f"{name}.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    return folder


def _commanded(cases: Cases, target: Target, hook: Path, trap: Path) -> str | None:
    from spoiled_cases import fault_of

    sound = cases.sound
    log = hook / "log"
    log.write_text("")
    before = _fingerprint(sound.inputs)
    environment = {**os.environ, **sound.environment(), **guard.environment([*sound.writable, hook], log)}
    command = [str(Path(sys.executable).with_name("peft-vit")), *map(str, target.command)]
    target.prepare()
    try:
        done = subprocess.run(
            command,
            cwd=trap,
            env={**environment, "PYTHONPATH": str(hook)},
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=COMMAND_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"took more than {COMMAND_S:.0f} s"
    fault = None
    if "Traceback" in done.stderr + done.stdout or done.returncode not in (0, 1, 2):
        fault = f"exit code {done.returncode}: {done.stderr[-3000:]}"
    elif done.returncode:
        fault = fault_of(_refusal(done.stderr), target)
    if _fingerprint(sound.inputs) != before:
        fault = "its input was changed"
    if log.read_text():
        fault = f"did {log.read_text()[:1000]}"
    if any(sound.outside.iterdir()):
        fault = f"something was made outside: {[path.name for path in sound.outside.iterdir()]}"
        shutil.rmtree(sound.outside)
        sound.outside.mkdir()
    return fault


def _refusal(said: str) -> str:
    """Return the line that says why a command failed: its error, a file left out, or the reason of the last run."""
    lines = said.strip().splitlines()
    errors = next(filter(None, ([x for x in lines if x.startswith(start)] for start in _REASONS)), [])
    return (
        errors[-1].removeprefix("error: ").removeprefix("left out: ").strip()
        if errors
        else f"nothing of a reason: {said[-500:]}"
    )


def _fingerprint(folder: Path) -> list[tuple[str, int, int]]:
    files = ((str(path), path.lstat()) for path in sorted(folder.rglob("*")))
    return [(name, status.st_size, status.st_mtime_ns) for name, status in files]


# --- the tool itself --------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the command line."""
    parser = harness.options(__doc__)
    parser.add_argument("--trials", type=int, default=0, help="in process")
    parser.add_argument("--commands", type=int, default=0, help="through the command line")
    parser.add_argument("--kinds", nargs="+", default=[], help="only these")
    parser.add_argument("--without-onnx", action="store_true", help="make no ONNX file, which takes seconds")
    parser.add_argument("--only", metavar="KIND:SEED:NUMBER", help="one case again, in this process")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        root, first, end = asked.child
        _child(Path(root), int(first), int(end), asked.seed, onnx=not asked.without_onnx, kinds=asked.kinds)
        return
    if asked.only:
        kind, seed, number = asked.only.rsplit(":", 2)
        _again(kind, int(seed), int(number), onnx=not asked.without_onnx)
        return
    with harness.torture(PROMISE, dry=asked.dry) as (folder, tally):
        if asked.trials:
            print(f"{in_process(folder, asked, tally)} of {asked.trials} spoiled files were read in process")
        if asked.commands:
            by_command(folder / "commands", asked, tally)


def _again(kind: str, seed: int, number: int, *, onnx: bool) -> None:
    from spoiled_cases import Cases

    with tempfile.TemporaryDirectory(prefix="peft-vit-torture-") as folder:
        cases = Cases(Path(folder) / "files", seed, onnx=onnx, kinds=[kind], watched=False)
        with cases.spoiled(kind, number) as target:
            kept = Path(tempfile.mkdtemp(prefix="peft-vit-case-")) / target.file.name
            shutil.copy(target.file, kept)
            print(f"{target.file}, kept as {kept}\n{' '.join(map(str, target.command))}")
            target.open()


if __name__ == "__main__":
    main()
