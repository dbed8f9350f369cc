"""From a folder to labels and to a model, where nothing of POSIX is."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from label_sessions import write_digits
from no_posix import run_without_posix, without_posix

from peft_vit.cli import main
from peft_vit.runs.records.storage import RECORD_FILE, read_record

pytestmark = [pytest.mark.part("runner"), pytest.mark.usefixtures("cache")]
SMALL = "--weights random --model test_vit --image-size 32 --steps 20 --threads 1 --device cpu --head-blocks 1"


def test_a_pipe_may_have_few_letters(monkeypatch) -> None:
    pipe = io.TextIOWrapper(io.BytesIO(), "cp1252", newline="\n")
    monkeypatch.setattr("sys.stdout", pipe)
    with pytest.raises(SystemExit):
        main([], lambda *_, **__: print("\N{MINUS SIGN}1 caf\xe9 \u6f22"))
    assert pipe.buffer.getvalue() == b"-1 caf\xe9 ?\n"


@pytest.mark.slow
def test_a_model_is_trained_shown_exported_and_predicts(images, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    train = f"train {images} --smoke {SMALL} --precision fp32 --compute float --output runs"
    use = ("predict runs/latest {0}/class_0/00.png", "export runs/latest --output model.onnx", "report runs")
    calls = (train, "runs runs", "status runs", *(call.format(images) for call in use))
    run_without_posix(tmp_path, *calls, imports="import torch, timm, onnxscript")
    (record,) = Path("runs").rglob(RECORD_FILE)
    assert (read_record(record).peak_memory_bytes or 0) > 0
    assert (Path("runs") / Path("runs/latest").read_text().strip()) in record.parents
    assert Path("model.onnx").is_file()
    assert not [*Path("runs").rglob("lock"), *Path("runs").rglob("checkpoint-*")]


def test_class_folders_are_copies(tmp_path) -> None:
    photos, made = tmp_path / "photos", tmp_path / "classes"
    photos.mkdir()
    names = [*write_digits(photos, 3)]
    (photos / "labels.csv").write_text("path,label,split\n" + "".join(f"{name},a,train\n" for name in names))
    run_without_posix(tmp_path, f"label {photos} --to-folders {made}")
    for name in names:
        assert not (made / "train" / "a" / name).is_symlink()
        assert (made / "train" / "a" / name).read_bytes() == (photos / name).read_bytes()


@pytest.mark.slow
def test_the_page_takes_a_label(tmp_path) -> None:
    write_digits(tmp_path, 3)
    (tmp_path / "site").mkdir()
    browser = [sys.executable, str(Path(__file__).parents[2] / ".ci/label.py")]
    command = [*browser, sys.executable, "-m", "peft_vit.cli", str(tmp_path)]
    ended = subprocess.run(command, check=False, capture_output=True, env=without_posix(tmp_path / "site"))
    assert not ended.returncode, ended.stderr.decode()
    assert (tmp_path / "labels.csv").read_text().startswith("path,label,split,comment\nd000.png,cat,t")
