"""Readers of image files with labels: class folders, CSV."""

import hashlib
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from written_images import save, zip_of

from peft_vit.base.errors import UserError
from peft_vit.data import find_images, open_index
from peft_vit.data.files import files_below


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


CAPITALS = ("Train VAL", "TRAIN Validation", "train Test", "Train Valid TEST")


@pytest.mark.parametrize(
    "names", ["train val", "train valid", "train validation", "train test", "train val test", *CAPITALS]
)
def test_image_folder_with_official_split(folder, config, tmp_path, names):
    for name in names.split():
        shutil.copytree(folder, tmp_path / "root" / name)
    index = open_index(config("image-folder", tmp_path / "root"))
    assert index.class_names == ("cat", "dog")
    tested = names.split()[-1]
    assert index.official_test.tolist() == [name == tested for name in sorted(names.split()) for _ in range(4)]


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


def test_deeper_class_folders_are_hashed_by_their_names_from_the_top(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "top" / "a" / "deep")
    (tmp_path / "top" / "cat").mkdir()
    shutil.copy(folder / "cat/b.bmp", tmp_path / "top" / "cat" / "notes.txt")
    found = find_images(tmp_path / "top")
    names = ["cat/a.png", "cat/b.bmp", "dog/a.webp", "dog/c.PNG"]
    each = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    lines = "".join(f"a/deep/{name}\0{mark}\n" for name, mark in each.items())
    assert list(found.classes) == names
    assert found.tree.hashed(names) == (hashlib.sha256(lines.encode()).hexdigest(), each)
    (tmp_path / "top" / "cat" / "notes.txt").rename(tmp_path / "top" / "notes.txt")
    shutil.copy(folder / "cat/b.bmp", tmp_path / "top" / "a" / "deep" / "notes.txt")  # a name in both, packed
    packed = find_images(zip_of(tmp_path / "top"))
    assert list(packed.classes) == names
    assert packed.tree.read("cat/b.bmp") == (folder / "cat/b.bmp").read_bytes()


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
    for second, expected in (("test", [False, True, False]), ("train", None)):
        file = write_csv(folder, f"label,split,path\nx,train,cat/a.png\ny,{second},dog/a.webp\ny,train,dog/c.PNG\n")
        official = open_index(config("csv", file)).official_test
        assert (None if official is None else official.tolist()) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Path,Label,SPLIT\ncat/a.png,cat,Train\ndog/a.webp,dog,TEST\n",
        "\ufeff path , label, split\r\ncat/a.png , cat,\r\n\r\n dog/a.webp,dog ,test \r\n",
        'label;path;split\r\n"cat";cat/a.png;\r\ndog;"dog/a.webp";test\r\n',
        "path\tlabel\tsplit\ncat/a.png\tcat\t\ndog/a.webp\tdog\ttest\n",
    ],
)
def test_tables_as_programs_write_them(folder, config, text):
    index = open_index(config("csv", write_csv(folder, text)))
    assert (index.names, index.class_names) == (["cat/a.png", "dog/a.webp"], ("cat", "dog"))
    assert index.official_test.tolist() == [False, True]
    frame = pd.read_csv(io.StringIO(text.lstrip("\ufeff")), sep=None, engine="python")
    frame.to_parquet(folder / "list.parquet")
    written = open_index(config("csv", folder / "list.parquet"))
    assert (written.names, written.class_names) == (index.names, index.class_names)
    assert written.official_test.tolist() == [False, True]


def test_the_hash_of_a_table_is_that_of_what_is_used_of_it(folder, config):
    def hashed(text):
        return open_index(config("csv", write_csv(folder, text))).sha256

    table = "path,label,split\ncat/a.png,cat,\ndog/a.webp,dog,\ndog/c.PNG,dog,test\n"
    same = (
        "label ;weight; path;Split\r\n cat;1; cat/a.png;train\r\ndog ;2;./dog/a.webp;\r\n\r\ndog;3;dog/c.PNG; TEST\r\n"
    )
    others = (
        table.replace("a.png,cat", "a.png,Cat"),
        table.replace("webp,dog,", "webp,dog,test"),
        table.replace("dog/a.webp,dog,\n", ""),
        "\n".join([table.splitlines()[0], *table.splitlines()[:0:-1]]),  # other images are drawn
    )
    assert hashed(same) == hashed(table)
    assert len({hashed(text) for text in (table, *others)}) == 5
    before = hashed(table)
    paint(folder / "cat/a.png", (8, 8, 8))
    assert hashed(table) != before


def test_folders_above_may_have_any_name(folder, config, monkeypatch):
    before = open_index(config("image-folder", folder)).sha256
    above = os.path.join(os.fsencode(folder.parent), b"donn\xe9es")
    os.mkdir(above)
    os.rename(folder, os.path.join(above, b"images"))
    monkeypatch.chdir(os.fsdecode(above))
    assert open_index(config("image-folder", "images")).sha256 == before


def test_one_name_among_the_files_of_a_folder_does_not_cost_the_others(tmp_path) -> None:
    for name in (b"a.png", b".caf\xe9"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
    (tmp_path / "self").symlink_to("self")
    assert files_below(tmp_path) == ("a.png", "self")
    odd = os.fsdecode(b"caf\xe9.png")
    (tmp_path / odd).touch()
    assert files_below(tmp_path, []) == ("a.png", odd, "self")
    with pytest.raises(UserError, match="has a name that is not UTF-8"):
        files_below(tmp_path)


def test_folders_that_lead_to_each_other_are_read_once(tmp_path) -> None:
    names = [f"{k:02d}" for k in range(20)]  # 20! ways through them
    for name in names:
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "a.png").touch()
        for other in names:
            (tmp_path / "images" / name / f"to {other}").symlink_to(f"../{other}")
    outside = tmp_path / "outside" / "deep"
    outside.mkdir(parents=True)
    (outside / "b.png").touch()
    for link, target in {"00/o": outside, "o": outside, "p": tmp_path / "outside", "root": tmp_path / "images"}.items():
        (tmp_path / "images" / link).symlink_to(target)
    unused: dict[str, str] = {}
    assert files_below(tmp_path / "images", unused=unused) == (*(f"{name}/a.png" for name in names), "o/b.png")
    between = {f"{name}/to {other}/": f"{other}/" for name in names for other in names if name != other}
    assert unused == {**between, "00/o/": "o/", "p/deep/": "o/"}
