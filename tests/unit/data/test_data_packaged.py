"""Readers of packaged sets, on made-up files in their formats, whose labels and pixels are known."""

import gzip
import shutil
import tarfile

import numpy as np
import pytest
import torch
from sample_sets import sample_images, sample_path
from sklearn.datasets import load_digits
from torchvision.datasets.mnist import read_image_file, read_label_file

from peft_vit.base.errors import UserError
from peft_vit.data import open_index
from peft_vit.data.sources.packaged import read_idx


def zipped(folder):
    return shutil.make_archive(str(folder), "zip", folder.parent, folder.name)


def shown(index):
    return np.stack([np.asarray(index.read(i)) for i in range(len(index.labels))])


def test_elpv(config):
    index = open_index(config("elpv", zipped(sample_path("elpv"))))
    labels = np.tile([0, 0, 1, 1], 16)  # probability >= 0.5
    assert np.array_equal(index.labels, labels)
    assert np.array_equal(index.strata, 2 * labels + np.arange(64) // 32)  # 2 label + (mono 0, poly 1)
    assert index.labels.dtype == index.strata.dtype == np.int64
    assert np.array_equal(shown(index), sample_images(labels, 48, 1))
    assert (index.official_test, index.channels, "BY-NC-SA" in index.licence) == (None, 1, True)


def test_digits_are_sklearns(config):
    index, digits = open_index(config("digits")), load_digits()
    assert np.array_equal(index.labels, digits.target)
    assert len(index.class_names) == 10
    assert np.abs(shown(index) - digits.images / 16 * 255).max() <= 0.5


@pytest.mark.parametrize(
    ("name", "side", "channels", "classes", "each"),
    [
        ("fashion-mnist", 28, 1, 10, (8, 2)),
        ("cifar10", 32, 3, 10, (2, 2, 2, 2, 2, 2)),
        ("cifar100", 32, 3, 100, (2, 2)),
    ],
)
def test_sets_of_several_files_of_pixels(name, side, channels, classes, each, config):
    index = open_index(config(name, sample_path(name)))
    labels = [np.tile(np.arange(classes), count) for count in each]
    pixels = [sample_images(of_file, side, channels, number) for number, of_file in enumerate(labels)]
    assert np.array_equal(index.labels, np.concatenate(labels))
    assert np.array_equal(shown(index), np.concatenate(pixels))
    assert np.array_equal(index.official_test, np.arange(len(index.labels)) >= len(index.labels) - len(labels[-1]))
    assert index.class_names[9] == ("ankle boot" if name == "fashion-mnist" else "class 9")


@pytest.mark.parametrize("pack", [lambda folder: folder, zipped])
def test_tiny_imagenet(config, pack):
    index = open_index(config("tiny-imagenet", pack(sample_path("tiny-imagenet"))))
    labels = np.tile(np.arange(4), 12)
    order = [*np.argsort(labels[:32], kind="stable"), *range(32, 48)]  # of training images by class
    assert index.class_names[1] == "n00000002 class 1"
    assert np.array_equal(index.labels, labels[order])
    assert np.array_equal(index.official_test, np.arange(48) >= 32)
    means = sample_images(labels, 64, 3)[order].mean((1, 2))  # of which JPEG loses little
    assert np.abs(shown(index).mean((1, 2)) - means).max() < 4


def test_idx_reader_and_synthetic_writer_agree_with_torchvision(tmp_path):
    folder = sample_path("fashion-mnist")
    for kind, dimensions, oracle in (("images-idx3", 3, read_image_file), ("labels-idx1", 1, read_label_file)):
        file = folder / f"train-{kind}-ubyte.gz"
        plain = tmp_path / kind
        plain.write_bytes(gzip.decompress(file.read_bytes()))
        assert torch.equal(torch.from_numpy(read_idx(file, dimensions).astype(np.int64)), oracle(str(plain)).long())


def test_download_that_fails_says_where_to_put_the_file(config, monkeypatch):
    def unreachable(*args):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", unreachable)
    with pytest.raises(UserError, match=r"no network.*get cifar-10-binary"):
        open_index(config("cifar10"))


def test_download_is_checked_and_kept(config, monkeypatch):
    calls, folder = [], sample_path("cifar10")

    def fake(url, root, filename, md5):
        calls.append((url, md5))
        with tarfile.open(f"{root}/{filename}", "w:gz") as tar:
            tar.add(folder, "some-folder")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fake)
    for _ in range(2):
        assert len(open_index(config("cifar10")).labels) == 120
    assert calls == [("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530")]
