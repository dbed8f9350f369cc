"""What all these tools do: take options, count trials by kind, tell what went wrong, and keep the sums."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Tally:
    """Trials by promise and kind, and what failed."""

    def __init__(self, promise: str) -> None:
        self.promise = promise
        self.trials: Counter[tuple[str, str]] = Counter()
        self.faults: dict[tuple[str, str], list[str]] = {}

    def add(self, kind: str, fault: str | None, *, of: str = "") -> None:
        """Count a trial, `fault` saying what makes it again and what was wrong; `of` names another sum of the same."""
        key = (self.promise + of, kind)
        self.trials[key] += 1
        if fault is not None:
            self.faults.setdefault(key, []).append(fault)

    def conclude(self, *, dry: bool) -> None:
        """Print the sums, and add them to those of earlier calls unless that is not wanted."""
        for (promise, kind), trials in sorted(self.trials.items()):
            faults = self.faults.get((promise, kind), [])
            print(f"{kind}: {trials - len(faults)} of {trials}", *faults, sep="\n", flush=True)
            if not dry:
                import torture_results

                torture_results.add(promise, kind, trials=trials, passed=trials - len(faults), faults=faults)


def options(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that all tools have; each adds its own."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the clock, so that calls add up")
    parser.add_argument("--dry", action="store_true", help="keep no results")
    return parser


@contextmanager
def torture(promise: str, *, dry: bool) -> Iterator[tuple[Path, Tally]]:
    """Give a folder to work in, which stays if something failed, and a tally; end with code 1 if something did."""
    folder, tally = Path(tempfile.mkdtemp(prefix="peft-vit-torture-")), Tally(promise)
    try:
        yield folder, tally
    except PermissionError as error:
        shutil.rmtree(folder, ignore_errors=True)
        sys.exit(f"NOTHING WAS TRIED: {error}")
    tally.conclude(dry=dry)
    if tally.faults:
        sys.exit(f"{folder} is kept")
    shutil.rmtree(folder)
