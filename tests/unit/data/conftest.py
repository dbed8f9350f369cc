"""Every test gets an empty cache of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_vit.core.config import DataConfig


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("PEFT_VIT_CACHE", str(cache))
    return cache


@pytest.fixture
def config() -> Callable[..., DataConfig]:
    def make(dataset: Any, path: Path | str | None = None, **settings: Any) -> DataConfig:
        defaults: dict[str, Any] = {"image_size": 14, "train_images": None, "validation_images": 2}
        return DataConfig(dataset=dataset, path=None if path is None else str(path), **(defaults | settings))

    return make
