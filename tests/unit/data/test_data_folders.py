"""Readers of image files with labels: Tiny ImageNet, class folders, CSV."""

import os
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image
from written_images import save

from peft_vit.data import open_index
from peft_vit.errors import UserError


def paint(file, value=(10, 20, 30), size=(20, 16), **options):
    save(file, Image.new("RGB", size, value), **options)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for i, name in enumerate(["cat/a.png", "cat/b.bmp", "dog/a.webp", "dog/c.PNG"]):
        paint(root / name, (i, 2 * i, 3 * i), **({"lossless": True} if name.endswith("webp") else {}))
    return root


def colour(index, i):
    return np.unique(np.asarray(index.read(i).convert("RGB")).reshape(-1, 3), axis=0).tolist()


def test_image_folder(folder, config):
    (folder / "README.txt").write_text("beside the class folders: ignored")
    index = open_index(config("image-folder", folder))
    assert index.class_names == ("cat", "dog")
    assert index.labels.tolist() == index.strata.tolist() == [0, 0, 1, 1]
    assert [colour(index, i) for i in range(4)] == [[[i, 2 * i, 3 * i]] for i in range(4)]
    assert (index.official_test, index.channels) == (None, 3)


def test_image_folder_as_zip_is_read_in_place(folder, config, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder))
        archive.writestr("__MACOSX/cat/._a.png", b"resource fork")
    index = open_index(config("image-folder", tmp_path / "images.zip"))
    assert index.labels.tolist() == [0, 0, 1, 1]
    assert colour(index, 3) == [[3, 6, 9]]


@pytest.mark.parametrize("test_name", ["val", "valid", "validation", "test"])
def test_image_folder_with_official_split(folder, config, tmp_path, test_name):
    shutil.copytree(folder, tmp_path / "root" / "train")
    shutil.copytree(folder, tmp_path / "root" / test_name)
    index = open_index(config("image-folder", tmp_path / "root"))
    assert index.class_names == ("cat", "dog")
    assert index.official_test.sum() == 4
    test_first = test_name == "test"  # sorted before train
    assert index.official_test.tolist() == [test_first] * 4 + [not test_first] * 4


def test_image_folder_with_three_splits_tests_on_test(folder, config, tmp_path):
    for name in ("train", "val", "test"):
        shutil.copytree(folder, tmp_path / "root" / name)
    assert open_index(config("image-folder", tmp_path / "root")).official_test.tolist() == [True] * 4 + [False] * 8


def test_image_folder_splits_with_other_classes(folder, config, tmp_path):
    shutil.copytree(folder, tmp_path / "root" / "train")
    shutil.copytree(folder / "cat", tmp_path / "root" / "val" / "cat")
    with pytest.raises(UserError, match="class 'dog' is in only one of train and val"):
        open_index(config("image-folder", tmp_path / "root"))


def test_hash_follows_names_and_contents_but_not_the_place(folder, config, tmp_path):
    before = open_index(config("image-folder", folder)).sha256
    shutil.copytree(folder, tmp_path / "copy")
    assert open_index(config("image-folder", tmp_path / "copy")).sha256 == before
    os.rename(folder / "cat/a.png", folder / "cat/z.png")
    renamed = open_index(config("image-folder", folder)).sha256
    os.rename(folder / "cat/z.png", folder / "cat/a.png")
    content = bytearray((folder / "cat/b.bmp").read_bytes())
    content[-1] ^= 1  # same size, another pixel
    (folder / "cat/b.bmp").write_bytes(content)
    changed = open_index(config("image-folder", folder)).sha256
    assert len({before, renamed, changed}) == 3


def test_a_class_that_cannot_be_listed_is_not_left_out(folder, config, unreadable):
    paint(folder / "bird/a.png")
    unreadable(folder / "bird")
    problem = rf"^{folder}/bird: can't be read \(Permission denied\); make it readable, or take it out$"
    with pytest.raises(UserError, match=problem):
        open_index(config("image-folder", folder))


