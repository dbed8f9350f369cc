"""Decode once: what the cache holds, when it is used, and when it is rebuilt."""

import dataclasses
import os

import numpy as np
import pytest
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval

from peft_vit.base.errors import UserError
from peft_vit.data import ImageIndex
from peft_vit.data.pixels import cached_pixels, to_pixels


class Reader:
    """Ten grey images of 20 x 10 pixels, image i of level 10 i; counts what it decodes."""

    def __init__(self):
        self.decoded = []

    def __call__(self, i):
        self.decoded.append(i)
        return Image.new("L", (20, 10), 10 * i)


def index_of(read, channels=1, sha256="a" * 64):
    labels = np.arange(10) % 2
    return ImageIndex(labels, ("a", "b"), None, sha256, read, name="toy", channels=channels)


ROWS = np.array([1, 4, 7])


@pytest.mark.parametrize("channels", [1, 3])
def test_rows_are_decoded_once_resized_and_kept_grey(channels, own_cache):
    reader = Reader()
    pixels = cached_pixels(index_of(reader, channels), ROWS, 8)
    assert pixels.shape == (3, 8, 8, channels)
    assert pixels.dtype == np.uint8
    assert isinstance(pixels, np.memmap)
    assert [np.unique(image).tolist() for image in pixels] == [[10], [40], [70]]
    assert np.array_equal(cached_pixels(index_of(reader, channels), ROWS, 8), pixels)
    assert reader.decoded == ROWS.tolist()
    assert [p.suffix for p in (own_cache / "pixels").iterdir()] == [".npy"]  # no leftovers


@pytest.mark.parametrize(
    "other",
    [
        lambda index: (dataclasses.replace(index, sha256="b" * 64), ROWS, 8),
        lambda index: (dataclasses.replace(index, channels=3), ROWS, 8),
        *(
            lambda index, name=name: (dataclasses.replace(index, interpolation=name), ROWS, 8)
            for name in ("nearest", "bilinear", "lanczos")
        ),
        lambda index: (dataclasses.replace(index, resize="letterbox"), ROWS, 8),
        lambda index: (dataclasses.replace(index, resize="crop"), ROWS, 8),
        lambda index: (index, ROWS, 9),
        lambda index: (index, np.array([1, 4, 8]), 8),
    ],
)
def test_another_source_size_interpolation_or_row_is_another_file(other):
    reader = Reader()
    cached_pixels(index_of(reader), ROWS, 8)
    index, rows, size = other(index_of(reader))
    cached_pixels(index, rows, size)
    assert len(reader.decoded) == 6
    if index.resize is not None:
        return
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 10), dtype=np.uint8))
    resized = np.asarray(image.resize((size, size), Image.Resampling[index.interpolation.upper()]))
    assert np.array_equal(to_pixels(image, size, 1, index.interpolation)[..., 0], resized)


@pytest.mark.parametrize(("resize", "crop_mode"), [(None, "squash"), ("letterbox", "border"), ("crop", "center")])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_images_become_square_as_timm_makes_them(resize, crop_mode, interpolation):
    rng = np.random.default_rng(0)
    transform = transforms_imagenet_eval(32, 1.0, crop_mode, interpolation=interpolation, normalize=False)
    for sides in [(50, 300), (300, 50), (40, 100), (33, 64), (64, 35), (32, 35), (37, 32), (20, 20), (400, 2)]:
        image = Image.fromarray(rng.integers(0, 256, (*sides, 3), np.uint8))
        if (sides, resize) != ((400, 2), "letterbox"):  # of which timm leaves nothing
            expected = transform(image).permute(1, 2, 0).numpy()
            assert np.array_equal(to_pixels(image, 32, 3, interpolation, resize), expected), sides
    grey = to_pixels(Image.new("L", (400, 2), 200), 32, 1, interpolation, resize)
    assert np.unique(grey).tolist() == ([117, 200] if resize == "letterbox" else [200])


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: os.truncate(file, file.stat().st_size - 1),
        lambda file: file.write_bytes(b"not numpy at all" * 100),
        lambda file: np.save(file, np.array([{}]), allow_pickle=True),
        lambda file: np.save(file, np.zeros((3, 8, 8, 1), np.float32)),
    ],
)
def test_damaged_file_is_rebuilt_and_said(own_cache, damage, caplog):
    reader = Reader()
    first = np.array(cached_pixels(index_of(reader), ROWS, 8))
    (file,) = (own_cache / "pixels").iterdir()
    damage(file)
    assert np.array_equal(cached_pixels(index_of(reader), ROWS, 8), first)
    assert len(reader.decoded) == 6
    assert "is damaged; decoding its images again" in caplog.text
    cached_pixels(index_of(reader), ROWS, 8)
    assert len(reader.decoded) == 6


def test_broken_image_leaves_nothing_behind(own_cache):
    def broken(i):
        if i == 7:
            raise UserError("is not a readable image", file="x.png")
        return Image.new("L", (8, 8))

    with pytest.raises(UserError, match=r"x\.png"):
        cached_pixels(index_of(broken), ROWS, 8)
    assert list((own_cache / "pixels").iterdir()) == []


def test_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PEFT_VIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written .* set PEFT_VIT_CACHE to another folder"):
        cached_pixels(index_of(Reader()), ROWS, 8)


def test_two_builds_at_once(own_cache):
    finished_by_the_other = []

    def interrupted(i):  # another process builds the same file while this one is halfway through
        if i == 4:
            finished_by_the_other.append(cached_pixels(index_of(Reader()), ROWS, 8))
        return Image.new("L", (20, 10), 10 * i)

    mine = cached_pixels(index_of(interrupted), ROWS, 8)
    (others,) = finished_by_the_other
    assert np.array_equal(mine, others)
    assert [np.unique(image).tolist() for image in mine] == [[10], [40], [70]]
    assert len(list((own_cache / "pixels").iterdir())) == 1


def test_shrinking_averages_and_aspect_is_not_kept():
    # A fine checkerboard of 0 and 255 must become grey; without antialiasing it would stay black and white.
    board = Image.fromarray((np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8))
    assert np.abs(to_pixels(board, 8, 1).astype(int) - 127.5).max() < 10
    wide = np.zeros((10, 40), np.uint8)
    wide[:, 20:] = 200  # right half
    pixels = to_pixels(Image.fromarray(wide), 8, 1)[..., 0]
    assert pixels[:, :3].max() < 20
    assert pixels[:, 5:].min() > 180
