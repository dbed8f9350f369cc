"""What is refused of foreign folders, tables and archives: one line that names the file, and the field if it is one."""

import gzip
import os
import pickle
import shutil
import struct
import tracemalloc
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_sets import sample_path, write_idx
from written_images import encoded, png_by_hand

from peft_vit.base.errors import UserError
from peft_vit.data import decode_image, find_images, open_index
from peft_vit.data.sources import tables as tables_module
from peft_vit.data.sources.packaged import CIFAR, read_idx

IMAGE = "train/class_0/000.png"


def text(name, content):
    """Return what writes a text, or bytes, below a set's folder."""
    data = content.encode() if isinstance(content, str) else content
    return lambda root: (root / name).write_bytes(data) and None


def plain(spoil):
    """Return what spoils a folder without splits, and names it."""
    return lambda root: (spoil(root / "train") and None) or root / "train"


def row(line, columns="path,label", first=f"{IMAGE},cat"):
    return text("images.csv", f"{columns}\n{first}\n{line}\n")


def zipped(*names):
    """Return what packs images of these names."""

    def pack(root):
        with zipfile.ZipFile(root / "images.zip", "w") as archive:
            for name in ("cat/a.png", "dog/a.png", *names):
                archive.writestr(zipfile.ZipInfo(name), (root / IMAGE).read_bytes())
        return root / "images.zip"

    return pack


def idx(content):
    return text("train-images-idx3-ubyte.gz", content)


def shape(*sizes, magic=b"\0\0\x08\x03"):
    return magic + struct.pack(f">{len(sizes)}I", *sizes)


def called(name):
    """Return what gives a class a name."""
    return lambda root: os.rename(root / "train/class_0", root / "train" / name) or root / "train"


def named(name):
    return lambda root: root / name


