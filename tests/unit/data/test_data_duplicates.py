"""The same image, or nearly the same, where it should not be: refused, kept on one side, or told."""

import io
import os
import shutil
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from PIL import Image
from sample_sets import sample_path, write_idx
from scipy.signal import convolve2d
from scipy.sparse.csgraph import connected_components
from written_images import save, zip_of

from peft_vit.base.errors import UserError
from peft_vit.core.config import DataConfig
from peft_vit.data import ImagesFile, image_warnings, images_file, inspect_images, load_data, make_splits, open_index
from peft_vit.data.inspection import duplicates
from peft_vit.data.inspection.copies import compared_thumbnail, copy_pairs
from peft_vit.data.inspection.inspect import links_of_one_label
from peft_vit.data.pixels import decode_image, to_pixels
from peft_vit.data.sources.folders import find_images
from peft_vit.data.sources.packaged import read_idx
from peft_vit.data.splits import count_crossing
from peft_vit.label.exchange import adopt
from peft_vit.label.images import ImageFolder
from peft_vit.label.labels import LabelStore

SIDE = 96


@cache
def textured(seed, side=SIDE):
    """Return a photograph's like: blobs of all sizes, (side, side, 3)."""
    rng = np.random.default_rng(seed)
    layers = []
    for cells in (3, 6, 12, 24):
        small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        layers.append(np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), np.float32))
    return np.mean(layers, axis=0).astype(np.uint8)


@pytest.fixture
def official(tmp_path):
    """Make root/train and root/test with 12 and 6 images of two classes, all different."""
    for i in range(18):
        split = "train" if i < 12 else "test"
        save(tmp_path / "root" / split / ("cat", "dog")[i % 2] / f"{i:02d}.png", textured(i))
    return tmp_path / "root"


@pytest.fixture
def pool(tmp_path):
    """Make pool/cat and pool/dog with 40 images, all different."""
    for i in range(40):
        save(tmp_path / "pool" / ("cat", "dog")[i % 2] / f"{i:02d}.png", textured(i))
    return tmp_path / "pool"


def config_of(dataset, path, **settings):
    return DataConfig(dataset=dataset, path=str(path), **({"image_size": 48, "validation_images": 4} | settings))


@pytest.mark.parametrize("pack", [lambda root: root, zip_of])
def test_an_image_in_train_and_test_is_refused_with_both_names(official, pool, pack):
    assert load_data(config_of("image-folder", official), 0).warnings == ()
    assert load_data(config_of("image-folder", pool, test_images=8), 0).warnings == ()
    shutil.copyfile(official / "train/cat/00.png", official / "test/cat/copy.png")
    config = config_of("image-folder", pack(official))
    for load in (lambda: make_splits(open_index(config), config, 0), lambda: load_data(config, 0)):  # nothing decoded
        with pytest.raises(UserError, match=r"test/cat/copy\.png \(test\) and train/cat/00\.png") as caught:
            load()
        assert caught.value.field == "data.path"
    save(official / "test/cat/copy.png", textured(12))  # the same pixels as another test image: told
    assert load_data(config_of("image-folder", official), 0).warnings == (
        "Images: 1 of 7 test images are copies of others there, such as test/cat/copy.png of test/cat/12.png; each "
        "counts",
    )
    save(official / "test/cat/copy.png", textured(30))
    save(official / "test/cat/other.bmp", textured(0))  # the pixels of train/cat/00.png in another file
    with pytest.raises(UserError, match=r"train/cat/00\.png \(\w+\) and test/cat/other\.bmp \(test\) are the same"):
        load_data(config_of("image-folder", official, validation_images=2), 0)
    for i in range(40):
        save(pool / ("cat", "dog")[i % 2] / f"{i:02d}.bmp", textured(i))
    with pytest.raises(UserError, match=r"are the same image, .*; \d+ images are on several sides like this one"):
        load_data(config_of("image-folder", pool, test_images=8), 0)


@pytest.mark.parametrize("made_by", [os.symlink, os.link, shutil.copyfile])
def test_a_test_row_that_is_a_training_file_is_refused(pool, made_by):
    made_by(pool / "cat/00.png", pool / "other.png")
    rows = [f"{name}/{i:02d}.png,{name},train" for i in range(20) for name in [("cat", "dog")[i % 2]]]
    rows += [f"{name}/{i:02d}.png,{name},test" for i in range(20, 26) for name in [("cat", "dog")[i % 2]]]
    (pool / "list.csv").write_text("\n".join(["path,label,split", *rows, "other.png,cat,test"]) + "\n")
    with pytest.raises(UserError, match=r"^data\.path: cat/00\.png \(training\) and other\.png \(test\) are the same"):
        load_data(config_of("csv", pool / "list.csv"), 0)


