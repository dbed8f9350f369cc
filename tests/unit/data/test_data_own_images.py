"""Images as people have them: where they are found, what is left out or refused, and that each is decoded once."""

import json
import os
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image, features
from written_images import encoded, save, textured, zip_of

from peft_vit.base.errors import UserError
from peft_vit.core.config import DataConfig
from peft_vit.data import (
    PixelStore,
    decode_image,
    find_images,
    images_file,
    inspect_images,
    load_data,
    make_splits,
    open_index,
)
from peft_vit.data import pixels as pixels_module
from peft_vit.data.inspection import decoding as decoding_module
from peft_vit.data.inspection.inspect import listed
from peft_vit.data.pixels import cached_pixels


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PEFT_VIT_CACHE", str(folder))
    return folder


PLAIN = np.full((48, 64, 3), (200, 60, 20), dtype=np.uint8)


def fill(root, images=6, classes=("кот", "hund mit hut")):
    for label, name in enumerate(classes):
        for i in range(images):
            save(root / name / f"bild {i}.{'PNG' if i % 2 else 'png'}", textured(100 * label + i))
    return root


# --- where they are ---------------------------------------------------------------------------------------------------


def deeper(root):
    fill(root / "dataset")
    (root / "dataset" / "кот" / "Thumbs.db").write_bytes(b"x")
    (root / "dataset" / ".DS_Store").write_bytes(b"x")
    (root / "__MACOSX").mkdir()
    (root / "__MACOSX" / "a.png").write_bytes(b"x")
    (root / "empty").mkdir()


def at_two_depths(root):
    fill(root)
    (root / "кот" / "2023" / "may").mkdir(parents=True)
    os.rename(root / "кот" / "bild 0.png", root / "кот" / "2023" / "may" / "bild 0.png")
    (root / "hund mit hut").rename(root / "2024")
    (root / "hund mit hut").mkdir()
    (root / "2024").rename(root / "hund mit hut" / "2024")


def zipped(root):
    fill(root / "packed" / "icons" / "deep")
    beside = root / "packed" / "__MACOSX" / "icons" / "deep"
    beside.mkdir(parents=True)
    (beside / "._a.png").write_bytes(b"x")
    return zip_of(root / "packed")


def split_deeper(root):
    fill(root / "set" / "train")
    fill(root / "set" / "test", 1, ("кот", "hund mit hut"))


def only_train(root):
    fill(root / "train")


def linked(root):
    fill(root / "elsewhere")
    images = root / "images"
    (images / "hund mit hut").mkdir(parents=True)
    (images / "кот").symlink_to(root / "elsewhere" / "кот")
    for file in sorted((root / "elsewhere" / "hund mit hut").iterdir()):
        (images / "hund mit hut" / file.name).symlink_to(file)
    (images / "again").symlink_to(images)
    (images / "above").symlink_to("..")
    (images / "кот" / "round").symlink_to(images)
    return images


def csv_beside(root):
    fill(root / "all", 6, ("кот", "hund mit hut"))
    (root / "flat").mkdir()
    rows = []
    for file in sorted((root / "all").rglob("*.*")):
        new = root / "flat" / f"{file.parent.name} {file.name}"
        rows.append((str(new if len(rows) % 2 else new.relative_to(root)), file.parent.name, 1))
        os.rename(file, new)
    shutil.rmtree(root / "all")
    pd.DataFrame(rows, columns=["path", "label", "weight"]).to_csv(root / "labels.csv", index=False)


def parquet(root):
    files = sorted(fill(root / "elsewhere").rglob("*.[pP]*"))
    (root / "lists").mkdir()
    rows = [(f"../{file.relative_to(root)}", file.parent.name) for file in files]
    pd.DataFrame(rows, columns=["path", "label"]).to_parquet(root / "lists" / "my.parquet")
    return root / "lists" / "my.parquet"