CLASS = r"data\.path: class '.*\\.*' holds a control character"
ELPV_LINE = "images/cell0002.png  {}\n"
CASES = {
    "image-folder": [
        (plain(text("class_0/notes.txt", "x")), r"train/class_0/notes\.txt: is not an image file; repair it or"),
        (plain(lambda f: shutil.copy(f / "class_0/000.png", f)), r"000\.png: is in no class folder"),
        (lambda f: f.parent, r"has no class folders; use .* instead, with dataset: image-folder"),
        (plain(lambda f: (f / "x").mkdir()), r"data\.path: has class folders without an image \(x\); add images, or"),
        (lambda f: (f / "test/x").mkdir() or text("test/x/a.txt", "x")(f), r"folders without an image \(test/x\)"),
        (lambda f: shutil.copytree(f / "train", f / "x") and None, r"/x: is beside train/"),
        (plain(lambda f: (f / "class_0/l.png").symlink_to(f / "class_0/l.png")), r"l\.png: can't be read \(Too many"),
        (plain(lambda f: os.mkfifo(f / "class_0/p.png")), r"p\.png: can't be read \(a pipe"),
        (lambda f: shutil.rmtree(f / "train/class_1"), r"class 'class_1' is in test and not in train"),
        (lambda f: (f / "x").mkdir() or text("x/a.txt", "x")(f) or f / "x", r"data\.path: holds no image"),
        (named("nowhere"), r": data\.path: does not exist"),
        *((lambda f, name=name: Path(name), "does not exist") for name in ("x" * 5000, "a\0b", "~nobody-of-it/x")),
        *((called(name), CLASS) for name in ("\x1b[31mred", "two\nlines", "\u202egnp")),
        (called("class_1 "), r"data\.path: class 'class_1' is there twice, with different spaces; rename it"),
        (zipped("../cat/x.png"), r"holds a file of the name '\.\./cat/x\.png', which leads out"),
        *((zipped(name), "which leads out of it") for name in ("cat/../../x.png", "/cat/x.png", r"cat\..\x.png")),
        (zipped("cat/a.png"), r"images\.zip: holds 'cat/a\.png' twice"),
        (zipped(""), "holds a file of the name ''"),
    ],
    "tiny-imagenet": [
        (named("val/images/.."), r"data\.path: holds 0 files called words\.txt"),
        (text("val/val_annotations.txt", "val_7.JPEG\tn00000001\n"), r"txt:1: .*not there"),
        (text("val/val_annotations.txt", "val_32.JPEG\tn9\n"), r"txt:1: class 'n9' has no"),
        (text("val/val_annotations.txt", "val_32.JPEG\n"), r"txt:1: class '' has no"),
        (text("words.txt", "n00000001\tgold\x1b[2Jfish\n"), r"words\.txt: class .*\\x1b\[2J"),
    ],
    "csv": [
        (row("train/none.png,x"), r"train/none\.png: can't be read \(No such file"),
        (row("x" * 300 + ".png,x"), r"can't be read \(File name too long"),
        (lambda f: os.mkfifo(f / "p.png") or row("p.png,x")(f), r"p\.png: can't be read \(a pipe"),
        (row(f"./{IMAGE},cat\ntrain/class_0/003.png,dog"), r"images\.csv:3: train/.* occurs twice; the first row is"),
        (
            row(f"./{IMAGE},cat,test", "path,label,split", f"{IMAGE},cat,train"),
            r"csv:3: label: .* is 'cat' in test here and 'cat' in train",
        ),
        (row(",dog"), r"csv:3: expected a path and a label, one value a column; 1 of 2 rows can't be used"),
        *(
            (row(f"{p}b.png,x", first=f"{p}a.png,y"), r"csv: path: none of 2 paths exists, such")
            for p in ("C:\\", "https://")
        ),
        (row(f"./{IMAGE},x"), r"csv:3: label: .* is 'x' in train here and 'cat' in train"),
        *((row(f"train/class_0/003.png{end}"), r"csv:3: expected a path and a label") for end in ("", ",x,y")),
        (row("train/class_0/003.png,"), r"csv:3: has no label"),
        (row('train/class_0/003.png,"x'), r"images\.csv:3: is not a valid CSV"),
        (row("", "picture,label"), r"images\.csv:1: has the columns picture, label; expected path, label"),
        (text("images.csv", "picture;label;weight\n"), r"images\.csv:1: has the columns picture, label, weight"),
        (text("images.csv", "path, Path,label\n"), r"images\.csv:1: has the columns path, Path, label"),
        (text("images.csv", "path,label\n"), r"images\.csv: names no image"),
        (text("images.csv", "\n"), r"images\.csv:1: has the columns"),
        (
            row("train/class_0/003.png,x,dev", "path,label,split", f"{IMAGE},cat,train"),
            r"split: expected train, val or",
        ),
        (row("train/class_0/003.png,cat"), r"data\.path: holds 1 classes \(cat\)"),
        (lambda f: f, r"data\.path: is not a file"),
        (named(IMAGE), r"000\.png: is not UTF-8 text"),
        (row("train/class_0/003.png,\x9b31m"), CLASS),
        (row(f"train/class_0/003.png,{'x' * 1000}"), "or more than 255 letters"),
        (row("train/class_0/003.png,black  cat", first=f"{IMAGE},black cat"), "class 'black cat' is there twice"),
    ],
    "elpv": [
        *(
            (text("labels.csv", ELPV_LINE.format(values)), r"labels\.csv:1: expected 'path prob")
            for values in ("often  mono", "1.5  mono", "0.0  glass", "0.0")
        ),
        (text("labels.csv", "images/c.png  0.0  mono\n"), r"labels\.csv:1: images/c\.png is not"),
        (named("labels.csv"), r"labels\.csv: data\.path: is neither a folder nor a zip"),
    ],
    "fashion-mnist": [
        (idx(b"no gzip"), r"ubyte\.gz: is not a readable \.gz"),
        (idx(gzip.compress(shape(80, 28, 28) + bytes(80 * 784))[:-20]), r"is not a readable \.gz"),
        (idx(gzip.compress(shape(2, 28, 28) + bytes(784))), "holds 784 values"),
        (idx(gzip.compress(shape(1, 1, 1, magic=b"\0\0\x0d\x03"))), "is not an idx file of bytes"),
        (idx(gzip.compress(shape(1, 28, 28) + bytes(784))), "holds 80 labels for 1 images"),
        (lambda f: write_idx(f / "t10k-labels-idx1-ubyte.gz", np.full(20, 10)), "holds label 10, expected 0 to 9"),
        (lambda f: (f / "t10k-labels-idx1-ubyte.gz").unlink(), r"t10k-labels-idx1-ubyte\.gz: data\.path: is missing"),
    ],
    "cifar10": [
        (text("test_batch.bin", b"\1" * 100), r"test_batch\.bin: is 100 bytes"),
        (text("batches.meta.txt", "only\n"), r"a label is 9, but batches\.meta\.txt names 1"),
        (text("batches.meta.txt", b"\xff\n"), r"batches\.meta\.txt: is not UTF-8"),
        (text("batches.meta.txt", "a\nb\x1b[2J\n"), r"batches\.meta\.txt: class 'b"),
        (lambda f: (f / "data_batch_2.bin").unlink(), r"batch_2\.bin: data\.path: is missing"),
    ],
    "digits": [(lambda _: Path("x"), r"data\.path: has no effect with dataset: digits")],
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("dataset", "spoil", "message"), [(name, *case) for name, cases in CASES.items() for case in cases]
)
def test_refused_in_one_line(dataset, spoil, message, config):
    sound = None if dataset == "digits" else sample_path(dataset)
    path = spoil(sound.parent if dataset == "csv" else sound)
    with pytest.raises(UserError, match=message) as caught:
        open_index(config(dataset, path or sound))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("dataset", ["image-folder", "tiny-imagenet", "elpv", "cifar10", "fashion-mnist", "csv", "hf"])
