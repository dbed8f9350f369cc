"""What the torture tests have shown so far: counts that add up over calls, and the table in docs/reliability.md.

.venv/bin/python tests/torture/torture_results.py                        put the table into the document
.venv/bin/python tests/torture/torture_results.py --forget PROMISE       after a repair: count anew
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from peft_vit.records import write_atomically
from peft_vit.runs.provenance import cpu_count, git_state, processor_name

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "results" / "torture.json"
DOCUMENT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- torture-table -->", "<!-- /torture-table -->"
_FAULTS_KEPT = 20


@dataclass(frozen=True)
class Result:
    """Trials of one promise on one machine.

    Attributes:
        promise: what is tried, e.g. "mutated files"; all that belongs together is forgotten together.
        kind: of trial within it, e.g. "record, in process".
        machine: processor, cores and memory.
        trials: how many.
        passed: in how many the promise held.
        first: date of the first trial, ISO 8601.
        last: date of the last.
        commit: of the package at the last call; with "+" if it had changes.
        faults: the first of those that failed, each with what makes it again.
    """

    promise: str
    kind: str
    machine: str
    trials: int
    passed: int
    first: str
    last: str
    commit: str
    faults: tuple[str, ...] = ()


def machine() -> str:
    """Return what results depend on, in words."""
    return f"{processor_name()}, {cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GB"


def read(file: Path = FILE) -> list[Result]:
    """Return all results so far."""
    if not file.exists():
        return []
    return [Result(**{**entry, "faults": tuple(entry["faults"])}) for entry in json.loads(file.read_text())]


def add(promise: str, kind: str, *, trials: int, passed: int, faults: Sequence[str] = (), file: Path = FILE) -> Result:
    """Add trials to those of earlier calls on this machine, and return all of this kind."""
    today = datetime.now(UTC).date().isoformat()
    commit, dirty = git_state()
    version = f"{(commit or 'unknown')[:12]}{'+' if dirty else ''}"
    new = Result(promise, kind, machine(), trials, passed, today, today, version, tuple(faults)[:_FAULTS_KEPT])
    with _changing(file) as results:
        for index, old in enumerate(results):
            if (old.promise, old.kind, old.machine) == (new.promise, new.kind, new.machine):
                new = replace(
                    new,
                    trials=old.trials + trials,
                    passed=old.passed + passed,
                    first=old.first,
                    faults=(*old.faults, *new.faults)[:_FAULTS_KEPT],
                )
                results[index] = new
                return new
        results.append(new)
    return new


def forget(promise: str, file: Path = FILE) -> None:
    """Drop what is known of a promise, since the code that it was about has changed."""
    with _changing(file) as results:
        results[:] = [result for result in results if result.promise != promise]


@contextmanager
def _changing(file: Path) -> Iterator[list[Result]]:
    file.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)  # what is locked, since the file itself is replaced
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        results = read(file)
        try:
            yield results
        finally:
            content = json.dumps([asdict(result) for result in results], indent=1, ensure_ascii=False)
            write_atomically(file, f"{content}\n".encode())
    finally:
        os.close(folder)


def table(results: Sequence[Result]) -> str:
    """Return one row a promise and kind as Markdown, and where they were tried below it."""
    machines = list(dict.fromkeys(result.machine for result in results))
    rows = ["| promise | tried | held | when | machine |", "| --- | --- | ---: | --- | --- |"]
    for result in sorted(results, key=lambda one: (one.promise, one.kind)):
        when = result.first if result.first == result.last else f"{result.first} to {result.last}"
        held = f"{result.passed:,} of {result.trials:,}"
        place = chr(ord("A") + machines.index(result.machine))
        rows.append(f"| {result.promise} | {result.kind} | {held} | {when}, `{result.commit}` | {place} |")
    places = [f"{chr(ord('A') + index)}: {name}." for index, name in enumerate(machines)]
    return "\n".join([*rows, "", *places])


def update(document: Path = DOCUMENT, file: Path = FILE) -> None:
    """Put the table between the marks of a document."""
    text = document.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    write_atomically(document, f"{before}{BEGIN}\n{table(read(file))}\n{END}{after}".encode())


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forget", metavar="PROMISE")
    arguments = parser.parse_args()
    if arguments.forget:
        forget(arguments.forget)
    update()
    failed = [result for result in read() if result.passed < result.trials]
    for result in failed:
        print(f"{result.promise}, {result.kind}: {result.passed} of {result.trials}", *result.faults, sep="\n")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
