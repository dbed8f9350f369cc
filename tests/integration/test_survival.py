"""Drivers are killed and starved in processes of their own; see `crash_study`, which checks what is left."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.part("runner"), pytest.mark.slow]

SCRIPT = Path(__file__).parents[1] / "crash_study.py"


@pytest.mark.parametrize(("mode", "said"), [("crash_everywhere", "crash points"), ("full_disk", "full disks")])
def test_a_study_survives(tmp_path, mode, said) -> None:
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), mode, str(tmp_path)], capture_output=True, text=True, timeout=1800, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert said in ended.stdout
    assert "Traceback" not in ended.stderr
    assert not ended.stdout.startswith("0 ")