@pytest.mark.parametrize("name", ["pipe", "pipe/x", "x" * 300])
def test_a_path_that_is_a_pipe_or_impossible(tmp_path, config, dataset, name):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError):
        open_index(config(dataset, tmp_path / name))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda sound: sound[: len(sound) // 2], r"class_0/000\.png: is not a readable image \(.*truncated"),
        (lambda _: b"<html>", r"class_0/000\.png: is not an image of a known format"),
        (lambda _: b"", r"class_0/000\.png: is empty"),
    ],
)
def test_a_broken_image_is_named_when_it_is_read(config, content, message):
    file = sample_path("image-folder") / IMAGE
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(content(file.read_bytes()))
    index = open_index(config("image-folder", file.parents[2]))
    with pytest.raises(UserError, match=message):
        [index.read(i) for i in range(len(index.labels))]


def test_a_class_that_cannot_be_listed_is_not_left_out(config, unreadable):
    folder = sample_path("image-folder") / "train"
    unreadable(folder / "class_1")
    with pytest.raises(UserError, match=r"class_1: can't be read \(Permission denied\)"):
        open_index(config("image-folder", folder))


@pytest.mark.parametrize("name", [b"chat\xe9", b"class_0/caf\xe9.png"])
def test_a_name_that_is_not_utf_8_is_refused(config, name):
    folder = sample_path("image-folder") / "train"
    old = folder / "class_0" if name.startswith(b"chat") else folder / "class_0/000.png"
    os.rename(old, os.path.join(os.fsencode(folder), name))
    with pytest.raises(UserError, match=r"\\udce9.*: has a name that is not UTF-8; rename it") as caught:
        open_index(config("image-folder", folder))
    str(caught.value).encode()  # it can be printed and stored


# --- from anybody: nothing in it is run, and bombs go off in a bounded room -------------------------------------------

