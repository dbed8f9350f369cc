"""Each call of `train` is a run of its own, or continues its own; what a person reads of them from first to last."""

import json
import os
import re
import shutil
import signal
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from golden import check_golden

from peft_vit import load_results
from peft_vit.core.training import Checkpoints, Interrupted
from peft_vit.fit.calls import _claimed, train_runs
from peft_vit.runs.execute import run_one
from peft_vit.runs.executors import Event, RunEnded, RunInterrupted, RunProgress, RunStarted
from peft_vit.runs.records.storage import read_record, resolve_latest, run_folder

pytestmark = pytest.mark.part("runner")
SMALL = "--weights random --model test_vit --threads 1 --precision fp32 --compute float --device cpu --head-blocks 1"
SMALL += " --steps 20"
FIRST = f"train images {SMALL} --image-size 32"


class StoppedByHand:
    """Carries runs out in this process; at a step of the first one somebody presses Ctrl-C."""

    stop_at: int | None = None

    def __init__(self, workers: int, results_dir: Path, checkpoint_every_s: float, *_) -> None:
        self._results_dir = results_dir
        self._events: deque[Event] = deque()
        self._pressed = False

    def submit(self, run) -> None:
        self._events.append(RunStarted(run, "this process"))

        def on_progress(progress) -> None:
            self._events.append(RunProgress(run, progress))
            if progress.step == self.stop_at:
                self._pressed = True
                os.kill(os.getpid(), signal.SIGTERM)  # as Ctrl-C, which a background process ignores

        checkpoints = Checkpoints(run_folder(self._results_dir, run.spec), 600)
        try:
            done = run_one(
                run.spec, on_progress=on_progress, checkpoints=checkpoints, should_stop=lambda: self._pressed
            )
            self._events.append(RunEnded(run, done.record, done.adapter))
        except Interrupted as interrupted:
            self._events.append(RunInterrupted(run, interrupted.step))

    def next_event(self, timeout_s: float) -> Event | None:
        return self._events.popleft() if self._events else None

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def pressed(monkeypatch):
    """Return what sets the step at which Ctrl-C is pressed; None: it is not."""
    monkeypatch.setattr("peft_vit.runs.executors.local.LocalExecutor", StoppedByHand)

    def at(step: int | None) -> None:
        monkeypatch.setattr(StoppedByHand, "stop_at", step)

    return at


@pytest.mark.usefixtures("cache")
def test_what_a_person_reads_of_calls_of_train(images, tmp_path, command, pressed, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(images, "images")
    document = []

    def call(words: str, code: int = 0) -> None:
        said = command(*words.split(), code=code)
        document.extend([f"$ peft-vit {words}", said.out, *(f"! {line}" for line in said.err.splitlines()), ""])

    call("runs", 2)
    pressed(8)
    call(FIRST, 130)
    call("runs")
    call("predict peft-vit-runs/latest images/class_0/00.png", 2)
    pressed(None)
    useless = [Path("images/class_0", name) for name in ("broken.png", "notes.txt")]
    for file in useless:
        file.write_text("no image")
    call(FIRST)
    for file in useless:
        file.unlink()
    call(FIRST)
    call(f"{FIRST} --rank 4")
    shutil.copy("images/class_0/00.png", "images/class_1/new.png")
    Path("images/class_1/00.png").unlink()
    shutil.copy("images/class_2/01.png", "images/class_2/00.png")
    call(FIRST)
    call(f"{FIRST} --method full --learning-rate 1e30", 1)
    assert Path("peft-vit-runs/latest").resolve().name.startswith("0003-")  # the last that finished
    call(f"{FIRST} --method linear", 2)
    call(
        "train images --method linear --weights random --model test_vit --threads 1 --device cpu --precision fp32 "
        "--compute float"
    )
    call("runs --output runs.json")
    Path("runs.json").write_text("mine")
    call("runs --output runs.json", 2)
    command("runs", "--output", "runs.json", "--overwrite")
    assert len(json.loads(Path("runs.json").read_text())) == 5
    text = re.sub(r"[-+]?\d+\.\d+|\d+(?= s\b)", "N", "\n".join(document).replace(str(tmp_path), "HERE"))
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "DATE", text)
    text = text.replace(", flipped both ways N%", "")  # for which there was time, or not
    check_golden("train.txt", "\n".join(re.sub(" {2,}|─+", "  ", line).rstrip() for line in text.splitlines()) + "\n")

    names = [run.folder.name for run in train_runs(Path("peft-vit-runs"))]
    assert [int(name[:4]) for name in names] == [1, 2, 3, 4, 5]
    record = read_record(Path("peft-vit-runs", names[0], "lora", "seed_0", "record.json"))
    assert len(record.steps) == 20
    assert record.probe_test.metrics.n == record.test.n  # which came before the interruption
    assert not load_results(Path("peft-vit-runs")).runs.empty


@pytest.mark.usefixtures("in_this_process", "no_page", "cache")
def test_where_no_links_can_be_made_a_file_says_which_call_was_the_last(images, tmp_path, command, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    out, asked = tmp_path / "out", FIRST.replace("--steps 20", "--method linear").split()[2:]
    for seed in (0, 1):
        command("train", images, *asked, "--seed", seed, "--output", out)
    latest = out / "latest"
    assert latest.read_text() == "0002-linear-32px-seed-1-test-vit\n"
    assert command("predict", latest, images / "class_0" / "00.png").out
    assert command("status", latest).out.startswith("0002-linear-32px-seed-1-test-vit: 1 planned = 1 done")
    assert len(load_results(latest).runs) == 1
    command("report", latest, "--format", "md")
    assert (resolve_latest(latest) / "analysis" / "card.md").is_file()
    assert command("status", out).out.count("planned") == 2


def test_calls_at_the_same_time_take_numbers_of_their_own(tmp_path) -> None:
    (tmp_path / "0007-lora").mkdir()
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda k: _claimed(tmp_path, f"lora-{k}"), range(24)))
    numbers = {int(folder.name[:4]) for folder in folders}
    assert len(numbers) == 24
    assert min(numbers) > 7
    assert not list(tmp_path.glob(".*"))


def test_a_call_that_is_refused_leaves_nothing(images, tmp_path, refused) -> None:
    for wrong in (["--image-size", "33"], ["--steps", "3", "--method", "adalora"]):
        words = FIRST.replace("--steps 20 ", "").replace("--image-size 32", "").split()[2:]
        refused("train", images, *words, *wrong, "--output", tmp_path / "a" / "out")
        assert not (tmp_path / "a").exists()


@pytest.mark.usefixtures("no_page", "cache")
def test_a_call_that_ends_while_sizes_are_tried_leaves_no_folder_or_one_to_go_on_in(
    images, tmp_path, command, pressed, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pressed(None)
    out, killed = Path("peft-vit-runs"), Path("killed")
    words = f"train {images} --weights random --model test_vit --threads 1 --device cpu --precision fp32 --steps 20"

    def press(*_: object, **__: object) -> None:
        shutil.copytree(out, killed)  # what `kill -9` leaves
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("peft_vit.fit.sizes.regress", press)
        command(*words.split(), code=130)
    assert not out.exists()
    killed.rename(out)
    assert "interrupted before the first checkpoint" in command("runs").out
    assert "Continues in peft-vit-runs/0001-" in command(*words.split()).out
    assert [run.status().state for run in train_runs(out)] == ["done"]
