"""The tools of `make torture` that kill runs, let commands compete and fill disks, each with a few trials."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.part("runner"), pytest.mark.slow]

TOOLS = Path(__file__).parents[1] / "torture"


@pytest.mark.parametrize(
    ("tool", "options", "kinds", "trials"),
    [
        ("killed_runs.py", ["--forked", "4", "--methods", "adalora", "lora", "--seed", "5"], "forked command, .*", 4),
        ("killed_allocations.py", ["--only", "growing", "--steps", "3", "9"], "growing", 4),
        ("two_commands.py", ["--drivers", "2", "--commands", "1"], "forked drivers|fresh commands", 3),
        ("full_disks.py", ["--trials", "4", "--methods", "adalora", "--seed", "1"], "[a-z.' ]+", 4),
    ],
)
def test_what_is_promised_holds_a_few_times(cache: str, tool, options, kinds, trials) -> None:
    command = [sys.executable, str(TOOLS / tool), *options, "--dry"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if "NOTHING WAS TRIED" in ended.stderr:
        pytest.skip(ended.stderr.strip())
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-5000:]
    sums = re.findall(rf"^(?:{kinds}): (\d+) of (\d+)$", ended.stdout, re.MULTILINE)
    assert all(passed == tried for passed, tried in sums)
    assert sum(int(tried) for _, tried in sums) >= trials
    assert not re.search(r"^0 attempts went on from a checkpoint", ended.stdout, re.MULTILINE)
