"""What tests of finished runs share: weights out of a file, images in a folder, and one run of each method on them."""

from collections import deque
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from _pytest.capture import CaptureResult
from PIL import Image
from safetensors.torch import save_file
from written_runs import plan_of, run_and_write, tiny_study

from peft_vit.base import console
from peft_vit.cli import main
from peft_vit.runs.execute import run_one
from peft_vit.runs.executors import Event, RunEnded, RunProgress, RunStarted
from peft_vit.runs.planned import PlannedRun

Said = CaptureResult[str]


@pytest.fixture(autouse=True)
def _few_images_validate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let some of the few images of a test validate, instead of five trainings more; see test_train_by_folds."""
    monkeypatch.setattr("peft_vit.fit.fit.FEWEST_VALIDATION", 0)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write random weights of timm's test_vit for 32 px."""
    file = tmp_path_factory.mktemp("weights") / "base.safetensors"
    torch.manual_seed(5)
    save_file(timm.create_model("test_vit", img_size=32).state_dict(), file)
    return file


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 48 images of three classes, each of its colour."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label, colour in enumerate(((200, 60, 60), (60, 200, 60), (60, 60, 200))):
        (root / f"class_{label}").mkdir()
        for number in range(16):
            pixels = rng.normal(colour, 70, (20, 30, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"class_{label}" / f"{number:02}.png")
    return root


@pytest.fixture(scope="session")
def run_of(
    images: Path, weights: Path, _session_cache: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Return the folder of a finished run of a method, on these weights or on another model; it is done once."""

    @cache
    def done(name: str, model: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        start = {"weights": "file", "file": str(weights)} if model == "test_vit" else {"weights": "random"}
        mapping = tiny_study(name, images=images, backbone={"model": model, **start})
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PEFT_VIT_CACHE", _session_cache)
            (planned,) = plan_of(mapping, folder).runs
            record = run_and_write(planned.spec, folder)
        assert record.status == "done", record.traceback
        return folder / planned.spec.run_id

    return lambda name, model="test_vit": done(name, model)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Return a call of the command line: what it prints, however long it takes, after checking its exit code."""
    monkeypatch.setattr(console, "FIRST_S", 1e9)
    monkeypatch.setattr(console, "EVERY_S", 1e9)

    def call(*arguments: object, code: int = 0) -> Said:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert ended.value.code == code, said.err
        assert "Traceback" not in said.err
        return said

    return call


@pytest.fixture
def refused(command: Callable[..., Said]) -> Callable[..., str]:
    """Return a call of the command line on bad input: the one line that it complains with."""

    def call(*arguments: object) -> str:
        (line,) = command(*arguments, code=2).err.splitlines()
        assert line.startswith("error: ")
        return line

    return call


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let train write no page, which takes as long as its training, where nobody reads it."""
    monkeypatch.setattr("peft_vit.cli.study_commands._page_of", lambda _: None)


class InThisProcess:
    """Carries runs out in the process of the test, one after the other."""

    def __init__(self, *_: object, **__: object) -> None:
        self._waiting: deque[PlannedRun] = deque()
        self._events: deque[Event] = deque()

    def submit(self, run: PlannedRun) -> None:
        self._waiting.append(run)

    def next_event(self, timeout_s: float) -> Event | None:
        if not self._events and self._waiting:
            run = self._waiting.popleft()
            self._events.append(RunStarted(run, "this process"))
            done = run_one(run.spec, on_progress=lambda progress: self._events.append(RunProgress(run, progress)))
            self._events.append(RunEnded(run, done.record, done.adapter, done.features))
        return self._events.popleft() if self._events else None

    def stop(self) -> None:
        self._waiting.clear()

    def close(self) -> None:
        pass


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands start no worker processes, each of which takes seconds to import what is imported here."""
    for place in ("executors.local", "scheduling.profiling"):
        monkeypatch.setattr(f"peft_vit.runs.{place}.LocalExecutor", InThisProcess)
