"""What these tools do: take options, count trials by kind, and tell what went wrong."""

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
    """Trials by kind, and what failed."""

    def __init__(self) -> None:
        self.trials: Counter[str] = Counter()
        self.faults: dict[str, list[str]] = {}

    def add(self, kind: str, trial: str, fault: str | None, *, quiet: bool = False) -> None:
        """Count a trial and print it: what makes it again, and what was wrong."""
        if not quiet:
            print(f"{trial}: {fault or 'sound'}", flush=True)
        self.trials[kind] += 1
        if fault is not None:
            self.faults.setdefault(kind, []).append(f"{trial}: {fault}")

    def conclude(self) -> None:
        """Print the sums."""
        for kind, trials in sorted(self.trials.items()):
            faults = self.faults.get(kind, [])
            print(f"{kind}: {trials - len(faults)} of {trials}", *faults, sep="\n", flush=True)


def main(
    doc: str | None, torture: Callable[[Path, argparse.Namespace, Tally], None], options: Mapping[str, Any]
) -> None:
    """Run a tool in a new folder, which stays if something failed; end with code 1 then.

    Args:
        doc: of the tool.
        torture: the tool itself.
        options: its own, as argparse takes them; the seed is the clock, unless it is given.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    for name, settings in options.items():
        parser.add_argument(name, **settings)
    folder, tally = Path(tempfile.mkdtemp(prefix="peft-vit-torture-")), Tally()
    torture(folder, parser.parse_args(), tally)
    tally.conclude()
    if tally.faults:
        sys.exit(f"{folder} is kept")
    shutil.rmtree(folder)
