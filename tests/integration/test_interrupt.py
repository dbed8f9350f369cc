"""Ctrl-C ends a study with one line; the same command goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STUDY = """
name: long
seeds: [0]
threads: 1
device: cpu
precision: fp32
backbone: {model: test_vit, weights: random}
data: {dataset: digits, image_size: 32, train_images: 200, validation_images: 50, test_images: 50}
training: {epochs: 2000, learning_rate: 1e-3}
experiments:
  - {name: whole, method: full}
"""
# A test runner in the background may hand down an ignored SIGINT.
MAIN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from peft_vit.cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.part("runner")
def test_ctrl_c_is_one_line_and_exit_code_130(tmp_path: Path, cache: str) -> None:
    config = tmp_path / "long.yaml"
    config.write_text(STUDY)
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "run", str(config), "--output", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "already done and skipped" in line:  # the plan stands; the worker starts
            break
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    assert [line for line in errors.splitlines() if line] == [
        "interrupted; the same command goes on with the runs that are not done"
    ]
    assert not list((tmp_path / "out").rglob("record.json"))
