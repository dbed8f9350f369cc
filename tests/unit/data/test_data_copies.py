"""Crops, mirrored images and frames are found among images that look alike, and stay on one side of every split."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from peft_vit.data import ImagesFile, images_file, inspect_images
from peft_vit.data.inspection.copies import compared_thumbnail, copy_pairs
from peft_vit.data.inspection.inspect import links_of_one_label
from peft_vit.data.pixels import decode_image, to_pixels
from peft_vit.data.sources.folders import find_images
from peft_vit.label.exchange import adopt
from peft_vit.label.images import ImageFolder
from peft_vit.label.labels import LabelStore

_SIDE = 96


def texture(seed: int) -> Image.Image:
    """Return a picture of a few dozen blobs."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:_SIDE, :_SIDE]
    value = np.zeros((_SIDE, _SIDE))
    places, sizes, heights = rng.uniform(0, _SIDE, (2, 40)), rng.uniform(3, 9, 40), rng.normal(0, 1, 40)
    for cx, cy, size, height in zip(*places, sizes, heights, strict=True):
        value += height * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * size**2))
    value = 255 * (value - value.min()) / np.ptp(value)
    return Image.fromarray(value.astype(np.uint8)).convert("RGB")


def cropped(picture: Image.Image) -> Image.Image:
    return picture.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC, box=(2, 6, 2 + 0.9 * _SIDE, 6 + 0.9 * _SIDE))


def mirrored(picture: Image.Image) -> Image.Image:
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def saved_again(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=50)
    return decode_image(file.getvalue, "again.jpg")


def turned(picture: Image.Image) -> Image.Image:
    """Return the next frame of a film."""
    return picture.rotate(3, Image.Resampling.BICUBIC, translate=(2, 1), fillcolor=(128, 128, 128))


@pytest.mark.parametrize("made", [cropped, mirrored, saved_again, turned])
def test_copies_are_found_and_nothing_else(made) -> None:
    pictures = [texture(seed) for seed in range(30)]
    every = [*pictures, *map(made, pictures[:10])]
    thumbnails = np.stack([compared_thumbnail(to_pixels(picture, 64, 3)) for picture in every])
    found, planted = {*map(tuple, copy_pairs(thumbnails).tolist())}, {(k, 30 + k) for k in range(10)}
    assert found <= planted
    assert len(found) >= 9


def write_classes(folder: Path, count: int = 12) -> None:
    for name, start in (("a", 0), ("b", 100)):
        (folder / name).mkdir(parents=True)
        for k in range(count):
            texture(start + k).save(folder / name / f"{k:02}.png")


def test_copies_of_one_label_stay_together_and_of_a_test_split_one_counts(tmp_path) -> None:
    write_classes(tmp_path / "all")
    cropped(texture(0)).save(tmp_path / "all/a/crop.png")
    mirrored(texture(100)).save(tmp_path / "all/a/other_label.png")
    found = inspect_images(tmp_path / "all")
    group = dict(zip(found.names, found.groups.tolist(), strict=True))
    assert group["a/crop.png"] == group["a/00.png"]
    assert group["a/other_label.png"] != group["b/00.png"]
    for split in ("train", "test"):
        write_classes(tmp_path / "split" / split, 12 if split == "train" else 2)
    for name, start in (("a", 200), ("b", 300)):
        for k in range(3):
            texture(start + k).save(tmp_path / f"split/test/{name}/new{k}.png")
    turned(texture(200)).save(tmp_path / "split/test/a/new_frame.png")
    left_out = inspect_images(tmp_path / "split").left_out
    assert left_out["train/a/00.png"] == "a copy of test/a/00.png, of the test split"
    assert left_out["test/a/new_frame.png"].startswith("a copy of test/a/new0.png")


