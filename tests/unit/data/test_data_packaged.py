"""Readers of packaged sets and CIFAR, on files that these tests write byte by byte from the formats' descriptions."""

import gzip
import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from sample_sets import sample_path
from torchvision.datasets.mnist import read_image_file, read_label_file
from written_images import encoded, member, tar_gz

from peft_vit.base.errors import UserError
from peft_vit.data import open_index
from peft_vit.data.sources.packaged import CIFAR, read_idx

ELPV_LINES = [
    "images/cell0001.png  1.0                 mono",
    "images/cell0002.png  0.3333333333333333  poly",
    "images/cell0003.png  0.6666666666666666  poly",
    "images/cell0004.png  0.0                 mono",
]


def write_elpv(file, lines=ELPV_LINES, broken=None):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("elpv_dataset/data/labels.csv", "\n".join(lines))
        for i in range(4):
            content = encoded(Image.new("L", (300, 300), 10 * (i + 1)))
            name = f"elpv_dataset/data/images/cell{i + 1:04d}.png"
            archive.writestr(name, content[: len(content) // 2] if i == broken else content)
    return file


def test_elpv_labels_strata_and_pixels(tmp_path, config):
    index = open_index(config("elpv", write_elpv(tmp_path / "elpv.whl")))
    assert index.labels.tolist() == [1, 0, 1, 0]  # probability >= 0.5
    assert index.strata.tolist() == [2, 1, 3, 0]  # 2 label + (mono 0, poly 1)
    assert index.labels.dtype == index.strata.dtype == np.int64
    assert [np.unique(np.asarray(index.read(i))).tolist() for i in range(4)] == [[10], [20], [30], [40]]
    assert (index.official_test, index.channels, "BY-NC-SA" in index.licence) == (None, 1, True)
    broken = open_index(config("elpv", write_elpv(tmp_path / "broken.whl", broken=2)))
    with pytest.raises(UserError, match=r"^\S+broken\.whl/elpv_dataset/data/images/cell0003\.png: .*replace it"):
        broken.read(2)


def test_digits_are_sklearns(config):
    from sklearn.datasets import load_digits

    index, digits = open_index(config("digits")), load_digits()
    assert np.array_equal(index.labels, digits.target)
    assert len(index.class_names) == 10
    for i in (0, 1000, 1796):
        assert np.abs(np.asarray(index.read(i)) - digits.images[i] / 16 * 255).max() <= 0.5


def write_idx(file, magic, shape, content):
    file.write_bytes(gzip.compress(magic + struct.pack(f">{len(shape)}I", *shape) + content))


@pytest.fixture
def fashion(tmp_path):
    for split, first in (("train", 0), ("t10k", 100)):
        pixels = bytes(first + k for k in range(2) for _ in range(28 * 28))
        write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", b"\0\0\x08\x03", (2, 28, 28), pixels)
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", b"\0\0\x08\x01", (2,), b"\x09\x03")
    return tmp_path


def test_fashion_mnist_pixels_labels_and_test_split(fashion, config):
    index = open_index(config("fashion-mnist", fashion))
    assert index.labels.tolist() == [9, 3, 9, 3]
    assert index.official_test.tolist() == [False, False, True, True]
    assert [np.unique(np.asarray(index.read(i))).tolist() for i in range(4)] == [[0], [1], [100], [101]]
    assert index.class_names[9] == "ankle boot"


def test_idx_reader_and_synthetic_writer_agree_with_torchvision(tmp_path):
    folder = sample_path("fashion-mnist")
    for kind, dimensions, oracle in (("images-idx3", 3, read_image_file), ("labels-idx1", 1, read_label_file)):
        file = folder / f"train-{kind}-ubyte.gz"
        plain = tmp_path / kind
        plain.write_bytes(gzip.decompress(file.read_bytes()))
        assert torch.equal(torch.from_numpy(read_idx(file, dimensions).astype(np.int64)), oracle(str(plain)).long())


def cifar_record(name, label, red, green, blue):
    leading = bytes([label]) if name == "cifar10" else bytes([77, label])  # CIFAR-100: coarse class first
    return leading + bytes([red]) * 1024 + bytes([green]) * 1024 + bytes([blue]) * 1024


def cifar_files(name):
    layout = CIFAR[name]
    files = {file: cifar_record(name, k, k, 100 + k, 200) for k, file in enumerate((*layout.train, layout.test))}
    last = len(files) - 1
    test_batch = bytearray(files[layout.test])
    red = 1 if name == "cifar10" else 2  # where the red plane starts
    test_batch[red : red + 2] = 255, 254  # top left and the pixel to its right
    files[layout.test] = bytes(test_batch) + cifar_record(name, 0, 9, 8, 7)
    files[layout.names] = "".join(f"name{k}\n" for k in range(last + 1)).encode() + b"\n"
    return files


def write_tar(file, files):
    tar_gz(file, ((member(f"some-folder/{name}"), content) for name, content in files.items()))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_records(tmp_path, config, name):
    layout = CIFAR[name]
    for file, content in cifar_files(name).items():
        (tmp_path / file).write_bytes(content)
    index = open_index(config(name, tmp_path))
    last = len(layout.train)
    assert index.labels.tolist() == [*range(last + 1), 0]
    assert index.official_test.tolist() == [False] * last + [True, True]
    assert np.asarray(index.read(0))[5, 5].tolist() == [0, 100, 200]
    image = np.asarray(index.read(last))  # (32, 32, 3)
    assert image[0, 0].tolist() == [255, 100 + last, 200]
    assert image[0, 1].tolist() == [254, 100 + last, 200]
    assert image[1, 0].tolist() == image[0, 2].tolist() == [last, 100 + last, 200]
    assert np.asarray(index.read(last + 1))[31, 31].tolist() == [9, 8, 7]
    assert index.class_names[1] == "name1"


def test_download_that_fails_says_where_to_put_the_file(config, monkeypatch):
    def unreachable(*args):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", unreachable)
    with pytest.raises(UserError, match=r"no network.*get cifar-10-binary"):
        open_index(config("cifar10"))


def test_download_is_checked_and_kept(config, monkeypatch, own_cache, tmp_path):
    calls = []

    def fake(url, root, filename, md5):
        calls.append((url, md5))
        write_tar(f"{root}/{filename}", cifar_files("cifar10"))

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fake)
    assert len(open_index(config("cifar10")).labels) == len(open_index(config("cifar10")).labels) == 7
    assert calls == [("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530")]
