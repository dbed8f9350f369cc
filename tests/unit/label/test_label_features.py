"""Features that a process of its own appends to a file, and what reads them meanwhile."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from peft_vit.core.backbones import Backbone, load_backbone
from peft_vit.core.config import BackboneConfig
from peft_vit.data.pixels import to_pixels
from peft_vit.label import features
from peft_vit.label.features import FeatureFile, FolderFeatures, compute_features
from peft_vit.label.images import ImageFolder

NAMES = ["a.png", "b.png", "copy.png", "broken.png", "gone.png"]


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(features, "DEFAULT_MODEL", "vit_tiny_patch16_224")
    monkeypatch.setattr("peft_vit.core.backbones.default_weights_source", lambda _: ("random", ""))
    rng = np.random.default_rng(0)
    for name in NAMES[:2]:
        Image.fromarray(rng.integers(256, size=(60, 40, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "broken.png").write_bytes(b"no image")
    return tmp_path


def digests(folder: Path, names: list[str]) -> list[str]:
    return [
        hashlib.sha256((folder / name).read_bytes() if (folder / name).exists() else b"").hexdigest() for name in names
    ]


def test_features_are_those_in_front_of_the_head_and_a_killed_process_continues(images: Path) -> None:
    file = images / "cache" / "features.npy"
    read = FeatureFile(file, digests(images, NAMES))
    read.update()
    assert read.values.shape == (5, 0)
    assert not read.done.any()
    compute_features(images, NAMES, file, os.getpid())
    read.update()
    assert read.done.tolist() == [True, True, True, True, False]
    assert read.ready.tolist() == [True, True, True, False, False]
    assert read.values[0].tolist() == read.values[2].tolist() != read.values[1].tolist()
    config = BackboneConfig(model=features.DEFAULT_MODEL, weights="random", head_blocks=4)
    loaded = load_backbone(config, image_size=112, num_classes=2, seed=0)
    pixels = torch.from_numpy(to_pixels(Image.open(images / "b.png"), 112, 3).copy()).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (loaded.mean, loaded.std))
    with torch.inference_mode():
        expected = Backbone(loaded.model.eval()).features((pixels - mean) / std)[0]
    np.testing.assert_allclose(read.values[1], expected, atol=1e-4)

    whole = file.read_bytes()
    file.write_bytes(whole + b"half of a record")
    Image.new("RGB", (30, 30), "red").save(images / "later.png")
    compute_features(images, [*NAMES, "later.png"], file, os.getpid())
    assert file.read_bytes().startswith(whole)  # nothing is computed twice
    later = FeatureFile(file, digests(images, ["later.png", "a.png"]))
    later.update()
    assert later.ready.all()
    np.testing.assert_array_equal(later.values[1], read.values[0])


def test_a_file_of_other_weights_is_begun_again(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = images / "features.npy"
    compute_features(images, NAMES, file, os.getpid())
    whole = file.stat().st_size
    begun = features._begun

    def of_other_weights(file: Path, dtype: np.dtype, weights: bytes) -> set[bytes]:
        return begun(file, dtype, b"other")

    monkeypatch.setattr(features, "_begun", of_other_weights)
    compute_features(images, ["a.png"], file, os.getpid())
    assert file.stat().st_size < whole


def test_a_process_that_can_not_write_says_so_in_a_line(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (images / "file").write_bytes(b"")
    monkeypatch.setenv("PEFT_VIT_CACHE", str(images / "file"))
    process = FolderFeatures(ImageFolder(images))
    process._process.wait(timeout=300)
    assert "set PEFT_VIT_CACHE to another folder" in process.fault
    assert "\n" not in process.fault


def test_a_process_whose_parent_has_ended_computes_nothing(images: Path) -> None:
    file = images / "features.npy"
    compute_features(images, NAMES, file, parent=-1)
    read = FeatureFile(file, digests(images, NAMES))
    read.update()
    assert not read.done.any()
