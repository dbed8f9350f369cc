"""Features that a process of its own appends to a file, and what reads them meanwhile."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from peft_vit.core.backbones import Backbone, load_backbone
from peft_vit.core.config import BackboneConfig
from peft_vit.data.pixels import to_pixels
from peft_vit.label import features
from peft_vit.label.features import FolderFeatures, compute_features, read_records, record_type
from peft_vit.label.images import ImageFolder


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(features, "DEFAULT_MODEL", "vit_tiny_patch16_224")
    monkeypatch.setattr("peft_vit.core.backbones.default_weights_source", lambda _: ("random", ""))
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(256, size=(60, 40, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "broken.png").write_bytes(b"no image")
    return tmp_path


def read(folder: Path, file: Path) -> tuple[list[str], np.ndarray]:
    """Return the names of the images that a file has looked at, and their features."""
    images = ImageFolder(folder)
    ids, records = read_records(file, [images.digest(i) for i in range(len(images.names))])
    return [images.names[i] for i in ids], records["features"]


def test_features_are_those_in_front_of_the_head_and_a_killed_process_continues(images: Path) -> None:
    file = images / "cache" / "features.npy"
    assert read(images, file)[0] == []
    compute_features(images, file, os.getpid())
    names, values = read(images, file)
    assert names == ["a.png", "b.png", "broken.png", "copy.png"]
    assert np.isfinite(values).all(1).tolist() == [True, True, False, True]
    assert values[0].tolist() == values[3].tolist() != values[1].tolist()
    config = BackboneConfig(model=features.DEFAULT_MODEL, weights="random", head_blocks=4)
    loaded = load_backbone(config, image_size=112, num_classes=2, seed=0)
    pixels = torch.from_numpy(to_pixels(Image.open(images / "b.png"), 112, 3).copy()).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (loaded.mean, loaded.std))
    with torch.inference_mode():
        expected = Backbone(loaded.model.eval()).features((pixels - mean) / std)[0]
    np.testing.assert_allclose(values[1], expected, atol=1e-4)

    whole = file.read_bytes()
    file.write_bytes(whole + b"half of a record")
    Image.new("RGB", (30, 30), "red").save(images / "later.png")
    compute_features(images, file, os.getpid())
    assert file.read_bytes().startswith(whole)  # nothing is computed twice
    names, with_later = read(images, file)
    assert names[-1] == "later.png"
    assert np.isfinite(with_later[-1]).all()
    np.testing.assert_array_equal(with_later[:-1], values)


def test_a_file_of_other_weights_is_begun_again(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, begun = images / "features.npy", features._begun
    compute_features(images, file, os.getpid())
    (images / "b.png").unlink()
    monkeypatch.setattr(features, "_begun", lambda file, dtype, _: begun(file, dtype, b"other"))
    size = file.stat().st_size
    compute_features(images, file, os.getpid())
    assert file.stat().st_size < size


def test_a_process_that_can_not_write_says_so_in_a_line(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (images / "file").write_bytes(b"")
    monkeypatch.setenv("PEFT_VIT_CACHE", str(images / "file"))
    process = FolderFeatures(ImageFolder(images))
    process._process.wait(timeout=300)
    assert "set PEFT_VIT_CACHE to another folder" in process.fault
    assert "\n" not in process.fault


def test_a_process_whose_parent_has_ended_computes_nothing(images: Path) -> None:
    compute_features(images, images / "features.npy", parent=-1)
    assert read(images, images / "features.npy")[0] == []


def test_what_is_there_is_read_of_images_by_their_content(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, ended = images / "features.npy", SimpleNamespace(code=None)
    monkeypatch.setattr(features.subprocess, "Popen", lambda *_, **__: SimpleNamespace(poll=lambda: ended.code))
    monkeypatch.setattr(features, "cache_file", lambda *_: file)
    folder = ImageFolder(images)
    computed, number = FolderFeatures(folder), folder.number
    assert computed.fault == ""
    assert len(computed.read().ids) == 0
    dtype = record_type(2, 1)
    features._begun(file, dtype, b"weights")
    rows = np.array([("", (1, 2), (3,), 4), ("", (np.nan, np.nan), (0,), 0)], dtype)
    rows["digest"] = [folder.digest(number[name]) for name in ("b.png", "broken.png")]
    with file.open("ab") as opened:
        opened.write(rows.tobytes())
    assert [part.tolist() for part in computed.read()] == [[[1, 2]], [number["b.png"]], [[3]], [4]]
    assert list(folder.left_out) == ["broken.png"]
    ended.code = -9
    assert computed.fault == "the process that computes features was killed"
