"""Labels of elsewhere are taken over and handed on: class folders, tables, Label Studio's JSON."""

import json
import shutil
import socket

import numpy as np
import pytest
from label_sessions import write_digits
from PIL import Image

from peft_vit.base.errors import UserError
from peft_vit.cli import label_command, main
from peft_vit.data.sources.folders import find_images
from peft_vit.label.exchange import adopt, from_label_studio, to_folders, to_label_studio
from peft_vit.label.images import ImageFolder
from peft_vit.label.labels import LabelStore, Row


def folders_of(root, count: int = 30) -> None:
    """Write class folders, and two images that are in none."""
    for name, label in write_digits(root, count, classes=3).items():
        (root / label).mkdir(exist_ok=True)
        if name > "d001.png":
            shutil.move(root / name, root / label / name)


def opened(root) -> tuple[LabelStore, ImageFolder]:
    return LabelStore(root), ImageFolder(root)


def test_class_folders_are_labels_and_a_fifth_of_them_tests(tmp_path) -> None:
    folders_of(tmp_path)
    store, images = opened(tmp_path)
    line = adopt(store, images, False)
    assert line is not None
    assert line.startswith("28 images have labels by their folders: digit 0, digit 1, digit 2.")
    assert all(name.split("/")[0] == row.labels[0] for name, row in store.rows.items())
    assert {row.split for row in store.rows.values()} == {"train", "test"}
    assert adopt(store, images, False) is None
    assert adopt(LabelStore(tmp_path), images, False) is None


@pytest.mark.parametrize("ignore", [True, False])
def test_folders_that_are_no_classes_are_left(ignore, tmp_path) -> None:
    (tmp_path / "2024").mkdir()
    folders_of(tmp_path / "2024") if ignore else write_digits(tmp_path / "2024", 9)
    store, images = opened(tmp_path)
    assert adopt(store, images, ignore) is None
    assert not (tmp_path / "labels.csv").exists()


def test_a_table_beside_the_images_is_where_it_goes_on(tmp_path) -> None:
    write_digits(tmp_path, 6)
    (tmp_path / "images.csv").write_text("path;label;split\nd000.png;cat;test\nd001.png;dog;\n")
    store, images = opened(tmp_path)
    assert "2 images have labels by images.csv: cat, dog." in str(adopt(store, images, False))
    assert store.rows["d000.png"] == Row(("cat",), "test")
    assert store.rows["d001.png"].split in ("train", "test")


def test_images_that_came_later_are_of_the_class_that_their_folder_is_called(tmp_path) -> None:
    folders_of(tmp_path)
    adopt(*opened(tmp_path), False)
    for folder, first in (("digit 0", 0), ("digit 1", 20), ("unsorted", 40)):
        (tmp_path / folder).mkdir(exist_ok=True)
        for i in range(first, first + 15):
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (9, 9), np.uint8)).save(
                tmp_path / folder / f"later{i}.png"
            )
    before = dict(LabelStore(tmp_path).rows)
    store, images = opened(tmp_path)
    assert adopt(store, images, True) is None
    line = adopt(store, images, False)
    assert line is not None
    assert line.startswith("30 more images have labels by their folders: digit 0, digit 1.")
    later = {name: row for name, row in store.rows.items() if name not in before}
    assert {name: store.rows[name] for name in before} == before
    assert {row.labels[0] for row in later.values()} == {"digit 0", "digit 1"}
    assert {name: row.split for name, row in later.items()} == {
        name: "test" if images.is_test(images.number[name]) else "train" for name in later
    }
    assert adopt(LabelStore(tmp_path), images, False) is None


def test_folders_are_made_that_train_reads(tmp_path) -> None:
    images_at, output = tmp_path / "images", tmp_path / "out"
    for folder in ("a", "A"):
        (images_at / folder).mkdir(parents=True)
        write_digits(images_at / folder, 3)
    store, images = opened(images_at)
    split = ["train", "test", "train"] * 2
    rows = {name: Row((("cat", "dog")[i % 2],), split[i]) for i, name in enumerate(images.names)}
    store.change({**rows, images.names[5]: Row((), "unsure")}, {})
    assert to_folders(store, images, output) == 5
    made = sorted(str(path.relative_to(output)) for path in output.rglob("*.png"))
    assert len({name.casefold() for name in made}) == 5
    assert all((output / name).read_bytes() for name in made)
    found = find_images(output)  # as `train` does
    assert (len(found.classes), len(found.tested)) == (5, 2)
    with pytest.raises(UserError, match="among your images"):
        to_folders(store, images, images_at / "out")
    with pytest.raises(UserError, match="holds files already"):
        to_folders(store, images, output)
    store.change({images.names[0]: Row(("../up",), "train")}, {})
    with pytest.raises(UserError, match="expected 1 to 80 letters"):
        to_folders(store, images, tmp_path / "other")
    assert not (tmp_path / "up").exists()


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_label_studio_gets_and_gives_the_same(task, tmp_path) -> None:
    write_digits(tmp_path, 4)
    images, store = ImageFolder(tmp_path), LabelStore(tmp_path, task)
    label = {"classification": ("cat",), "multilabel": ("cat", "dog"), "regression": ("1.5",)}[task]
    split = {name: "test" if images.is_test(i) else "train" for i, name in enumerate(images.names)}
    store.change({name: Row(label, split[name]) for name in images.names[:3]}, {})
    to_label_studio(store, tmp_path / "tasks.json")
    before = dict(store.rows)
    store.change(dict.fromkeys(before), {})
    assert from_label_studio(store, images, tmp_path / "tasks.json").startswith("3 labels taken, 0 left")
    assert store.rows == before


