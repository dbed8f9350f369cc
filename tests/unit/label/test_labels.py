"""labels.csv: what is on disk when a label was taken, what others write into it, and what it refuses."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_vit.base.errors import UserError
from peft_vit.data.sources.folders import find_images
from peft_vit.label.labels import ConflictError, LabelStore, Row, class_name

CAT, DOG = Row(("cat",), "train"), Row(("dog",), "test", "=1+1")
_LABELLING = """
import sys
from pathlib import Path
from peft_vit.label.labels import LabelStore, Row
store = LabelStore(Path(sys.argv[1]))
for i in range(10**6):
    store.change({f"{i}.png": Row(("cat",), "train")}, {})
    print(i, flush=True)
"""


def test_the_file_is_what_train_reads_and_a_spreadsheet_does_not_compute(tmp_path) -> None:
    store = LabelStore(tmp_path)
    store.change({"=cmd.png": CAT, "a,b.png": DOG, "c.png": Row((), "unsure", "blurred")}, {})
    text = 'path,label,split,comment\n./=cmd.png,cat,train,\n"a,b.png",dog,test,\'=1+1\nc.png,,unsure,blurred\n'
    assert (tmp_path / "labels.csv").read_text() == text
    assert LabelStore(tmp_path).rows == store.rows
    for name in store.rows:
        (tmp_path / name).touch()
    found = find_images(tmp_path / "labels.csv")
    assert found.classes == {"=cmd.png": "cat", "a,b.png": "dog"}
    assert found.tested == {"a,b.png"}
    assert found.left_out == {"c.png": "is marked unsure"}


def test_two_stores_agree_or_the_second_is_told(tmp_path) -> None:
    one, other = LabelStore(tmp_path), LabelStore(tmp_path)
    one.change({"a.png": CAT}, {"a.png": None})
    other.change({"b.png": DOG}, {"b.png": None})
    with pytest.raises(ConflictError, match="is 'cat' by now") as fault:
        other.change({"a.png": DOG}, {"a.png": None})
    assert fault.value.file == "a.png"
    one.refresh()
    assert one.rows == other.rows == {"a.png": CAT, "b.png": DOG}


@pytest.mark.parametrize("what", ["full", "gone"])
def test_nothing_is_lost_of_a_file_that_cannot_be_written(what, tmp_path, monkeypatch) -> None:
    store = LabelStore(tmp_path)
    store.change({"a.png": CAT}, {})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if what == "full":
        monkeypatch.setattr(os, "fsync", full)
    else:
        store.file.unlink()
    with pytest.raises(UserError, match="No space left" if what == "full" else "is gone"):
        store.change({"b.png": DOG}, {})
    assert store.rows == {"a.png": CAT}
    assert what == "gone" or LabelStore(tmp_path).rows == store.rows


@pytest.mark.slow
def test_a_killed_process_has_lost_no_label_that_it_told_of(tmp_path) -> None:
    with subprocess.Popen([sys.executable, "-c", _LABELLING, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(40)]
        process.kill()
        told += map(int, process.stdout.read().split())
    assert len(LabelStore(tmp_path).rows) >= len(told)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("path,label,author\na.png,cat,me\n", "others would be lost"),
        ("photo,kind\na.png,cat\n", "expected path, label"),
        ("path,cat,dog\na.png,1,0\n", "see --task"),
        ("path,label,split\na.png,cat,val\n", "unsure or nothing as split"),
        ("path,label\na.png,\n", "expected a path, a label"),
        ("path,label\na.png\n", "one value a column"),
        ("path,label\na.png,cat|dog\n", "see --task multilabel"),
        ("path,label\na.png,cat\n./a.png,dog\n", "a.png is there twice; keep one"),
        *((f'path,value\na.png,1.5\nb.png,"{cell}"\n', "expected a number") for cell in ("ten", "nan", "1e99", "1,5")),
    ],
)
def test_a_table_of_others_is_refused(text, fault, tmp_path) -> None:
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=fault) as error:
        LabelStore(tmp_path, "regression" if "value" in text else "classification")
    assert str(error.value.file).startswith(str(tmp_path / "labels.csv"))
    assert (tmp_path / "labels.csv").read_text() == text


def test_paths_are_taken_as_other_programs_write_them(tmp_path) -> None:
    (tmp_path / "kept\\c.png").touch()
    text = f"path,label\na\\b.png,cat\n{tmp_path}/d/e.png,dog\n./d/e.png,dog\nkept\\c.png,cat\n"
    (tmp_path / "labels.csv").write_text(text)
    assert list(LabelStore(tmp_path).rows) == ["a/b.png", "d/e.png", "kept\\c.png"]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *((name, "expected 1 to 80 letters") for name in ("", "x" * 81, "../up", "a|b", ".hid", "=1+1", "-a", "'a")),
        *((name, "expected 1 to 80 letters") for name in ("con", "LPT1.x", "end.", "a<b", "a\\b")),
        ("CAT", "from 'cat' in capitals only"),
        ("a\u202eb", "control character"),
    ],
)
def test_a_class_that_can_be_no_folder_is_refused(name, fault) -> None:
    with pytest.raises(UserError, match=fault):
        class_name(name, ["cat"])


@pytest.mark.parametrize("name", ["  big   cat ", "c", "é 2", "conifer", "a.b", "7-x"])
def test_a_class_is_taken_without_spaces_around_it(name) -> None:
    assert class_name(name, ["cat"]) == " ".join(name.split())


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # tests may run as root
    with pytest.raises(UserError, match="can't be written to"):
        LabelStore(tmp_path)
