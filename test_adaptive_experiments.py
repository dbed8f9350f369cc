"""Validate the project's parts: run the tests marked `part(...)` in two processes, count by part, print the sums.

    .venv/bin/python test_adaptive_experiments.py
    .venv/bin/python test_adaptive_experiments.py --slow

The first leaves out tests that wait long, such as whole kills. Each failure is named as it happens. Exit code 0 only if
no test failed and every part has a passing one. Other arguments are handed on to pytest, -n among them. The plain
`pytest` does not collect this file: it looks below tests/.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
PARTS = ("controller", "trainer", "configuration", "importance analysis", "quantization", "runner", "analyzer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Note in each test which part it validates, so that its reports say so, also those of other processes."""
    for item in items:
        mark = item.get_closest_marker("part")
        if mark is not None:
            item.user_properties.append(("part", mark.args[0]))


class PartCounter:
    """Counts passed and failed tests by the name in their `part` mark. An error in setup or teardown is a failure."""

    def __init__(self) -> None:
        self._part_of: dict[str, str] = {}
        self._failed: set[str] = set()
        self._passed: set[str] = set()
        self.uncollected: list[str] = []  # files that could not be imported

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note files whose tests could not even be read."""
        if report.failed and report.nodeid not in self.uncollected:
            self.uncollected.append(report.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take in one phase of one test."""
        self._part_of[report.nodeid] = dict(report.user_properties).get("part", "no part")
        if report.failed:
            self._failed.add(report.nodeid)
            print(f"\nfailed: {report.nodeid}", flush=True)
        elif report.when == "call" and report.passed:
            self._passed.add(report.nodeid)

    @property
    def failed(self) -> Counter[str]:
        """Return failed tests by part."""
        return Counter(self._part_of[test] for test in self._failed)

    @property
    def passed(self) -> Counter[str]:
        """Return passed tests by part."""
        return Counter(self._part_of[test] for test in self._passed - self._failed)


def faults(counter: PartCounter) -> list[str]:
    """Return what is wrong beyond failed tests, one line each."""
    unknown = sorted({*counter.passed, *counter.failed} - set(PARTS))
    return [
        *(f"{file} can't be collected" for file in counter.uncollected),
        *(f"part '{part}' is not one of {', '.join(PARTS)}" for part in unknown),
        *(f"part '{part}' has no passing test" for part in PARTS if not counter.passed[part]),
    ]


def main(arguments: list[str]) -> int:
    """Run the marked tests and return the exit code."""
    counter = PartCounter()
    slow = "--slow" in arguments
    arguments = [argument for argument in arguments if argument != "--slow"]
    processes = [] if any(argument.startswith("-n") for argument in arguments) else ["-n", "2", "--dist", "worksteal"]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many threads as processes, on two cores
    folders = [str(ROOT / name) for name in ("tests", "experiments")]
    marked = ["-p", Path(__file__).stem, "-m", "part" if slow else "part and not slow"]
    code = pytest.main(["-c", str(ROOT / "pyproject.toml"), *marked, *processes, *folders, *arguments], [counter])
    passed, failed = counter.passed, counter.failed
    print(f"\n{'part':<24}{'passed':>8}{'failed':>8}")
    for part in [*PARTS, *sorted({*passed, *failed} - set(PARTS))]:
        print(f"{part:<24}{passed[part]:>8}{failed[part]:>8}")
    for fault in faults(counter):
        print(fault)
    print(f"Passed: {passed.total()}\nFailed: {failed.total()}\nTotal: {passed.total() + failed.total()}")
    return 1 if code or failed.total() or faults(counter) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
