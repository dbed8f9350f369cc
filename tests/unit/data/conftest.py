"""Every test gets an empty cache of its own."""

import pytest

from peft_vit.config import DataConfig


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("PEFT_VIT_CACHE", str(cache))
    return cache


@pytest.fixture
def config():
    def make(dataset, path=None, **settings):
        defaults = {"image_size": 14, "train_images": None, "validation_images": 2}
        return DataConfig(dataset=dataset, path=None if path is None else str(path), **(defaults | settings))

    return make