FOUND = {
    deeper: "Using the images in {root}/dataset, where the class folders are.",
    at_two_depths: None,
    zipped: "Using the images in {root}/packed.zip/icons/deep, where the class folders are.",
    split_deeper: "Using the images in {root}/set, where the class folders are.",
    only_train: "Using the images in {root}/train, where the class folders are.",
    linked: None,
    csv_beside: "Using the images and labels that {root}/labels.csv lists.",
    parquet: None,
}


@pytest.mark.parametrize("make", FOUND, ids=lambda make: make.__name__)
def test_images_are_found_as_people_have_them_and_a_study_finds_them_again(tmp_path, config, make):
    images = find_images(make(tmp_path) or tmp_path)
    said = FOUND[make]
    assert images.taken == (None if said is None else said.format(root=tmp_path))
    seen = inspect_images(images, least=1)
    assert seen.class_names == ("hund mit hut", "кот")
    of_test = 2 if make is split_deeper else 0
    assert images.left_out == {}
    assert len(seen.names) == 12  # of split_deeper the 2 test images are copies of 2 that train, which are left out
    assert len(seen.left_out) == of_test + len(images.left_out)
    file = tmp_path / "images.json"
    file.write_text(json.dumps(images_file(seen, seed=None)))
    settings = config(images.dataset, images.path, images_file=str(file), test_images=None if of_test else 2)
    index = open_index(settings)
    assert list(index.names) == list(seen.names)
    assert dict(index.left_out) == dict(seen.left_out)
    data = load_data(settings, 0)
    assert (len(data.test), len(data.train), data.left_out) == (2, 8, index.left_out)


@pytest.mark.parametrize("classes", [("cat", "dog"), ("cat",)])
def test_a_table_beside_class_folders_has_to_list_all_of_their_images(tmp_path, classes):
    fill(tmp_path, classes=classes)
    fill(tmp_path / "loose", 2, ("later",))
    for file in (tmp_path / "loose" / "later").iterdir():
        file.rename(tmp_path / file.name.lower())
    shutil.rmtree(tmp_path / "loose")
    table = tmp_path / "labels.csv"
    rows = [f"{name}/bild {i}.{'PNG' if i % 2 else 'png'},{name}" for name in classes for i in range(6)]
    rows += ["bild 0.png,dog"]
    table.write_text("path,label\n" + "\n".join(rows[1:]))
    with pytest.raises(UserError, match=r"doesn't list 1 of the images in folders .* cat/bild 0.png") as refused:
        find_images(tmp_path)
    assert refused.value.file == str(table)
    assert len(find_images(table).classes) == len(rows) - 1
    table.write_text("path,label\n" + "\n".join(rows))
    found = find_images(tmp_path)
    assert (found.path, len(found.classes)) == (table, len(rows))
    if len(classes) > 1:  # a study has said that it means the folders
        config = DataConfig(dataset="image-folder", path=str(tmp_path), image_size=14, validation_images=0)
        (tmp_path / "bild 0.png").unlink()
        (tmp_path / "bild 1.png").unlink()
        assert len(open_index(config).labels) == 12
        table.write_text("path,label\nelsewhere.png,cat\n")
        assert find_images(tmp_path).path == tmp_path


def flat(root):
    fill(root / "all")
    for file in sorted((root / "all").rglob("*.*")):
        os.rename(file, root / f"{file.parent.name} {file.name}")
    shutil.rmtree(root / "all")


def flat_splits(root):
    fill(root, classes=("train", "test"))


def two_splits(root):
    fill(root, classes=("test/кот", "val/кот"))


