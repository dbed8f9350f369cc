"""Names from anybody lead nowhere: impossible paths on the command line, and links instead of a study's files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fake_study import FakeExecutor, fake_config, fake_drive

from peft_vit.base.errors import UserError
from peft_vit.runs.records.progress import LOCK_FILE, PROGRESS_FILE
from peft_vit.runs.records.storage import ADAPTER_FILE, RECORD_FILE, STUDY_FILE

QUICKSTART = str(Path(__file__).parents[2] / "examples" / "quickstart.yaml")
BAD = "<the bad path>"
COMMANDS = {
    "run": ["run", BAD],
    "run into": ["run", QUICKSTART, "--smoke", "--output", BAD],
    "plan": ["plan", BAD],
    "status": ["status", BAD],
    "summary": ["report", BAD, "--format", "md"],
    "report": ["report", BAD],
    "export": ["export", BAD, "--format", "peft", "--output", "out"],
    "history": ["export", BAD, "--format", "history", "--output", "x.csv"],
    "predict": ["predict", BAD, QUICKSTART],
    "predict images": ["predict", "model.onnx", BAD],
    "train": ["train", BAD, "--method", "lora", "--smoke"],
    "train from": ["train", ".", "--method", "lora", "--weights", BAD],
    "train on": ["train", ".", "--method", "lora", "--init-adapter", BAD],
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("bad", ["n" * 300, "below/" + "n" * 300, "a\0b", "loop"], ids=["long", "below", "nul", "loop"])
@pytest.mark.usefixtures("cache")
def test_an_impossible_path_is_refused_in_one_line(name, bad, tmp_path, monkeypatch, refused) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    assert refused(*(bad if word == BAD else word for word in COMMANDS[name])).isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


PLACES = (
    STUDY_FILE,
    LOCK_FILE,
    f"a/seed_0/{RECORD_FILE}",
    f"a/seed_0/{ADAPTER_FILE}",
    f"a/seed_0/{PROGRESS_FILE}",
    f"b/seed_0/{PROGRESS_FILE}",
)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study")
    fake_drive(fake_config(("a",), (0,)), out, FakeExecutor())
    return out


@pytest.mark.parametrize("place", PLACES)
def test_a_link_in_place_of_a_file_is_not_written_through(place, study, tmp_path) -> None:
    out, target = tmp_path / "out", tmp_path / "target"
    shutil.copytree(study, out)
    file = out / "fake" / place
    if file.exists():
        file.rename(target)
    else:
        target.write_bytes(b"{}")
        file.parent.mkdir(parents=True, exist_ok=True)
    file.symlink_to(target)
    before = target.read_bytes()
    try:
        fake_drive(fake_config(("a", "b"), (0,)), out, FakeExecutor())
    except UserError as error:
        assert str(out / "fake") in str(error)  # noqa: PT017  # refused or replaced, either is right
    assert target.read_bytes() == before
