"""A call of `train` that the page starts: it outlives the server, a second one is refused, and its lines are told."""

import sys
import time
from collections.abc import Callable

import pytest

from peft_vit.base.errors import UserError
from peft_vit.label import training
from peft_vit.label.labels import LabelStore, Row
from peft_vit.label.training import Training

pytestmark = pytest.mark.usefixtures("cache")


def until(is_so: Callable[[], object]) -> None:
    """Wait for what another process does."""
    for _ in range(600):
        if is_so():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come")


def labelled(folder, of_train=(2, 2), of_test=(1, 1)) -> LabelStore:
    store = LabelStore(folder)
    rows: dict[str, Row | None] = {}
    for split, counts in (("train", of_train), ("test", of_test)):
        for label, count in zip("ab", counts, strict=True):
            rows |= {f"{split}-{label}-{i}.png": Row((label,), split) for i in range(count)}
    store.change(rows, {})
    return store


def saying(monkeypatch, *lines: str, wait_for: str = "") -> None:
    """Let the command say lines, once a file is there."""
    wait = f"import os, time\nwhile not os.path.exists({wait_for!r}): time.sleep(0.05)\n" if wait_for else ""
    script = f"import sys\nprint(sys.argv[1:], flush=True)\n{wait}for line in {lines!r}: print(line)"
    monkeypatch.setattr(training, "_COMMAND", [sys.executable, "-c", script])


def test_it_outlives_the_server_and_no_second_one_is_started(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    store, go = LabelStore(tmp_path), tmp_path / "go"
    labelled(tmp_path)  # by another page
    saying(monkeypatch, "Model: somewhere", "Page: \x1b[31msomewhere/report.html", wait_for=str(go))
    first = Training(store)
    assert first.state() == {"running": False, "lines": []}
    first.start("train")
    until(lambda: len(first.state()["lines"]) == 2)
    later = Training(LabelStore(tmp_path))  # of a server that was started again
    for one in (first, later):
        assert one.state()["running"]
        with pytest.raises(UserError) as fault:
            one.start("tune")
        assert fault.value.field == "tune"
    go.touch()
    until(lambda: not later.is_running)
    until(lambda: not first.is_running)
    typed, given, *said = later.state()["lines"]
    assert typed.startswith(f"peft-vit train {store.file} --output {tmp_path}")
    assert given == str(["train", str(store.file), "--output", str(tmp_path / "peft-vit-runs")])
    assert said == ["Model: somewhere", "Page: \\x1b[31msomewhere/report.html"]
    assert first.state() == later.state()


def test_what_ended_without_a_model_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    saying(monkeypatch, "error: no weights")
    call = Training(labelled(tmp_path))
    call.start("tune")
    until(lambda: not call.is_running)
    *_, fault, end = call.state()["lines"]
    assert fault == "error: no weights"
    assert "without a model" in end


@pytest.mark.parametrize(
    ("of_train", "of_test"), [((0, 0), (0, 0)), ((5, 0), (1, 0)), ((5, 1), (0, 0)), ((5, 0), (0, 1)), ((0, 0), (3, 3))]
)
def test_too_few_labels_are_refused(of_train, of_test, tmp_path) -> None:
    call = Training(labelled(tmp_path, of_train, of_test))
    with pytest.raises(UserError) as fault:
        call.start("train")
    assert fault.value.field == "train"
    assert not call.state()["lines"]


def test_a_cache_that_cannot_be_written_to_is_said(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PEFT_VIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="can't be written"):
        Training(labelled(tmp_path)).start("train")