def half(root):
    fill(root, 4)
    for file in [*root.rglob("bild 0.png"), *root.rglob("bild 1.PNG"), *(root / "кот").glob("bild 2.png")]:
        file.write_bytes(b"no image")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (flat, r"holds 12 images and no class folders; make one folder for each class, .* or list them in images\.csv"),
        (two_splits, r"holds 12 images and no class folders; make one"),
        (flat_splits, "holds 12 images and no class folders"),
        (lambda root: None, r"holds no image \(\.png "),
        (half, r"5 of 8 images can't be used; repair or replace them, or choose another folder$"),
    ],
)
def test_what_can_not_be_meant_is_one_line_with_a_hint(tmp_path, make, said):
    with pytest.raises(UserError, match=said) as caught:
        inspect_images(make(tmp_path) or tmp_path, least=1)
    assert caught.value.details.count("is not an image of a known format") == (5 if make is half else 0)


# --- what stays together ----------------------------------------------------------------------------------------------


def clips(root, pattern="{}/clip{}_{:02}.png"):
    """Write 6 clips of 5 frames of two classes, frames that differ by noise which no copy has."""
    rng = np.random.default_rng(0)
    rows = []
    for clip in range(12):
        for frame in range(5):
            noise = rng.normal(0, 12, (48, 48, 3))
            name = pattern.format("ab"[clip % 2], clip, frame)
            save(root / name, np.clip(textured(clip) + noise, 0, 255).astype(np.uint8))
            rows.append((name, "ab"[clip % 2], f"clip {clip}"))
    pd.DataFrame(rows, columns=["filename", "Class", "clip"]).to_csv(root / "all.tsv", sep="\t", index=False)
    return root


