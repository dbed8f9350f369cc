"""Corrected labels: files move or rows change, each answer is written down, and is undone by content."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from label_sessions import write_digits

from peft_vit.base.errors import UserError
from peft_vit.data.sources.folders import find_images
from peft_vit.label.corrections import CORRECTIONS_FILE, Checking, Corrections, Doubt
from peft_vit.label.images import ImageFolder
from peft_vit.label.labels import ConflictError

TABLE = (
    '\ufeff"path";Class;Split;note\r\n"./d000.png";a;test;"x;\ry"\r\n\r\n'
    'd001.png;a;train;one\r\nd002.png;b;train;"two"\r\n'
)


@pytest.fixture
def folders(tmp_path) -> Path:
    """Return class folders a and b of four images each, and one of the same name in both."""
    write_digits(tmp_path, 8)
    for place, file in enumerate(sorted(tmp_path.glob("*.png"))):
        target = tmp_path / "images" / "ab"[place // 4] / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)
    shutil.copy(tmp_path / "images/b/d004.png", tmp_path / "images/b/d000.png")
    return tmp_path / "images"


@pytest.fixture
def table(tmp_path) -> Path:
    write_digits(tmp_path, 3)
    (tmp_path / "labels.csv").write_bytes(TABLE.encode())
    return tmp_path / "labels.csv"


def contents(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*.png")
    }


def test_a_file_moves_to_its_class_and_back_and_replaces_none(folders) -> None:
    before, corrections = contents(folders), Corrections(find_images(folders))
    assert corrections.record("a/d000.png", "a", "b", is_test=False) == "b/d000-2.png"
    moved = contents(folders)
    assert moved["b/d000-2.png"] == before["a/d000.png"]
    assert sorted(moved.values()) == sorted(before.values())
    (line,) = map(json.loads, (folders / CORRECTIONS_FILE).read_text().splitlines())
    assert (line["sha256"], line["before"], line["after"]) == (before["a/d000.png"], "a", "b")
    assert find_images(folders).classes["b/d000-2.png"] == "b"  # and the file of answers is no image of it
    corrections.undo()
    assert contents(folders) == before
    assert len((folders / CORRECTIONS_FILE).read_text().splitlines()) == 2


def test_a_row_changes_and_every_other_byte_stays(table) -> None:
    corrections = Corrections(find_images(table))
    corrections.record("d000.png", "a", "b", is_test=True)
    assert table.read_bytes().decode() == TABLE.replace('"./d000.png";a;test;"x;\ry"', './d000.png;b;test;"x;\ry"')
    assert find_images(table).classes["d000.png"] == "b"
    corrections.record("d002.png", "b", "b", is_test=False)  # confirmed
    assert corrections.undo().after == "b"
    assert corrections.undo().after == "a"
    assert find_images(table).classes["d000.png"] == "a"
    with pytest.raises(UserError, match="nothing to undo"):
        corrections.undo()


@pytest.mark.parametrize("kind", ["folders", "table"])
def test_undo_finds_a_renamed_image_by_content(kind, request) -> None:
    place: Path = request.getfixturevalue(kind)
    corrections = Corrections(find_images(place))
    name = corrections.record("a/d001.png" if kind == "folders" else "d001.png", "a", "b", is_test=False)
    if kind == "folders":
        (place / "b/deep").mkdir()
        (place / name).rename(place / "b/deep/other.png")
        expected = "a/deep/other.png"
    else:
        (place.parent / name).rename(place.parent / "other.png")
        place.write_text(place.read_text().replace("d001.png", "other.png"))
        expected = "other.png"
    Corrections(find_images(place)).undo()
    assert find_images(place).classes[expected] == "a"


@pytest.mark.parametrize("what", ["gone", "moved by hand"])
def test_undo_of_what_is_gone_is_a_line_and_the_one_before_can_be_undone(what, folders) -> None:
    corrections = Corrections(find_images(folders))
    corrections.record("a/d001.png", "a", "b", is_test=False)
    name = corrections.record("a/d002.png", "a", "b", is_test=False)
    if what == "gone":
        (folders / name).unlink()
    else:
        (folders / name).rename(folders / "a/d002.png")
    before = contents(folders)
    with pytest.raises(ConflictError, match="is gone" if what == "gone" else "is 'a' by now"):
        corrections.undo()
    assert contents(folders) == before
    assert corrections.undo().renamed == "a/d001.png"


def test_what_changed_meanwhile_is_not_overwritten(folders, table) -> None:
    corrections = Corrections(find_images(folders))
    (folders / "a/d001.png").rename(folders / "b/d001.png")
    with pytest.raises(ConflictError, match="is gone"):
        corrections.record("a/d001.png", "a", "b", is_test=False)
    of_table = Corrections(find_images(table))
    table.write_bytes(TABLE.replace("d001.png;a", "d001.png;b").encode())
    with pytest.raises(ConflictError, match="is 'b' by now"):
        of_table.record("d001.png", "a", "b", is_test=False)
    assert not (folders / CORRECTIONS_FILE).exists()
    table.write_text("path;Class;Split;note\nd001.png;a\n")
    with pytest.raises(UserError, match=r"labels\.csv:2"):
        of_table.record("d001.png", "a", "b", is_test=False)
    assert table.read_text() == "path;Class;Split;note\nd001.png;a\n"


def test_the_last_image_of_a_class_stays(folders) -> None:
    corrections = Corrections(find_images(folders))
    for name in ("d000.png", "d001.png", "d002.png"):
        corrections.record(f"a/{name}", "a", "b", is_test=False)
    with pytest.raises(UserError, match="last image of its class folder"):
        corrections.record("a/d003.png", "a", "b", is_test=False)
    find_images(folders)


def test_a_zip_and_a_damaged_file_of_answers_are_refused(folders, tmp_path) -> None:
    packed = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", folders))
    with pytest.raises(UserError, match="unpack a zip"):
        Corrections(find_images(packed))
    (folders / CORRECTIONS_FILE).write_text("{\n")
    with pytest.raises(UserError, match=CORRECTIONS_FILE):
        Corrections(find_images(folders)).undo()


def checking_of(folders: Path) -> Checking:
    doubts = [
        Doubt("a/d001.png", "a", is_test=False, believed="b", sure=0.9),
        Doubt("b/d004.png", "b", is_test=False, believed="a", sure=0.8),
        Doubt("a/d002.png", "a", is_test=True),
    ]
    return Checking(Corrections(find_images(folders)), ImageFolder(folders), doubts, ["a", "b"], "peft-vit train")


def test_a_checking_goes_through_doubts_and_asks_no_model_of_test_labels(folders) -> None:
    checking = checking_of(folders)
    state = checking.state()
    assert (state["names"], state["proposed"], state["believed"]) == (["a/d001.png"], "a", "b")
    assert "'b' (90%)" in state["note"]
    checking.record(state["ids"], ["b"])
    checking.refuse(checking.state()["ids"])
    state = checking.state()
    assert (state["names"], state["proposed"], state["believed"]) == (["a/d002.png"], "a", "a")
    assert "no model was asked" in state["note"]
    checking.record(state["ids"], ["b"])
    assert "Checked: 1. Wrong before: 1;" in checking.state()["about"]
    checking.undo()
    assert checking.state()["names"] == ["a/d002.png"]
    checking.record(checking.state()["ids"], ["a"])
    with pytest.raises(UserError, match="expected one of the classes"):
        checking.record(checking.state()["ids"], ["c"])
    (folders / "b/d004.png").unlink()
    with pytest.raises(ConflictError):
        checking.record(checking.state()["ids"], ["b"])
    assert not checking.state()["ids"]
    again = checking_of(folders).state()  # what was confirmed is not asked again, what is gone neither
    assert not again["ids"]
    assert again["undoable"]