def broken_jpeg(root):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "cat/x.jpg")
    content = (root / "cat/x.jpg").read_bytes()
    (root / "cat/x.jpg").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "cat/notes.txt").write_text("x"), r"cat/notes\.txt: is none of \.png .* take it out"),
        (lambda root: paint(root / "loose.png"), r"loose\.png: does not lie at <class>/<image>"),
        (lambda root: paint(root / "cat/deep/x.png"), r"cat/deep/x\.png: does not lie at"),
        (lambda root: (root / "bird").mkdir(), r"bird: is an empty folder"),
        (lambda root: shutil.rmtree(root / "dog"), r"holds 1 classes \(cat\), at least 2"),
        (lambda root: (root / "cat/x.png").symlink_to("/etc/hostname"), r"cat/x\.png: leads out of"),
        (lambda root: (root / "bird").symlink_to("/usr"), r"bird: leads out of"),
        (lambda root: (root / "bird").symlink_to(root / "cat"), r"bird: is a link to a folder"),
    ],
)
def test_image_folder_bad_layout(folder, config, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_index(config("image-folder", folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (broken_jpeg, r"cat/x\.jpg: is not a readable image \(.*truncated"),
        (lambda root: (root / "cat/x.jpg").write_text("<html>"), r"cat/x\.jpg: is not an image of a known format"),
        (lambda root: (root / "cat/x.jpg").write_bytes(b""), r"cat/x\.jpg: is not an image of a known format"),
    ],
)
def test_broken_image_is_named_when_read(folder, config, spoil, message):
    spoil(folder)
    index = open_index(config("image-folder", folder))
    with pytest.raises(UserError, match=message):
        [index.read(i) for i in range(5)]


def test_folder_without_images(tmp_path, config):
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(UserError, match=r"data\.path: holds no image"):
        open_index(config("image-folder", tmp_path))


@pytest.fixture
def tiny(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for k, wordnet_id in enumerate(["n01443537", "n01629819"]):
        paint(root / "train" / wordnet_id / "images" / f"{wordnet_id}_0.JPEG", (100 * k, 0, 0), quality=100)
        (root / "train" / wordnet_id / f"{wordnet_id}_boxes.txt").write_text(f"{wordnet_id}_0.JPEG\t0\t0\t62\t62\n")
        paint(root / "val" / "images" / f"val_{k}.JPEG", (0, 0, 100 * k), quality=100)
    paint(root / "test" / "images" / "test_0.JPEG")
    (root / "val" / "val_annotations.txt").write_text(
        "val_0.JPEG\tn01629819\t0\t32\t44\t62\nval_1.JPEG\tn01443537\t52\t55\t57\t59\n"
    )
    (root / "words.txt").write_text(
        "n01443537\tgoldfish, Carassius auratus\nn01629819\tEuropean fire salamander\nn09999999\tsomething else\n"
    )
    return root


def tiny_as(form, tiny, tmp_path):
    if form == "zip":
        return shutil.make_archive(str(tmp_path / "tiny-imagenet-200"), "zip", tmp_path, "tiny-imagenet-200")
    if form == "folder with zip":
        (tmp_path / "downloads").mkdir()
        shutil.make_archive(str(tmp_path / "downloads/tiny-imagenet-200"), "zip", tmp_path, "tiny-imagenet-200")
        return tmp_path / "downloads"
    return tiny


@pytest.mark.parametrize("form", ["folder", "zip", "folder with zip"])
def test_tiny_imagenet(tiny, config, tmp_path, form):
    index = open_index(config("tiny-imagenet", tiny_as(form, tiny, tmp_path)))
    assert index.class_names == ("n01443537 goldfish", "n01629819 European fire salamander")
    assert index.labels.tolist() == [0, 1, 1, 0]  # by the annotations, not by the order of names
    assert index.official_test.tolist() == [False, False, True, True]
    assert np.asarray(index.read(1))[5, 5, 0] == pytest.approx(100, abs=2)
    assert np.asarray(index.read(3))[5, 5, 2] == pytest.approx(100, abs=2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("val_7.JPEG\tn01443537\t0\t0\t1\t1", r"val_annotations\.txt:1: val/images/val_7\.JPEG is not there"),
        ("val_0.JPEG\tn00000000\t0\t0\t1\t1", r"val_annotations\.txt:1: class 'n00000000' has no training image"),
        ("val_0.JPEG", r"val_annotations\.txt:1: class '' has no training image"),
    ],
)
def test_tiny_imagenet_bad_annotation(tiny, config, line, message):
    (tiny / "val" / "val_annotations.txt").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        open_index(config("tiny-imagenet", tiny))


def test_tiny_imagenet_bad_words(tiny, config):
    (tiny / "words.txt").write_text("n01443537\tgold\x1b[2Jfish\n")
    with pytest.raises(UserError, match=r"words\.txt: class 'n01443537 gold\\x1b\[2Jfish' holds a control character"):
        open_index(config("tiny-imagenet", tiny))


def test_tiny_imagenet_in_another_folder(folder, config):
    with pytest.raises(UserError, match=r"data\.path: holds 0 files called words\.txt"):
        open_index(config("tiny-imagenet", folder))


def write_csv(folder, text):
    file = folder / "list.csv"
    file.write_bytes(text.encode())
    return file


def test_csv(folder, config):
    file = write_csv(folder, '\ufeffpath,label\r\ncat/a.png,"wild, cat"\r\n./dog/a.webp,dog\r\ndog/c.PNG,dog\r\n')
    index = open_index(config("csv", file))
    assert index.class_names == ("dog", "wild, cat")
    assert index.labels.tolist() == [1, 0, 0]
    assert colour(index, 1) == [[2, 4, 6]]
    assert index.official_test is None


def test_csv_with_split(folder, config):
    file = write_csv(folder, "label,split,path\nx,train,cat/a.png\ny,test,dog/a.webp\ny,train,dog/c.PNG\n")
    assert open_index(config("csv", file)).official_test.tolist() == [False, True, False]
    file = write_csv(folder, "label,split,path\nx,train,cat/a.png\ny,train,dog/a.webp\n")
    assert open_index(config("csv", file)).official_test is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("../secret.png,x", r"list\.csv:3: path: \.\./secret\.png leaves the CSV's folder"),
        ("cat/../../secret.png,x", r"list\.csv:3: path: .* leaves"),
        ("/etc/hostname,x", r"list\.csv:3: path: /etc/hostname leaves"),
        ("cat/none.png,x", r"list\.csv:3: path: .*cat/none\.png does not exist"),
        ("x" * 300 + ".png,x", r"list\.csv:3: path: .* does not exist"),
        ("./cat/a.png,cat", r"list\.csv:3: path: cat/a\.png stands twice"),
        ("./cat/a.png,x", r"list\.csv:3: label: cat/a\.png is 'x' here and 'cat' before; an image has one label"),
        ("cat/b.bmp,cat|dog\ndog/a.webp,dog", r"list\.csv: label: 'cat\|dog' stands for several labels; a model here"),
        ("cat/b.bmp,dog; cat\ndog/a.webp,dog;x", r"list\.csv: label: 'dog; cat' stands for several labels"),
        ("cat/b.bmp", r"list\.csv:3: expected a path and a label"),
        ("cat/b.bmp,", r"list\.csv:3: expected a path and a label"),
        ("cat/b.bmp,x,y", r"list\.csv:3: expected a path and a label"),
        ('cat/b.bmp,"x', r"list\.csv:3: is no valid CSV"),
    ],
)
def test_csv_bad_row(folder, config, rows, message):
    paint(folder.parent / "secret.png")
    with pytest.raises(UserError, match=message) as caught:
        open_index(config("csv", write_csv(folder, f"path,label\ncat/a.png,cat\n{rows}\n")))
    assert "\n" not in str(caught.value)


