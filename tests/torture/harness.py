"""What all these tools do: take options, count trials by kind, tell what went wrong, and keep the sums."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # what other tests share


class Tally:
    """Trials by promise and kind, and what failed."""

    def __init__(self, promise: str) -> None:
        self.promise = promise
        self.trials: Counter[tuple[str, str]] = Counter()
        self.faults: dict[tuple[str, str], list[str]] = {}

    def add(self, kind: str, trial: str, fault: str | None, *, of: str = "", quiet: bool = False) -> None:
        """Count a trial and print it: what makes it again, and what was wrong; `of` names another sum of the same."""
        if not quiet:
            print(f"{trial}: {fault or 'sound'}", flush=True)
        key = (self.promise + of, kind)
        self.trials[key] += 1
        if fault is not None:
            self.faults.setdefault(key, []).append(f"{trial}: {fault}")

    def conclude(self, *, dry: bool) -> None:
        """Print the sums, and add them to those of earlier calls unless that is not wanted."""
        for (promise, kind), trials in sorted(self.trials.items()):
            faults = self.faults.get((promise, kind), [])
            print(f"{kind}: {trials - len(faults)} of {trials}", *faults, sep="\n", flush=True)
            if not dry:
                import torture_results

                torture_results.add(promise, kind, trials=trials, passed=trials - len(faults), faults=faults)


def main(
    promise: str,
    doc: str | None,
    torture: Callable[[Path, argparse.Namespace, Tally], None],
    options: Mapping[str, Any],
    *,
    seed: int | None = None,
) -> None:
    """Run a tool in a new folder, which stays if something failed; end with code 1 then, or if nothing was tried.

    Args:
        promise: that is put to the test.
        doc: of the tool.
        torture: the tool itself.
        options: its own, as argparse takes them.
        seed: the clock, so that calls add up, unless it is given here.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=int(time.time()) if seed is None else seed)
    parser.add_argument("--dry", action="store_true", help="keep no results")
    for name, settings in options.items():
        parser.add_argument(name, **settings)
    arguments = parser.parse_args()
    folder, tally = Path(tempfile.mkdtemp(prefix="peft-vit-torture-")), Tally(promise)
    try:
        torture(folder, arguments, tally)
    except PermissionError as error:
        shutil.rmtree(folder, ignore_errors=True)
        sys.exit(f"NOTHING WAS TRIED: {error}")
    tally.conclude(dry=arguments.dry)
    if tally.faults:
        sys.exit(f"{folder} is kept")
    shutil.rmtree(folder)
