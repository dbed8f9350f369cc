"""The tools of `make torture` that kill runs, let commands compete and fill disks, each with a few trials."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.part("runner"), pytest.mark.slow]

TOOLS = Path(__file__).parents[1] / "torture"


def torture(tool: str, *options: str) -> str:
    """Run a tool that keeps no results; return what it printed."""
    command = [sys.executable, str(TOOLS / tool), *options, "--dry"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if "NOTHING WAS TRIED" in ended.stderr:
        pytest.skip(ended.stderr.strip())
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-5000:]
    return ended.stdout


def test_killed_at_random_points_it_ends_as_undisturbed(cache: str) -> None:
    said = torture("killed_runs.py", "--forked", "4", "--methods", "adalora", "--seed", "5")
    passed = re.findall(r"^way: .*: (\d+) of (\d+) kills$", said, re.MULTILINE)
    assert sum(int(tried) for _, tried in passed) >= 4
    assert all(held == tried for held, tried in passed)
    assert not re.search(r"^0 attempts went on from a checkpoint", said, re.MULTILINE)


def test_killed_around_decisions_it_has_the_same_ranks(cache: str) -> None:
    said = torture("killed_allocations.py", "--only", "growing", "--steps", "3", "9")
    assert "growing: 4 of 4 identical" in said


def test_two_commands_on_one_directory(cache: str) -> None:
    said = torture("two_commands.py", "--commands", "1")
    assert "commands: one winner in 1 of 1" in said


def test_a_full_disk_costs_nothing_that_was_written(cache: str) -> None:
    said = torture("full_disks.py", "--trials", "4", "--methods", "adalora", "--seed", "1")
    passed = re.findall(r"^[a-z.' ]+: (\d+) of (\d+)$", said, re.MULTILINE)
    assert sum(int(tried) for _, tried in passed) == 4
    assert len(passed) > 1  # of what could not be written