def test_csv_link_out_of_its_folder(folder, config):
    paint(folder.parent / "secret.png")
    (folder / "cat/link.png").symlink_to(folder.parent / "secret.png")
    with pytest.raises(UserError, match=r"cat/link\.png: leads out of"):
        open_index(config("csv", write_csv(folder, "path,label\ncat/link.png,x\n")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.png,x\n", r"list\.csv:1: has the columns file, label; expected path, label"),
        ("path,label,weight\n", r"list\.csv:1: has the columns path, label, weight"),
        ("path,label\n", r"list\.csv: names no image"),
        ("", r"list\.csv:1: has the columns"),
        ("path,label,split\ncat/a.png,x,validation\n", r"list\.csv:2: split: expected train or test"),
        ("path,label\ncat/a.png,x\n", r"data\.path: holds 1 classes"),
    ],
)
def test_csv_bad_table(folder, config, text, message):
    with pytest.raises(UserError, match=message):
        open_index(config("csv", write_csv(folder, text)))


def test_csv_that_is_a_folder_or_no_text(folder, config):
    with pytest.raises(UserError, match=r"data\.path: is not a file"):
        open_index(config("csv", folder))
    with pytest.raises(UserError, match=r"a\.png: is not UTF-8 text"):
        open_index(config("csv", folder / "cat/a.png"))


@pytest.mark.parametrize("name", ["nowhere", "x" * 5000, "a\0b", "~nobody-of-this-name/images"])
def test_a_missing_or_impossible_path_does_not_exist(config, name):
    with pytest.raises(UserError, match=r": data\.path: does not exist; correct the path"):
        open_index(config("image-folder", name))


@pytest.mark.parametrize("name", [b"chat\xe9", b"cat/caf\xe9.png"])
def test_a_name_that_is_not_utf_8_is_refused(folder, config, name):
    file = os.fsencode(folder / "cat/a.png")
    target = os.path.join(os.fsencode(folder), name)
    os.rename(os.path.dirname(file) if name.startswith(b"chat") else file, target)
    with pytest.raises(UserError, match=r"\\udce9.*: has a name that is not UTF-8; rename it") as caught:
        open_index(config("image-folder", folder))
    str(caught.value).encode()  # it can be printed and stored


def test_folders_above_may_have_any_name(folder, config, monkeypatch):
    before = open_index(config("image-folder", folder)).sha256
    above = os.path.join(os.fsencode(folder.parent), b"donn\xe9es")
    os.mkdir(above)
    os.rename(folder, os.path.join(above, b"images"))
    monkeypatch.chdir(os.fsdecode(above))
    assert open_index(config("image-folder", "images")).sha256 == before
