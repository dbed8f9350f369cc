"""What the torture tests have shown so far: counts that add up over calls, and the table in reliability.md.

.venv/bin/python tests/torture/torture_results.py                        put the table into the document
.venv/bin/python tests/torture/torture_results.py --forget PROMISE       after a repair: count again
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from peft_vit.base.files import write_atomically
from peft_vit.runs.this_machine.machine import cpu_count, git_state, processor_name

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("results.json")
DOCUMENT = ROOT / "docs" / "explanation" / "reliability.md"
BEGIN, END = "<!-- torture-table -->", "<!-- /torture-table -->"
_FAULTS_KEPT = 20


@dataclass(frozen=True)
class Result:
    """Trials of one promise on one machine."""

    promise: str  # e.g. "mutated files"; all that belongs together is forgotten together
    kind: str  # of trial within it, e.g. "record, in process"
    machine: str  # processor, cores and memory
    trials: int
    passed: int  # in how many the promise held
    first: str  # date of the first trial, ISO 8601
    last: str
    commit: str  # of the package at the last call; with "+" if it had changes
    faults: tuple[str, ...] = ()  # the first of those that failed, each with what makes it again


def read() -> list[Result]:
    """Return all results so far."""
    if not FILE.exists():
        return []
    return [Result(**{**entry, "faults": tuple(entry["faults"])}) for entry in json.loads(FILE.read_text())]


def write(results: Sequence[Result]) -> None:
    """Replace what is known so far, a line each."""
    lines = ",\n".join(json.dumps(asdict(result), ensure_ascii=False) for result in results)
    write_atomically(FILE, f"[\n{lines}\n]\n".encode())


def add(promise: str, kind: str, *, trials: int, passed: int, faults: Sequence[str] = ()) -> None:
    """Add trials to those of earlier calls on this machine."""
    machine = f"{processor_name()}, {cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GB"
    today = datetime.now(UTC).date().isoformat()
    commit, dirty = git_state()
    version = f"{(commit or 'unknown')[:12]}{'+' if dirty else ''}"
    results = {(old.promise, old.kind, old.machine): old for old in read()}
    none = Result(promise, kind, machine, trials=0, passed=0, first=today, last=today, commit=version)
    old = results.get((promise, kind, machine), none)
    results[promise, kind, machine] = replace(
        old,
        trials=old.trials + trials,
        passed=old.passed + passed,
        last=today,
        commit=version,
        faults=(*old.faults, *faults)[:_FAULTS_KEPT],
    )
    write(list(results.values()))


def table(results: Sequence[Result]) -> str:
    """Return one row a promise as Markdown, and where it was tried below them; FILE has each kind of trial."""
    machines = list(dict.fromkeys(result.machine for result in results))
    rows = ["| promise | held | when | machines |", "| --- | ---: | --- | --- |"]
    for promise in sorted({result.promise for result in results if "(the same, by " not in result.promise}):
        tried = [result for result in results if result.promise == promise]
        first, last = min(result.first for result in tried), max(result.last for result in tried)
        when = first if first == last else f"{first} to {last}"
        held = f"{sum(result.passed for result in tried):,} of {sum(result.trials for result in tried):,}"
        where = ", ".join(sorted({chr(ord("A") + machines.index(result.machine)) for result in tried}))
        rows.append(f"| {promise} | {held} | {when} | {where} |")
    places = [f"{chr(ord('A') + index)}: {name}." for index, name in enumerate(machines)]
    return "\n".join([*rows, "", *places])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forget", metavar="PROMISE")
    arguments = parser.parse_args()
    if arguments.forget:
        write([result for result in read() if result.promise != arguments.forget])
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    write_atomically(DOCUMENT, f"{before}{BEGIN}\n\n{table(read())}\n\n{END}{after}".encode())
    failed = [result for result in read() if result.passed < result.trials]
    for result in failed:
        print(f"{result.promise}, {result.kind}: {result.passed} of {result.trials}", *result.faults, sep="\n")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
