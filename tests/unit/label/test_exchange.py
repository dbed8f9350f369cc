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
    line = str(adopt(store, images, False))
    assert line.startswith("28 images have labels by their folders: digit 0, digit 1, digit 2. If folders aren't")
    assert all(name.split("/")[0] == row.labels[0] for name, row in store.rows.items())
    assert {row.split for row in store.rows.values()} == {"train", "test"}
    assert adopt(LabelStore(tmp_path), images, False) is None


@pytest.mark.parametrize("ignore", [True, False])
def test_folders_that_are_no_classes_are_left(ignore, tmp_path) -> None:
    (tmp_path / "2024").mkdir()
    folders_of(tmp_path / "2024") if ignore else write_digits(tmp_path / "2024", 9)
    assert adopt(*opened(tmp_path), ignore) is None
    assert not (tmp_path / "labels.csv").exists()


def test_a_table_beside_the_images_is_where_it_goes_on(tmp_path) -> None:
    write_digits(tmp_path, 6)
    (tmp_path / "images.csv").write_text("path,label\nd000.png\n")
    store, images = opened(tmp_path)
    assert str(adopt(store, images, False)).startswith("No labels were taken: ")
    (tmp_path / "images.csv").write_text("path;label;split\nd000.png;cat;test\nd001.png;dog;\n")
    assert adopt(store, images, False) == "2 images have labels by images.csv: cat, dog."
    assert store.rows["d000.png"] == Row(("cat",), "test")
    assert store.rows["d001.png"].split in ("train", "test")


def test_images_that_came_later_are_of_the_class_that_their_folder_is_called(tmp_path) -> None:
    folders_of(tmp_path)
    adopt(*opened(tmp_path), False)
    rng = np.random.default_rng(0)
    for folder in ("digit 0", "digit 1", "unsorted"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for i in range(15):
            Image.fromarray(rng.integers(0, 255, (9, 9), np.uint8)).save(tmp_path / folder / f"later{i}.png")
    before = dict(LabelStore(tmp_path).rows)
    store, images = opened(tmp_path)
    assert adopt(store, images, True) is None
    assert str(adopt(store, images, False)).startswith("30 more images have labels by their folders: digit 0, digit 1.")
    later = {name: row for name, row in store.rows.items() if name not in before}
    assert store.rows == before | later
    assert {row.labels[0] for row in later.values()} == {"digit 0", "digit 1"}
    assert {name: row.split == "test" for name, row in later.items()} == {
        name: images.is_test(images.number[name]) for name in later
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
    store.change({images.names[0]: rows[images.names[0]]}, {})
    with pytest.raises(UserError, match="needs two classes"):
        to_folders(store, images, output)
    store.change({**rows, images.names[5]: Row((), "unsure")}, {})
    assert to_folders(store, images, output) == 5
    found = find_images(output)  # as `train` does
    made = {f"{rows[name].split}/{rows[name].labels[0]}/{name}": name for name in images.names[:5]}
    assert found.classes == {name: name.split("/")[1] for name in sorted(made)}
    assert found.tested == {name for name in made if name.startswith("test/")}
    assert all((output / name).read_bytes() == (images_at / image).read_bytes() for name, image in made.items())
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
    before, kept = dict(store.rows), {images.names[0]: Row(label, "train", "mine")}
    store.change({**dict.fromkeys(before), **kept}, {})
    assert from_label_studio(store, images, tmp_path / "tasks.json").startswith("2 labels taken, 1 left")
    assert store.rows == before | kept


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
    annotations = [{"result": [{"type": "choices", "value": {"choices": ["cat"]}}]}]
    (tmp_path / "t.json").write_text(json.dumps([{"data": {"image": address}, "annotations": annotations}]))
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


def test_the_command_hands_over_and_refuses_in_a_line(tmp_path, capsys, monkeypatch) -> None:
    def ended(*options: str, code: int = 2) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["label", *options])
        assert ended.value.code == code
        return capsys.readouterr().err

    write_digits(tmp_path, 2)
    assert ended(str(tmp_path), "--to-label-studio", str(tmp_path / "t.json"), code=0) == ""
    assert json.loads((tmp_path / "t.json").read_text()) == []
    (tmp_path / "t.json").write_text('{"a": 1}')
    assert "is not Label Studio's JSON" in ended(str(tmp_path), "--from-label-studio", str(tmp_path / "t.json"))
    fault = f"error: {tmp_path}/nothing: is not a folder; name the one that your images lie in\n"
    assert ended(str(tmp_path / "nothing")) == fault
    monkeypatch.setattr("peft_vit.label.features.subprocess.Popen", lambda *_, **__: pytest.fail("computes already"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        (line,) = ended(str(tmp_path), "--no-browser", "--port", str(taken.getsockname()[1])).splitlines()
    assert "--port: " in line
    assert not (tmp_path / "labels.csv").exists()


def test_without_a_browser_the_address_is_told(capsys, monkeypatch) -> None:
    monkeypatch.setattr("webbrowser.open", lambda address: False)
    label_command._open("http://127.0.0.1:1/?key=x")
    assert "No browser" in capsys.readouterr().out