@pytest.mark.parametrize(
    ("group", "place", "pattern"),
    [("(.+)_", "", "{}/clip{}_{:02}.png"), ("folder", "", "{}/{}/{:02}.png"), ("clip", "all.tsv", "{}/{} {}.png")],
)
def test_a_group_is_on_one_side_of_every_split(tmp_path, config, group, place, pattern):
    root = clips(tmp_path, pattern)
    seen = inspect_images(find_images(root / place, group=group), least=1)
    assert "12 groups; each is on one side of every split" in seen.lines()
    file = tmp_path / "images.json"
    file.write_text(json.dumps(images_file(seen)))
    settings = config(seen.images.dataset, root / place, images_file=str(file), validation_images=0, folds=5)
    index = open_index(settings)
    clip = index.labels + 2 * (np.arange(60) // 10 if place else np.arange(60) % 30 // 5)
    tested = index.official_test
    assert set(index.labels[tested]) == {0, 1}
    for rows in (np.flatnonzero(tested), *make_splits(index, settings, 0).parts[::2]):
        assert np.unique(clip[rows], return_counts=True)[1].tolist() == [5] * (len(rows) // 5)


@pytest.mark.parametrize(
    ("group", "said"),
    [("folder", r": class 'a' has 1 group that"), (".+_", "--group: '.+_' is no"), ("(", "is not a col")],
)
def test_a_group_that_can_not_be_meant(tmp_path, group, said):
    with pytest.raises(UserError, match=said):
        inspect_images(find_images(clips(tmp_path), group=group), least=1)


# --- what is left out -------------------------------------------------------------------------------------------------


def test_all_that_is_left_out_is_listed_at_once_and_strict_refuses_it(tmp_path):
    root = fill(tmp_path / "images")
    whole = (root / "кот" / "bild 0.png").read_bytes()
    for name, content in {
        "кот/cut.png": whole[:80],
        "кот/cut.jpg": encoded(Image.fromarray(textured(500)), "JPEG")[:-300],
        "кот/text.jpg": b"no image",
        "hund mit hut/zero.webp": b"",
        "hund mit hut/notes.txt": b"x",
        "beside.png": whole,
    }.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    save(root / "hund mit hut" / "float.tiff", np.zeros((20, 20), np.float32))
    (root / "кот" / "gone.png").symlink_to("nowhere")
    os.mkfifo(root / "кот" / "pipe.png")
    seen = inspect_images(root, least=1)
    assert {name: re.split(r" \(|, of which", why)[0] for name, why in seen.left_out.items()} == {
        "кот/cut.png": "is not a readable image",
        "кот/cut.jpg": "is not a readable image",
        "кот/text.jpg": "is not an image of a known format",
        "кот/gone.png": "can't be read",
        "кот/pipe.png": "can't be read",
        "hund mit hut/zero.webp": "is empty",
        "hund mit hut/notes.txt": "is not an image file",
        "hund mit hut/float.tiff": "has pixels of mode F",
        "beside.png": "is in no class folder",
    }
    assert any(line.startswith("9 files are left out: ") for line in seen.lines())
    with pytest.raises(UserError, match=r"--strict: 9 files are unusable") as caught:
        inspect_images(root, least=1, strict=True)
    assert caught.value.details.splitlines() == [f"  {name}: {why}" for name, why in sorted(seen.left_out.items())]
    for i in range(40):
        (root / "кот" / f"{i}.txt").write_text("x")
    assert "  кот/ (40 files): is not an image file" in listed(inspect_images(root, least=1).left_out)
    for i in range(40):
        save(root / f"class {i}" / "whole.png", textured(1000 + i))
        (root / f"class {i}" / "text.txt").write_text("x")
    assert listed(inspect_images(root, least=1).left_out)[-1] == "  and 20 more"


def test_links_to_what_is_there_are_told_by_train_and_by_a_study(tmp_path, config):
    root = fill(tmp_path / "images")
    (root / "кот" / "deeper").mkdir()  # says nothing of a class
    (root / "кот" / "all").symlink_to(root / "hund mit hut")
    (root / "katze").symlink_to("кот")
    said = {
        "katze/": "leads to the images of кот/, which are used there",
        "кот/all/": "leads to the images of hund mit hut/, which are used there",
    }
    seen = inspect_images(root, least=1)
    assert (len(seen.names), seen.class_names, seen.left_out) == (12, ("hund mit hut", "кот"), said)
    assert any(line.startswith("2 items are left out: ") for line in seen.lines())
    with pytest.raises(UserError, match=r"--strict: 2 items are unusable"):
        inspect_images(root, least=1, strict=True)
    data = load_data(config("image-folder", root, test_images=2), 0)
    assert [text for text in data.warnings if "/ " in text] == [f"Images: {name} {why}" for name, why in said.items()]


def test_below_a_folder_of_class_folders_links_lead_to_where_they_did(tmp_path):
    root = fill(tmp_path / "images" / "train")
    (tmp_path / "images" / "extra").mkdir()
    save(tmp_path / "images" / "extra" / "x.png", textured(99))
    (root / "кот" / "more").symlink_to("../../extra")
    (root / "readme.avif").touch()  # beside class folders, where it was never told of
    seen = inspect_images(tmp_path / "images", least=1)
    assert len(seen.names) == 12
    assert seen.left_out.keys() == {"../extra/", "кот/more/"}


def test_of_an_animation_the_first_frame_is_taken_and_told(tmp_path):
    root = fill(tmp_path / "images")
    frames = [Image.fromarray(textured(900 + i)) for i in range(3)]
    save(root / "кот" / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    save(root / "кот" / "still.gif", frames[1])
    save(root / "кот" / "portrait.jfif", frames[2], format="JPEG")
    seen = inspect_images(root, least=1)
    assert "1 image is animated, such as кот/a.gif; the first frame is used" in seen.lines()
    shown = decode_image((root / "кот" / "a.gif").read_bytes, "a.gif").convert("RGB")
    assert np.abs(np.asarray(shown).astype(int) - textured(900)).mean() < 12  # of 255; a GIF has 256 colours


@pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
def test_avif_is_read(tmp_path):
    file = save(tmp_path / "a.avif", PLAIN)
    assert np.abs(np.asarray(decode_image(file.read_bytes, "a.avif")).astype(int) - PLAIN).max() < 8


def test_heic_is_read_with_its_extra(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.fromarray(PLAIN)).save(tmp_path / "a.heic")
    image = decode_image((tmp_path / "a.heic").read_bytes, "a.heic").convert("RGB")
    assert np.abs(np.asarray(image).astype(int) - PLAIN).max() < 8


def test_heic_without_its_extra_is_left_out_with_the_command_that_helps(tmp_path, monkeypatch):
    def require_missing(extra, what, **named):
        raise UserError(f"{what} needs {extra}", **named)

    monkeypatch.setattr(pixels_module, "formats", lambda: ("PNG", "JPEG"))
    monkeypatch.setattr(pixels_module, "require_extra", require_missing)
    root = fill(tmp_path / "images")
    (root / "кот" / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert inspect_images(root, least=1).left_out == {"кот/phone.HEIC": "HEIC needs heic"}


# --- once -------------------------------------------------------------------------------------------------------------


def test_every_image_is_decoded_once_and_its_pixels_are_those_of_a_study(tmp_path, monkeypatch, cache_of_its_own):
    root = fill(tmp_path / "images", images=8)
    (root / "кот" / "a broken one.png").write_bytes(b"no image")
    decoded = []

    def counted(read, file, **named):
        decoded.append(os.path.basename(file))
        return decode_image(read, file, **named)

    monkeypatch.setattr(decoding_module, "decode_image", counted)
    file = tmp_path / "images.json"
    config = DataConfig(
        dataset="image-folder", path=str(root), images_file=str(file), image_size=20, validation_images=4, test_images=4
    )
    progress = []
    with PixelStore([20, 28]) as store:
        seen = inspect_images(root, least=1, store=store, on_progress=lambda *counts: progress.append(counts))
        file.write_text(json.dumps(images_file(seen, seed=None)))
        index = open_index(config)
        store.hand_over(index, make_splits(index, config, 0))
    assert progress == [(i + 1, 17) for i in range(17)]
    assert len(decoded) == len(set(decoded)) * 2 - 1 == 17  # both classes have the same names
    with monkeypatch.context() as patch:
        patch.setattr("peft_vit.data.sources.folders.decode_image", lambda *_: pytest.fail("it was decoded before"))
        kept = {size: load_data(config.model_copy(update={"image_size": size}), 0) for size in (20, 28)}
    shutil.rmtree(cache_of_its_own / "pixels")
    for size, data in kept.items():
        for part in (data.train, data.validation):
            assert np.array_equal(part.pixels, cached_pixels(index, part.positions, size))
    monkeypatch.setattr(decoding_module, "decode_image", lambda *_, **__: pytest.fail("it was inspected before"))
    with PixelStore([20]) as store:
        again = inspect_images(root, least=1, store=store)
        store.hand_over(index, make_splits(index, config, 0))  # nothing to hand over
    assert (again.names, again.left_out) == (seen.names, seen.left_out)
    assert np.array_equal(again.groups, seen.groups)
    monkeypatch.setattr(decoding_module, "decode_image", decode_image)
    for file in (cache_of_its_own / "inspected").iterdir():
        file.write_text('{"copies": [], "groups": []}')
    assert inspect_images(root, least=1).names == seen.names


def test_a_changed_image_is_seen_though_its_time_and_size_are_the_old_ones(tmp_path, config):
    root = fill(tmp_path / "images")
    settings = config("image-folder", root, test_images=2)
    before = open_index(settings).sha256
    assert open_index(settings).sha256 == before
    changed, other = root / "кот" / "bild 0.png", tmp_path / "new"
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    status = changed.stat()
    other.write_bytes(content)
    for replace in (lambda: os.replace(other, changed), lambda: changed.write_bytes(bytes(reversed(content)))):
        replace()  # as `rsync -t` does, and as `cp -p`
        os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert changed.stat().st_mtime_ns == status.st_mtime_ns
        before, after = open_index(settings).sha256, before
        assert after != before
