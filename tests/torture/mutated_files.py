"""Spoil sound files in thousands of ways, and see that each is read or refused in one line, and does nothing else.

    .venv/bin/python tests/torture/mutated_files.py --trials 10000                   as `make torture` does
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
from pathlib import Path
from typing import TYPE_CHECKING

import harness

if TYPE_CHECKING:  # the process that waits for others needs no torch
    from spoiled_cases import Cases

CASE_CPU_S = 60  # more than that is a hang; of processor time, since the machine may be busy
CASE_S = 600.0  # a case that waits for something uses no processor


def cases_of(options: argparse.Namespace, folder: Path, *, watched: bool) -> Cases:
    """Make sound files in a new folder, and the cases of the options on them."""
    from spoiled_cases import Cases

    return Cases(folder, options.seed, onnx=not options.without_onnx, kinds=options.kinds, watched=watched)


def in_process(folder: Path, options: argparse.Namespace, tally: harness.Tally) -> int:
    """Do the cases in child processes, of which each goes on from where one ended; return how many files were read."""
    settings = ["--seed", str(options.seed), *(["--kinds", *options.kinds] if options.kinds else [])]
    settings += ["--without-onnx"] if options.without_onnx else []
    case = read = 0
    while case < options.trials:
        command = [sys.executable, __file__, "--child", str(case), str(options.trials), *settings]
        kind, complaints = "?", list[str]()
        pipe, below = subprocess.PIPE, {**os.environ, "TMPDIR": str(folder)}
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=below) as child:
            assert child.stdout is not None
            assert child.stderr is not None
            drain = threading.Thread(target=complaints.extend, args=(child.stderr,))
            drain.start()
            deadline = threading.Timer(3 * CASE_S, child.kill)  # it makes its files first
            deadline.start()
            for line in child.stdout:
                deadline.cancel()
                report = json.loads(line)
                kind = report["kind"]
                if "fault" in report:
                    tally.add(kind, kind, report["fault"], quiet=report["fault"] is None)
                    read += report["read"]
                    case += 1
                deadline = threading.Timer(CASE_S, child.kill)
                deadline.start()
            deadline.cancel()
            code = child.wait()
            drain.join()
        if code and kind == "?":
            raise RuntimeError(f"the sound files could not be made:\n{''.join(complaints)[-4000:]}")
        if code:
            fault = f"the process ended with {code}: {''.join(complaints)[-500:]}"
            tally.add(kind, f"{kind}:{options.seed}:{case}", fault)
            case += 1
    return read


def do_cases(folder: Path, options: argparse.Namespace) -> None:
    """Do cases as a child, and say before and after each what it is and what came of it."""
    cases = cases_of(options, folder / "files", watched=True)
    for number in range(*options.child):
        kind = cases.kind(number)
        print(json.dumps({"kind": kind}), flush=True)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + CASE_CPU_S, resource.RLIM_INFINITY))
        fault, read = cases.do(number)
        print(json.dumps({"kind": kind, "fault": fault, "read": read}), flush=True)
    os._exit(0)  # its folders are the parent's to remove: whatever it did from here on, its own guard would report


def torture(folder: Path, options: argparse.Namespace, tally: harness.Tally) -> None:
    """Spoil files; or one again, or as the child of a parent."""
    if options.child:
        do_cases(folder, options)
    elif options.only:
        kind, seed, number = options.only.rsplit(":", 2)
        options.kinds, options.seed = [kind], int(seed)
        cases = cases_of(options, folder / "files", watched=False)
        with cases.spoiled(kind, int(number)) as target:
            copy = shutil.copy(target.file, tempfile.mkdtemp(prefix="peft-vit-case-"))
            print(f"{target.file}, copied to {copy}")
            target.open()
    else:
        print(f"{in_process(folder, options, tally)} of {options.trials} spoiled files were read")


if __name__ == "__main__":
    options = {
        "--trials": {"type": int, "default": 1000},
        "--kinds": {"nargs": "+", "default": [], "help": "only these"},
        "--without-onnx": {"action": "store_true", "help": "make no ONNX file, which takes seconds"},
        "--only": {"metavar": "KIND:SEED:NUMBER", "help": "one case again, in this process"},
        "--child": {"nargs": 2, "type": int, "help": argparse.SUPPRESS},
    }
    harness.main(__doc__, torture, options)
