"""Thumbnails show the images of the run, or say why not; they are never downloaded."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from written_images import record_of

from peft_vit.base import packages
from peft_vit.base.errors import UserError
from peft_vit.core.config import DataConfig
from peft_vit.data import open_index, thumbnails_of

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
