"""From configuration to images: smoke runs, labels and images, thumbnails, and the real ELPV."""

import io

import numpy as np
import pytest
from PIL import Image
from sample_sets import sample_path
from sklearn.datasets import load_digits
from written_images import record_of

from peft_vit.base import packages
from peft_vit.base.errors import UserError
from peft_vit.base.packages import ELPV_WHEEL, fetch_wheel
from peft_vit.core.config import DATASETS, DataConfig
from peft_vit.data import load_data, make_splits, open_index, smoke_config, thumbnails_of

WITHOUT_TEST = ("elpv", "digits")


def full(name, **settings):
    defaults = {
        "image_size": 224,
        "train_images": None,
        "validation_images": 500,
        "test_images": 600 if name in WITHOUT_TEST else None,
        "path": "/nowhere/at/all" if DATASETS[name].needs_path else None,
    }
    return DataConfig(dataset=name, **(defaults | settings))


@pytest.mark.parametrize("name", DATASETS)
def test_smoke_takes_made_up_images(name):
    config = smoke_config(full(name), patch_size=16)
    data = load_data(config, 0, smoke=True)
    assert data.train.pixels.shape == (16, 32, 32, DATASETS[name].channels)
    assert set(data.train.labels) == set(range(4))
    assert len(data.validation) == 8
    assert len(data.test) == data.test.class_counts().sum() == (8 if name in WITHOUT_TEST else 24)
    assert "synthetic" in open_index(config, smoke=True).licence
    assert data.data_sha256 == open_index(full(name), smoke=True).sha256
    assert data.warnings == ()


@pytest.mark.parametrize("drawn", ["train_subset", "test_split"])
def test_smoke_works_with_every_training_subset_and_test_size(drawn):
    config = smoke_config(full("cifar10", test_images=600, train_images=1000, **{drawn: "per_seed"}))
    first, other = (load_data(config, seed, smoke=True) for seed in (0, 1))
    assert len(first.test) == len(other.test) == 8
    assert first.split_sha256 != other.split_sha256


@pytest.mark.parametrize("patch_size", [4, 8, 14, 16, 32])
def test_smoke_size_is_a_multiple_of_the_patch_and_valid(patch_size):
    config = smoke_config(full("digits"), patch_size)
    assert config.image_size % patch_size == 0
    assert config.image_size >= 2 * patch_size
    DataConfig.model_validate(config.model_dump())


def test_labels_belong_to_their_images_and_seeds_do_not_mix_in_the_cache():
    sizes = {"image_size": 14, "train_images": 100, "validation_images": 50, "test_images": 60}
    config = full("digits", **sizes, test_split="per_seed")
    index = open_index(config)
    for seed in (0, 1, 0):  # the third time from the cache
        data, splits = load_data(config, seed), make_splits(index, config, seed)
        assert (data.split_sha256, data.data_sha256) == (splits.sha256, index.sha256)
        for images, rows in zip((data.train, data.validation, data.test.open()), splits.parts, strict=True):
            assert np.array_equal(images.labels, index.labels[rows])
            original = np.stack([np.asarray(index.read(i)) for i in rows])
            assert np.allclose(images.pixels.mean(axis=(1, 2, 3)), original.mean(axis=(1, 2)), atol=8)


def test_broken_test_image_shows_before_training(tmp_path):
    folder = sample_path("image-folder")
    config = smoke_config(full("image-folder", path=str(folder), test_images=None))
    (folder / "test" / "class_0" / "030.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"test/class_0/030\.png: is not an image"):
        load_data(config, 0)


# --- thumbnails -------------------------------------------------------------------------------------------------------

DIGITS = DataConfig(dataset="digits", image_size=28, train_images=20, validation_images=10, test_images=10)
SHA256 = open_index(DIGITS).sha256


def test_small_images_are_enlarged_without_smoothing() -> None:
    files = thumbnails_of(record_of(DIGITS, SHA256), [7, 3])
    for file, position in zip(files, (7, 3), strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(file)))
        assert pixels.shape == (128, 128)
        assert np.array_equal(pixels[8::16, 8::16], np.rint(load_digits().images[position] * 255 / 16))
    assert files == thumbnails_of(record_of(DIGITS, SHA256), [7, 3])


def test_other_images_than_those_of_the_run_are_refused() -> None:
    for positions, sha256 in (([0], "0" * 64), ([10**6], SHA256), ([-1], SHA256)):
        with pytest.raises(UserError, match="are not those of the run"):
            thumbnails_of(record_of(DIGITS, sha256), positions)


@pytest.mark.parametrize("dataset", ["elpv", "cifar10", "tiny-imagenet"])
def test_nothing_is_downloaded(dataset: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PEFT_VIT_CACHE", str(tmp_path))
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    monkeypatch.setattr("torchvision.datasets.utils.download_url", lambda *_: pytest.fail("an address was asked"))
    config = DIGITS.model_copy(update={"dataset": dataset})
    with pytest.raises(UserError, match="is not on this machine"):
        thumbnails_of(record_of(config, SHA256), [0])
    packages.check_download("afterwards it may be")


@pytest.mark.real
def test_real_elpv(monkeypatch, request, tmp_path):
    monkeypatch.delenv("PEFT_VIT_CACHE")  # the wheel from the user's cache
    wheel = fetch_wheel(ELPV_WHEEL)
    monkeypatch.setenv("PEFT_VIT_CACHE", str(tmp_path / "cache"))
    config = full("elpv", path=str(wheel), image_size=84, train_images=64, validation_images=50)
    index = open_index(config)
    assert index.sha256 == ELPV_WHEEL.sha256
    assert np.bincount(index.labels).tolist() == [1508 + 295, 106 + 715]
    assert np.bincount(index.strata).tolist() == [588 + 117, 920 + 178, 56 + 313, 50 + 402]
    assert index.read(0).size == (300, 300)
    assert index.read(2623).mode == "L"
    data = load_data(config, 0)
    assert (len(data.train), len(data.validation), len(data.test)) == (64, 50, 600)
    assert data.test.class_counts().tolist() == [412, 188]
    assert data.train.pixels.shape == (64, 84, 84, 1)
    assert 60 < data.train.pixels.mean() < 200