def test_pairs_that_have_two_labels_as_often_as_chance_gives_are_no_copies() -> None:
    labels = np.arange(400) % 4
    rng = np.random.default_rng(0)
    copies = np.stack([np.arange(0, 200), np.arange(200, 400)], 1)  # 200 is a multiple of 4: of one label all
    np.testing.assert_array_equal(links_of_one_label(copies, labels), copies)
    one_wrong = np.concatenate([copies, [[0, 1]]])
    np.testing.assert_array_equal(links_of_one_label(one_wrong, labels), copies)
    by_chance = rng.integers(0, 400, (200, 2))
    assert len(links_of_one_label(by_chance, labels)) == 0
    mixed = np.concatenate([copies, by_chance[:10]])  # 5 % by chance, some of them of one label
    assert {tuple(pair) for pair in copies} <= {tuple(pair) for pair in links_of_one_label(mixed, labels)}


def test_two_films_that_are_alike_have_more_pairs_than_each_and_do_not_outvote_the_others() -> None:
    film = np.arange(320) // 8
    first, second = np.triu_indices(320, 1)
    in_one = film[first] == film[second]
    alike = (film[first] // 2 == film[second] // 2) & (film[first] < 4) & ~in_one  # films 0 and 1, 2 and 3
    pairs = np.stack([first, second], 1)
    found = links_of_one_label(pairs[in_one | alike], film % 4)
    np.testing.assert_array_equal(found, pairs[in_one])


def test_films_that_leave_too_few_of_a_class_are_told_and_not_joined(tmp_path) -> None:
    write_classes(tmp_path, 2)
    for name, start in (("a", 0), ("b", 100)):
        for k in range(2):
            picture = texture(start + k)
            for frame in range(6):
                picture.rotate(2 * frame, Image.Resampling.BICUBIC).save(tmp_path / name / f"{k}-{frame}.png")
    found = inspect_images(tmp_path)
    assert found.unlinked > 10
    assert sum("--group" in line for line in found.lines()) == 1


@pytest.mark.parametrize(("step", "lines"), [(2, 0), (16, 1)])
def test_neighbours_by_name_are_told_where_they_are_in_no_group(step, lines, tmp_path) -> None:
    for name, start in (("a", 0), ("b", 100)):
        (tmp_path / name).mkdir()
        for k in range(12):
            large = texture(start + k).resize((192, 192), Image.Resampling.BICUBIC)
            for frame in range(4):
                box = (step * frame // 2, 0, step * frame // 2 + 96, 96)
                large.crop(box).save(tmp_path / name / f"{k:02}-{frame}.png")
    found = inspect_images(tmp_path)
    assert sum("neighbours by name" in line for line in found.lines()) == lines
    split = [len({found.groups[found.names.index(name)] for name in pair}) == 2 for pair in found.alike]
    assert len(split) > 60
    assert (sum(split) > len(split) / 10) == bool(lines)


def test_groups_of_mixed_classes_leave_no_class_out_of_the_test(tmp_path) -> None:
    rows = ["path,label,film"]
    rng = np.random.default_rng(0)
    for film in range(20):
        for k, label in enumerate("aab" if film < 4 else "aac"):
            Image.fromarray(rng.integers(0, 255, (20, 20), np.uint8)).save(tmp_path / f"{film}-{k}.png")
            rows.append(f"{film}-{k}.png,{label},{film}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    found = inspect_images(find_images(tmp_path / "labels.csv", group="film"), least=2)
    label = dict(zip(found.names, found.labels.tolist(), strict=True))
    for seed in range(8):
        sealed = ImagesFile.model_validate(images_file(found, seed), strict=False).sealed
        assert {label[name] for name in sealed} == {0, 1, 2}


def test_labels_fifth_keeps_copies_on_one_side(tmp_path) -> None:
    write_classes(tmp_path)
    for name, start in (("a", 0), ("b", 100)):
        for k in range(12):
            turned(texture(start + k)).save(tmp_path / name / f"{k:02}-next.png")
    images = ImageFolder(tmp_path)
    store = LabelStore(images.root)
    adopt(store, images, ignore_folders=False)
    splits = {name: row.split for name, row in store.rows.items()}
    for name, split in splits.items():
        if "-next" in name:
            assert splits[name.replace("-next", "")] == split
    assert set(splits.values()) == {"train", "test"}