MIB = 1 << 20


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def png(size=(8, 8)):
    return encoded(Image.new("RGB", size))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for name in ("cat/a.png", "cat/b.png", "dog/a.png", "dog/b.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png())
    return root


@pytest.fixture
def marker(tmp_path):
    """Return a path at which no malicious file may have made anything by the end of the test."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists()


@contextmanager
def in_memory_of(most_bytes):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most_bytes
    finally:
        tracemalloc.stop()


# --- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ICO", "PPM", "PCX", "TGA", "EPS"])
def test_other_formats_are_not_even_tried(kind):
    with pytest.raises(UserError, match=r"x\.png: is not an image of a known format"):
        decode_image(lambda: encoded(Image.new("RGB", (16, 16)), kind), "x.png")


@pytest.mark.parametrize(("width", "height"), [(9460, 9460), (30_000, 30_000), (70_000, 1), (1, 2**31 - 1)])
def test_an_image_of_too_many_pixels_is_refused_before_they_are_decoded(width, height):
    with in_memory_of(4 * MIB), pytest.raises(UserError, match=r"x\.png: is not a readable image \(.*(scale it|bomb)"):
        decode_image(lambda: png_by_hand(width, height, 8, 2, rows=bytes(9999)), "x.png")


def test_a_large_photograph_is_fine():
    assert decode_image(lambda: png((9000, 1000)), "x.png").size == (9000, 1000)


# --- archives -------------------------------------------------------------------------------------------------------


def bomb(file, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=method)
    return file


@pytest.mark.parametrize("as_numbers", [False, True])
def test_a_small_parquet_file_is_unpacked_no_further_than_a_table_goes(tmp_path, monkeypatch, as_numbers):
    """Equal texts take nothing in the file, whether they are stored as texts or as numbers of a list of them."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(tables_module, "LARGEST_BYTES", MIB)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 40_000, pa.int32()), pa.array(["x" * 1000]))
    column = column if as_numbers else column.dictionary_decode()
    pq.write_table(pa.table({"path": column, "label": column}), tmp_path / "images.parquet")
    assert (tmp_path / "images.parquet").stat().st_size < MIB // 20
    with (
        in_memory_of(10 * MIB),
        pytest.raises(UserError, match=r"images\.parquet: is not a readable Parquet file .*1048576 bytes"),
    ):
        find_images(tmp_path / "images.parquet")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_bomb_is_unpacked_no_further_than_an_image_goes(tmp_path, config, monkeypatch, method):
    monkeypatch.setattr("peft_vit.data.files.LARGEST_BYTES", MIB)
    file = bomb(tmp_path / "images.zip", [("cat/a.png", bytes(16 * MIB)), ("dog/a.png", png())], method)
    index = open_index(config("image-folder", file))
    index.read(1) if method == zipfile.ZIP_DEFLATED else None
    expected = (
        "larger than 1048576 bytes" if method == zipfile.ZIP_DEFLATED else "compressed with another method than deflate"
    )
    with (
        in_memory_of(8 * MIB),
        pytest.raises(UserError, match=rf"cat/a\.png: is not a readable image \(BadZipFile: {expected}"),
    ):
        index.read(0)


def test_pickles_under_the_names_of_the_binary_version_are_pixels(tmp_path, config, marker):
    for name in (*CIFAR["cifar10"].train, CIFAR["cifar10"].test):
        (tmp_path / name).write_bytes(pickle.dumps(Payload(marker)))
    (tmp_path / CIFAR["cifar10"].names).write_text("cat\ndog\n")
    with pytest.raises(UserError, match="not a multiple of a record"):
        open_index(config("cifar10", tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bytes((0, 0, 8, 3)) + struct.pack(">3I", 1, 2, 3) + bytes(16 * MIB), "holds more than 6 values"),
        (bytes((0, 0, 8, 3)) + struct.pack(">3I", 2**31, 2**31, 2**31) + bytes(9), "its header asks for"),
        (bytes((0, 0, 8, 3)) + struct.pack(">3I", 2**12, 16, 16), "holds 0 values"),
    ],
)
def test_an_idx_file_is_unpacked_no_further_than_its_header_says(tmp_path, content, message):
    file = tmp_path / "images.gz"
    file.write_bytes(gzip.compress(content))
    del content
    with in_memory_of(8 * MIB), pytest.raises(UserError, match=message):
        read_idx(file, dimensions=3)


# --- the cache ------------------------------------------------------------------------------------------------------


def test_a_remembered_hash_that_is_damaged_is_made_again(folder, config, own_cache):
    before = open_index(config("image-folder", folder)).sha256
    for content in (b"\xff\xfe", b"", b"x" * 64, before.encode() + b"\n"):
        for memo in (own_cache / "hashes").iterdir():
            memo.write_bytes(content)
        assert open_index(config("image-folder", folder)).sha256 == before
