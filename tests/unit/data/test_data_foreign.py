"""Images and archives from anybody: nothing in them is run, nothing is left, and bombs go off in a bounded room."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
import tracemalloc
import zipfile
from contextlib import contextmanager

import pytest
from PIL import Image
from written_images import encoded, png_by_hand

from peft_vit.base.errors import UserError
from peft_vit.data import decode_image, find_images, open_index
from peft_vit.data.sources import tables as tables_module
from peft_vit.data.sources.packaged import CIFAR, read_idx

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


def zipped(file, members, method=zipfile.ZIP_DEFLATED):
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
    file = zipped(tmp_path / "images.zip", [("cat/a.png", bytes(16 * MIB)), ("dog/a.png", png())], method)
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