@pytest.mark.parametrize("test_split", ["fixed", "per_seed"])
def test_copies_of_a_file_never_come_on_two_sides_of_a_drawn_split(pool, test_split):
    for i in range(0, 40, 3):
        for copy in range(i % 3 + 1 + i % 2):
            folder = pool / ("cat", "dog")[i % 2]
            shutil.copyfile(folder / f"{i:02d}.png", folder / f"{i}_{copy}.png")
    config = config_of("image-folder", pool, test_images=8, test_split=test_split)
    index = open_index(config)
    pixels = [index.read(row).tobytes() for row in range(len(index.labels))]
    for seed in range(5):
        splits = make_splits(index, config.model_copy(update={"split_seed": seed}), seed)
        files = [{pixels[row] for row in rows} for rows in (splits.train, splits.validation, splits.test)]
        assert all(not first & second for first, second in combinations(files, 2))
        assert len(splits.validation) == len(files[1]) == 4  # no copies within
        assert len(splits.test) == len(files[2]) == 8
        assert len(files[0]) == 40 - 12
        left_out = len(index.labels) - len(splits.train) - 12
        said = [text for text in image_warnings(index, splits, 48) if "left out" in text]
        expected = f"Images: {left_out} files are left out as copies of validation or test images, such as "
        assert [text[: len(expected)] for text in said] == ([expected] if left_out else [])


def test_too_few_different_images_for_a_split(tmp_path):
    for i in range(30):  # 4 different images
        save(tmp_path / "few" / ("cat", "dog")[i % 2] / f"{i:02d}.png", textured(i % 4))
    few = config_of("image-folder", tmp_path / "few", validation_images=3, test_images=2)
    with pytest.raises(UserError, match=r"^data\.validation_images: 3 .* are too many: 2 different images"):
        load_data(few, 0)
    with pytest.raises(UserError, match=r"^data\.test_images: 5 .* are too many: 4 different images"):
        load_data(few.model_copy(update={"test_images": 5}), 0)
    with pytest.raises(UserError, match=r"^data\.train_images: 2 .* are too many: 0 of 30 remain"):
        load_data(few.model_copy(update={"validation_images": 2}), 0)


def test_digits_are_split_as_ever_and_nothing_is_said_of_them():
    config = DataConfig(dataset="digits", image_size=32, validation_images=400, test_images=600)
    data = load_data(config, 0)
    assert data.split_sha256 == "2ec495527b89f15f79a3cba3ed23c869c6223725e93a73a57a708551ee5341f3"
    assert data.warnings == ()


def put_into_test(folder, image, label):
    """Make an image of Fashion-MNIST's training file the first test image of another label; return its position."""
    train = read_idx(folder / "train-images-idx3-ubyte.gz", dimensions=3)
    test = read_idx(folder / "t10k-images-idx3-ubyte.gz", dimensions=3).copy()
    place = int(np.argmax(read_idx(folder / "t10k-labels-idx1-ubyte.gz", dimensions=1) == label))
    test[place] = train[image]
    write_idx(folder / "t10k-images-idx3-ubyte.gz", test)
    return len(train) + place


def test_a_packaged_set_keeps_its_splits_and_says_what_is_wrong_with_them():
    folder = sample_path("fashion-mnist")
    config = config_of("fashion-mnist", folder, image_size=28, validation_images=20)
    before = load_data(config, 0)
    place = put_into_test(folder, image=3, label=5)
    data = load_data(config, 0)
    assert (before.split_sha256, before.warnings) == (data.split_sha256, ())
    side = "training" if 3 in data.train.positions else "validation"
    assert data.warnings == (
        f"Images: 1 images are in two splits, such as image 3 ({side}) and image {place} (test); the splits stay as "
        "they are",
        f"Images: 1 images are of two classes, such as image 3 ('dress') and image {place} ('sandal'); one of the "
        "labels is wrong",
    )


def test_one_image_under_two_classes_is_named_even_if_one_file_is_left_out(pool):
    shutil.copyfile(pool / "cat/00.png", pool / "dog/same.png")
    for seed in range(4):
        data = load_data(config_of("image-folder", pool, test_images=8, split_seed=seed), 0)
        assert (
            "Images: 1 images are of two classes, such as cat/00.png ('cat') and dog/same.png ('dog'); one of the "
            "labels is wrong"
        ) in data.warnings


# --- nearly the same --------------------------------------------------------------------------------------------------


def jpeg(pixels, file):
    return save(file, pixels, quality=90)


def brighter(pixels, file):
    return save(file, np.clip(pixels * 1.1 + 5, 0, 255).astype(np.uint8))