@pytest.mark.parametrize(
    ("address", "is_taken"),
    [
        ("d000.png", True),
        ("/data/local-files/?d=d000.png", True),
        ("/data/upload/3/0a1b2c3d-d000.png", True),
        ("http://169.254.169.254/latest/other.png", False),
        ("file:///etc/passwd", False),
        ("http://[d000.png", False),
        ("/data/local-files/?d=../outside.png", False),
    ],
)
def test_label_studio_names_only_images_of_the_folder(address, is_taken, tmp_path, monkeypatch) -> None:
    images_at = tmp_path / "images"
    images_at.mkdir()
    write_digits(images_at, 2)
    shutil.copy(images_at / "d000.png", tmp_path / "outside.png")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("opened an address"))
    result = [{"type": "choices", "value": {"choices": ["cat"]}}]
    (tmp_path / "t.json").write_text(json.dumps([{"data": {"image": address}, "annotations": [{"result": result}]}]))
    store, images = opened(images_at)
    assert from_label_studio(store, images, tmp_path / "t.json").startswith(f"{int(is_taken)} labels taken")
    assert list(store.rows) == ["d000.png"] * is_taken


@pytest.mark.parametrize(
    ("task", "value", "taken"),
    [
        ("classification", {"rectanglelabels": ["cat"]}, 0),
        ("classification", {"choices": ["cat", "dog"]}, 0),
        ("regression", {"choices": ["many"]}, 0),
        ("regression", {"text": ["1"]}, 0),
        ("regression", {"number": 0}, 1),
        ("multilabel", {"choices": ["cat", "dog"]}, 1),
        ("multilabel", {"rectanglelabels": ["cat"]}, 0),
    ],
)
def test_only_what_can_be_a_label_is_taken_of_label_studio(task, value, taken, tmp_path) -> None:
    write_digits(tmp_path, 1)
    annotations = [{"result": [{"type": "relation"}, {"value": value}]}]
    (tmp_path / "t.json").write_text(json.dumps([{"data": {"image": "d000.png"}, "annotations": annotations}]))
    store, images = LabelStore(tmp_path, task), ImageFolder(tmp_path)
    assert from_label_studio(store, images, tmp_path / "t.json").startswith(f"{taken} labels taken")
    with pytest.raises(UserError, match="exists already; give another name"):
        to_label_studio(store, tmp_path / "t.json")


def test_a_class_that_is_not_tested_makes_no_folders(tmp_path) -> None:
    (tmp_path / "images").mkdir()
    write_digits(tmp_path / "images", 3)
    store, images = opened(tmp_path / "images")
    labels = [Row(("cat",), "train"), Row(("cat",), "test"), Row(("dog",), "train")]
    store.change(dict(zip(images.names, labels, strict=True)), {})
    with pytest.raises(UserError, match="class 'dog' is in train only; label more") as error:
        to_folders(store, images, tmp_path / "out")
    assert error.value.field == "--to-folders"
    assert not (tmp_path / "out").exists()


def test_labels_that_cannot_be_taken_are_told(tmp_path) -> None:
    write_digits(tmp_path, 3)
    (tmp_path / "images.csv").write_text("path,label\nd000.png\n")
    assert str(adopt(*opened(tmp_path), False)).startswith("No labels were taken: ")


def test_a_file_of_others_is_refused(tmp_path) -> None:
    write_digits(tmp_path, 2)
    (tmp_path / "t.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="is not Label Studio's JSON"):
        from_label_studio(*opened(tmp_path), tmp_path / "t.json")


def test_the_command_hands_over_and_refuses_in_a_line(tmp_path, capsys) -> None:
    write_digits(tmp_path, 2)
    with pytest.raises(SystemExit) as ended:
        main(["label", str(tmp_path), "--to-label-studio", str(tmp_path / "t.json")])
    assert ended.value.code == 0
    assert json.loads((tmp_path / "t.json").read_text()) == []
    with pytest.raises(SystemExit) as ended:
        main(["label", str(tmp_path / "nothing")])
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err == f"error: {tmp_path}/nothing: is not a folder; name the one that your images lie in\n"
    )


def test_a_port_in_use_is_refused_in_a_line(tmp_path, capsys) -> None:
    write_digits(tmp_path, 3)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as ended:
        main(["label", str(tmp_path), "--no-browser", "--port", str(taken.getsockname()[1])])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--port: " in line
    assert not (tmp_path / "labels.csv").exists()


def test_without_a_browser_the_address_is_told(capsys, monkeypatch) -> None:
    monkeypatch.setattr("webbrowser.open", lambda address: False)
    label_command._open("http://127.0.0.1:1/?key=x")
    assert "No browser" in capsys.readouterr().out