def smaller(pixels, file):
    return save(file, np.asarray(Image.fromarray(pixels).resize((80, 80), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("change", [jpeg, brighter, smaller])
def test_an_image_saved_anew_on_the_other_side_is_told(official, change):
    change(textured(0), official / "test/cat" / ("again.jpg" if change is jpeg else "again.png"))
    (said,) = load_data(config_of("image-folder", official), 0).warnings
    assert said.startswith("Images: 1 images nearly equal one of another split, such as train/cat/00.png (")
    assert "and test/cat/again." in said


@pytest.mark.parametrize(
    "kind",
    [
        lambda rng: np.full((48, 48, 3), rng.integers(0, 256), np.uint8),  # flat
        lambda rng: (
            np.linspace(0, rng.integers(100, 256), 48)[None, :, None].repeat(48, 0).repeat(3, 2).astype(np.uint8)
        ),
        lambda rng: (128 + rng.normal(0, 1, (48, 48, 3))).astype(np.uint8),  # flat and noisy
    ],
    ids=["flat", "gradient", "noise"],
)
def test_images_without_detail_are_near_to_nothing(official, kind):
    rng = np.random.default_rng(0)
    levels = set()
    for split, name in ((split, name) for split in ("train", "test") for name in ("cat", "dog")):
        for i in range(6):
            pixels = kind(rng)
            if pixels.tobytes() not in levels:
                levels.add(pixels.tobytes())
                save(official / split / name / f"plain{i}.png", pixels)
    assert len(levels) > 12
    assert load_data(config_of("image-folder", official), 0).warnings == ()


@pytest.mark.parametrize("block", [4096, 7])
def test_near_groups_are_those_of_a_plain_search(block, monkeypatch):
    """Against NumPy's corrcoef and SciPy's convolution, pair by pair."""
    monkeypatch.setattr(duplicates, "_BLOCK", block)
    monkeypatch.setattr(duplicates, "_BATCH", 3)
    rng = np.random.default_rng(1)
    base = np.stack([textured(i, side=32) for i in range(30)])
    noise = rng.normal(0, 1, base.shape) * np.linspace(0, 12, 30)[:, None, None, None]  # the later, the farther off
    others = np.clip(base + noise, 0, 255).astype(np.uint8)[rng.permutation(30)]
    parts = [base, others[:10], others[10:]]

    def thumbnail(image):
        return image.astype(float).mean(2).reshape(16, 2, 16, 2).mean((1, 3))

    def fine(small):
        return convolve2d(small, [[0, -1, 0], [-1, 4, -1], [0, -1, 0]], mode="valid")

    images = [thumbnail(image) for part in parts for image in part]
    near = np.corrcoef([image.ravel() for image in images]) >= 0.999
    near &= np.corrcoef([fine(image).ravel() for image in images]) >= 0.98
    thumbnails = np.concatenate([duplicates.grey_thumbnails(part, np.arange(len(part))) for part in parts])
    for start in (0, 30):
        near[:start, :start] = False
        groups, (count, linked) = duplicates.near_groups(thumbnails, start), connected_components(near)
        assert len(set(zip(groups.tolist(), linked.tolist(), strict=True))) == len(set(groups)) == count
        assert 35 < count < 55


# --- kept -------------------------------------------------------------------------------------------------------------


def test_it_is_compared_once_and_again_if_the_answer_is_damaged(official, own_cache, monkeypatch):
    jpeg(textured(0), official / "test/cat/again.jpg")
    config = config_of("image-folder", official)
    said, compared = load_data(config, 0).warnings, []
    real = duplicates.near_groups
    monkeypatch.setattr(duplicates, "near_groups", lambda *args, **kw: compared.append(1) or real(*args, **kw))
    assert load_data(config, 0).warnings == said
    assert compared == []
    (file,) = (own_cache / "duplicates").iterdir()
    content = file.read_bytes()
    for damage in (b"", b"not numpy", content[:-8]):
        file.write_bytes(damage)
        assert load_data(config, 0).warnings == said
    assert len(compared) == 3


def test_crossing_by_hand():
    assert count_crossing(np.array([5, 1, 5, 1, 2]), np.array([0, 1, 2, 1, 0])) == (1, (0, 2))
    assert count_crossing(np.array([1, 2, 3]), np.array([0, 1, 2])) == (0, (0, 0))
    assert count_crossing(np.array([7, 7, 7, 3, 3]), np.array([0, 1, 2, 0, 1]))[0] == 2


# --- crops, mirrored images, frames ---------------------------------------------------------------------------------


def texture(seed):
    return Image.fromarray(textured(seed))


def cropped(picture: Image.Image) -> Image.Image:
    return picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(2, 6, 2 + 0.9 * SIDE, 6 + 0.9 * SIDE))


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


def write_classes(folder, count=12):
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
    assert found.unlinked > 5
    assert sum("--group" in line for line in found.lines()) == 1


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
