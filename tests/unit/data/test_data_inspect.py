"""The inspection of a folder: what is counted, left out, grouped, held out and refused, and the file that says so."""

import errno
import hashlib
import json
import os
import shlex
import shutil
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from golden import check_golden
from PIL import Image
from written_images import save, textured, zip_of

from peft_vit.base.errors import UserError
from peft_vit.base.files import read_bytes
from peft_vit.core.config import DataConfig
from peft_vit.core.tasks.classification import ACCURACY, BALANCED_ACCURACY
from peft_vit.data import files as files_module
from peft_vit.data import find_images, images_file, index_inspected, inspect_images, load_data, make_splits, open_index
from peft_vit.data import pixels as pixels_module
from peft_vit.data.index import ImagesFile
from peft_vit.data.inspection import decoding as decoding_module
from peft_vit.data.pixels import cached_pixels, decode_image


def fill(folder, images, first=0):
    for i in range(images):
        save(folder / f"{i:02}.png", textured(first + i))


@pytest.fixture
def root(tmp_path):
    """Write 12 cats, of which one is a second file with the same pixels, one saved again, and 11 dogs."""
    root = tmp_path / "images"
    fill(root / "cat", 10)
    fill(root / "dog", 11, 100)
    save(root / "cat" / "copy of 03.bmp", textured(3))
    save(root / "cat" / "saved again.jpg", Image.fromarray(textured(5)).resize((96, 96)), quality=90)
    return root


def write(tmp_path, seen, **settings):
    file = tmp_path / "images.json"
    file.write_text(json.dumps(images_file(seen, **settings)))
    return file


def config(root, file=None, **settings):
    defaults = {"dataset": "image-folder", "image_size": 14, "validation_images": 2}
    return DataConfig(path=str(root), images_file=None if file is None else str(file), **(defaults | settings))


def groups_of(seen):
    members = {}
    for name, group in zip(seen.names, seen.groups.tolist(), strict=True):
        members.setdefault(group, set()).add(name)
    return sorted(sorted(names) for names in members.values() if len(names) > 1)


def test_what_is_there_is_counted_and_told(root):
    progress = []
    seen = inspect_images(root, on_progress=lambda done, total: progress.append((done, total)))
    assert progress == [(i + 1, 23) for i in range(23)]
    assert seen.class_names == ("cat", "dog")
    assert np.bincount(seen.labels).tolist() == [12, 11]
    assert (seen.left_out, seen.holdout, seen.metric) == ({}, None, ACCURACY)
    assert groups_of(seen) == [["cat/03.png", "cat/copy of 03.bmp"], ["cat/05.png", "cat/saved again.jpg"]]
    assert seen.sides[seen.names.index("cat/saved again.jpg")].tolist() == [96, 96]
    save(root / "dog" / "brighter.png", textured(7) + np.uint8(20))
    for i in range(20):
        save(root / "cat" / f"more{i}.png", textured(1000 + i))
        (root / "dog" / f"{i}.txt").write_text("no image")
    more = inspect_images(root)
    assert more.metric is ACCURACY  # below three times as many
    save(root / "cat" / "one more.png", textured(2000))
    for i in range(13):
        fill(root / f"class {i}", 10, 4000 + 10 * i)
    many = inspect_images(root)
    assert many.metric is BALANCED_ACCURACY
    parts = (seen.lines(), more.lines(), many.lines())
    check_golden("data/inspection.txt", "\n\n".join("\n".join(lines) for lines in parts) + "\n")


def test_sides_do_not_depend_on_how_little_of_a_jpeg_is_decoded(root):
    save(root / "dog" / "large.jpg", Image.fromarray(textured(7, side=1200)[:, :900]), quality=95)
    seen = inspect_images(root)
    assert seen.sides[seen.names.index("dog/large.jpg")].tolist() == [900, 1200]


def test_an_image_under_two_classes_is_left_out_of_everything(root):
    save(root / "dog" / "cat after all.png", textured(7))
    save(root / "cat" / "one more.png", textured(99))
    seen = inspect_images(root)
    assert seen.left_out == {
        "cat/07.png": "equal to dog/cat after all.png, of another class",
        "dog/cat after all.png": "equal to cat/07.png, of another class",
    }
    assert not {"cat/07.png", "dog/cat after all.png"} & set(seen.names)


def test_the_own_test_split_is_the_holdout_and_what_training_copies_of_it_is_left_out(root, tmp_path):
    own = tmp_path / "own"
    (own / "train").mkdir(parents=True)
    for label in ("cat", "dog"):
        os.rename(root / label, own / "train" / label)
        for i in range(3):
            save(own / "test" / label / f"t{i}.png", textured(500 + i + 10 * (label == "dog")))
    save(own / "train" / "cat" / "tested.png", textured(500))
    save(own / "train" / "cat" / "tested brighter.png", textured(501) + np.uint8(10))
    seen = inspect_images(own)
    assert seen.left_out == {
        "train/cat/tested.png": "a copy of test/cat/t0.png, of the test split",
        "train/cat/tested brighter.png": "a copy of test/cat/t1.png, of the test split",
    }
    tested = [f"test/{label}/t{i}.png" for label in ("cat", "dog") for i in range(3)]
    assert sorted(np.array(seen.names)[seen.holdout]) == tested
    assert any("6 of them are the folder's own test split" in line for line in seen.lines())
    index = open_index(config(own, write(tmp_path, seen)))
    assert np.array_equal(index.official_test, [name.startswith("test/") for name in index.names])
    splits = make_splits(index, config(own, folds=5), 3)
    assert not index.official_test[np.concatenate([splits.train, splits.validation, splits.test])].any()


@pytest.mark.parametrize(
    ("added", "test_images", "more"),
    [({}, None, 0), ({"cat": 20}, None, 4), ({"elk": 10}, None, 2), ({"cat": 4, "dog": 4}, 8, 4)],
)
def test_what_tested_tests_again_where_images_are_added(root, added, test_images, more) -> None:
    earlier = ImagesFile.model_validate_json(json.dumps(images_file(inspect_images(root))))
    first = (root / earlier.sealed[0]).rename((root / earlier.sealed[0]).with_stem("0"))  # known by its content
    for name, count in added.items():
        (root / name).mkdir(exist_ok=True)
        for i in range(count):
            save(root / name / f"new {i}.png", textured(5000 + len(name) * 100 + i + (name == "dog") * 50))
    sealed = images_file(inspect_images(root), 0, test_images, earlier)["sealed"]
    kept = {str(first.relative_to(root)), *earlier.sealed[1:]}
    assert kept <= set(sealed)
    assert len(set(sealed) - kept) == more
    assert all("new" in name for name in set(sealed) - kept)


@pytest.mark.parametrize("own_split", [False, True])
def test_what_trained_an_earlier_model_never_tests_the_one_that_starts_from_it(root, own_split) -> None:
    first = inspect_images(root)
    earlier = ImagesFile.model_validate_json(json.dumps(images_file(first)))
    trained = [name for name in earlier.digests if name not in earlier.sealed and name.startswith("cat/")]
    place = root
    if own_split:  # where trained images have come into the test
        place = root / "own"
        for name in ("cat", "dog"):
            (place / "train").mkdir(parents=True, exist_ok=True)
            os.rename(root / name, place / "train" / name)
            save(place / "test" / name / "new.png", textured(700 + len(name) + (name == "dog")))
        os.rename(place / "train" / trained[0], place / "test" / "cat" / "trained.png")
    else:
        for i in range(8):  # copies of trained images by the dozen, in front of them; three new ones
            save(root / "cat" / f"0{i}.bmp", Image.open(root / trained[i % len(trained)]))
        for i in range(3):
            save(root / "dog" / f"new {i}.png", textured(900 + i))
    seen = inspect_images(place)
    content = images_file(seen, None if own_split else 0, None, earlier, starts=True)
    tested, groups = set(content["sealed"]), dict(zip(seen.names, seen.groups.tolist(), strict=True))
    if own_split:
        assert tested == {"test/cat/new.png", "test/dog/new.png"}
        assert "has trained the earlier model" in content["left_out"]["test/cat/trained.png"]
        middle = ImagesFile.model_validate_json(json.dumps(content))  # where it is left out
        again = images_file(seen, None, None, middle, starts=True)
        assert again["sealed"] == content["sealed"]
        assert set(earlier.learned_from) <= set(again["trained"])
    else:
        assert set(earlier.sealed) <= tested
        assert {name for name in tested - set(earlier.sealed) if "new" not in name} == set()
        assert not {groups[name] for name in trained} & {groups[name] for name in tested}


def test_unsure_images_are_no_fault_and_what_came_later_in_the_file_makes_no_other_images(root) -> None:
    first, *others = (path.relative_to(root).as_posix() for path in sorted(root.glob("*/*.png")))
    rows = [f"{name},{name.partition('/')[0]},{'train' if i % 3 else 'unsure'}" for i, name in enumerate(others)]
    (root / "labels.csv").write_text("path,label,split\n" + "\n".join([f"{first},,unsure", *rows]))
    inspection = inspect_images(find_images(root / "labels.csv"), least=3, strict=True)
    assert {inspection.left_out[name] for name in inspection.left_out} == {"is marked unsure"}
    content = ImagesFile.model_validate_json(json.dumps(images_file(inspection, test_images=6)))
    older = content.model_copy(update={"digests": {}, "asked": ("elsewhere", 0, 9), "trained": ("0",)})
    hashed = [index_inspected(inspection.images, own, root).sha256 for own in (content, older)]
    assert hashed[0] == hashed[1]
    (root / "labels.csv").write_text("path,label,split\n" + "\n".join(rows * 2))  # said twice
    assert inspect_images(find_images(root / "labels.csv"), least=3).names == inspection.names
    (root / "labels.csv").write_text("path,weight,who\n" + "\n".join(f"{name},{i},7" for i, name in enumerate(others)))
    with pytest.raises(UserError, match="only beside a column label"):
        find_images(root / "labels.csv", group="who")


def test_a_class_that_has_only_trained_has_to_get_images_that_can_test(root) -> None:
    earlier = ImagesFile.model_validate_json(json.dumps(images_file(inspect_images(root))))
    for name in (*earlier.sealed, *earlier.left_out):
        if name.startswith("cat/"):
            (root / name).unlink()
    with pytest.raises(UserError, match="no image of class 'cat' is left to test: the others have trained"):
        images_file(inspect_images(root, least=2), 0, None, earlier, starts=True)


def test_a_share_is_held_out_class_by_class_and_copies_of_it_are_left_out(root, tmp_path):
    seen = inspect_images(root)
    held_out_somewhere, hashes = set(), {open_index(config(root, test_images=4)).sha256}
    for seed in range(8):
        content = images_file(seen, seed)
        assert content == images_file(seen, seed)
        holdout = content["sealed"]
        assert [sum(name.startswith(label) for name in holdout) for label in ("cat", "dog")] == [2, 2]
        copies = {name for name, why in content["left_out"].items() if ", a test image" in why}
        together = [{"cat/03.png", "cat/copy of 03.bmp"}, {"cat/05.png", "cat/saved again.jpg"}]
        assert copies == {other for pair in together for drawn in pair & set(holdout) for other in pair - {drawn}}
        held_out_somewhere |= set(holdout)
        file = write(tmp_path, seen, seed=seed)
        index = open_index(config(root, file))
        names = np.array(index.names)
        assert sorted(names[index.official_test]) == sorted(holdout)
        hashes.add(index.sha256)
        for s in range(5):
            splits = make_splits(index, config(root, file, folds=5), s)
            for pair in together:
                sides = [set(names[rows]) & pair for rows in (splits.train, splits.validation, splits.test)]
                assert sum(map(bool, sides)) <= 1
    assert len(held_out_somewhere) > 8
    assert len(hashes) == 9
    data = load_data(config(root, file), 0)
    assert (len(data.test), len(data.validation), data.warnings) == (4, 2, ())


def test_other_images_than_those_that_were_inspected_are_refused(root, tmp_path):
    file = write(tmp_path, inspect_images(root))
    before = open_index(config(root, file)).sha256
    (root / "cat" / "00.png").rename(root / "00.png")
    with pytest.raises(UserError, match=r"other images than when .*\.json was written; put those back, or inspect"):
        open_index(config(root, file))
    (root / "00.png").rename(root / "cat" / "00.png")
    save(root / "cat" / "new.png", textured(900))
    assert open_index(config(root, file)).sha256 == before
    (root / "cat" / "new.png").unlink()
    for name in ("README", "notes.txt", ".DS_Store", "Thumbs.db", "cat/notes.txt", "cat/Thumbs.db", "cat/.DS_Store"):
        (root / name).write_text("no image")
    assert open_index(config(root, file)).sha256 == before
    (root / "cat" / "broken.png").write_text("no image")
    again = write(tmp_path, inspect_images(root))
    assert json.loads(again.read_text())["left_out"].keys() > {"cat/broken.png", "cat/notes.txt"}
    assert open_index(config(root, again)).sha256 == before
    (root / "cat" / "broken.png").unlink()
    content = json.loads(file.read_text())
    for changed, said in (
        (content | {"copies": [["cat/03.png", "cat/nowhere.png"]]}, "names an image that is not used"),
        (content | {"sealed": "all"}, "sealed"),
        ({}, "inspect the images again"),
    ):
        file.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=said):
            open_index(config(root, file))
    with pytest.raises(UserError, match=r"nowhere\.json: data\.images_file: can't be read"):
        open_index(config(root, tmp_path / "nowhere.json"))


@pytest.mark.parametrize("table", [False, True])
def test_where_labels_alone_were_corrected_those_of_then_count(root, tmp_path, table) -> None:
    place, dataset = root, "image-folder"
    if table:
        place, dataset = root / "all.csv", "csv"
        names = sorted(f"{file.parent.name}/{file.name}" for file in root.glob("*/[0-9]*.png"))
        place.write_text("path,label\n" + "".join(f"{name},{name[:3]}\n" for name in names))
    file = write(tmp_path, inspect_images(place))

    def opened():
        return open_index(config(place, file).model_copy(update={"dataset": dataset}))

    then = opened()
    pixels = [then.read(i).tobytes() for i in range(len(then.names))]
    name = next(name for name in then.names if name.startswith("cat/0"))
    if table:
        place.write_text(place.read_text().replace(f"{name},cat", f"{name},dog"))
    else:
        (root / name).rename(root / "dog" / "corrected.png")
    now = opened()
    assert (now.names, now.sha256, now.digests) == ([*then.names], then.sha256, [*then.digests])
    assert np.array_equal(now.labels, then.labels)
    assert np.array_equal(now.official_test, then.official_test)
    assert [now.read(i).tobytes() for i in range(len(now.names))] == pixels
    assert (len(then.notes), len(now.notes)) == (0, 1)
    save(root / "dog" / "01.png", textured(901))
    with pytest.raises(UserError, match="holds other images than when"):
        opened()


def test_a_zip_s_hash_says_which_of_its_images_are_used(root, tmp_path, monkeypatch, own_cache):
    """A reader that is installed later brings an image back, and all that come after it move by one."""
    path = zip_of(root)
    seen, plain = inspect_images(path), inspect_images(root)
    assert seen.names == plain.names
    assert np.array_equal(seen.groups, plain.groups)
    whole = open_index(config(path, write(tmp_path, seen, seed=None)))

    def without_one(read, file, **named):
        if file == "dog/00.png":
            raise UserError("is not an image of a known format", file=file)
        return decode_image(read, file, **named)

    monkeypatch.setattr(decoding_module, "decode_image", without_one)
    shutil.rmtree(own_cache / "inspected")
    less = write(tmp_path, inspect_images(path), seed=None)
    index = open_index(config(path, less))
    assert [*index.names] == [name for name in whole.names if name != "dog/00.png"]
    assert index.sha256 != whole.sha256
    rows = np.array([index.names.index("dog/01.png")])
    assert np.array_equal(cached_pixels(whole, rows + 1, 14), cached_pixels(index, rows, 14))
    assert not np.array_equal(cached_pixels(whole, rows, 14), cached_pixels(index, rows, 14))


def test_pixels_of_another_version_of_the_decoder_are_not_taken(root, monkeypatch, own_cache):
    index, rows = open_index(config(root)), np.arange(2)
    for version in ("1.0", "1.0", "1.1"):
        monkeypatch.setattr(pixels_module, "missing_packages", lambda _: [])
        monkeypatch.setattr(pixels_module.metadata, "version", lambda _, version=version: version)
        cached_pixels(index, rows, 14)
    assert len(list((own_cache / "pixels").iterdir())) == 2


def test_a_zip_s_hash_is_the_file_s_as_long_as_all_of_its_images_are_used(root, tmp_path):
    (root / "notes.txt").write_text("no image")
    path = zip_of(root)
    written = json.loads(write(tmp_path, inspect_images(path), seed=None).read_text())
    assert written["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("fault", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
@pytest.mark.parametrize("at", ["read", "decode"])
def test_what_fails_for_now_leaves_no_image_out_for_ever(root, monkeypatch, own_cache, fault, at):
    def no_more(*_, **__):
        raise fault

    def fails(read, file, **named):
        return decode_image(no_more if file == "cat/00.png" else read, file, **named)

    with monkeypatch.context() as patch:
        if at == "decode":
            patch.setattr(decoding_module, "decode_image", fails)
        else:
            patch.setattr(files_module, "read_bytes", no_more)
        with pytest.raises(UserError, match=r"00\.png: can't be read now \((Too many open|not enough memory).*call"):
            inspect_images(root)
    assert inspect_images(root).left_out == {}


def fox(count, *others):
    def add(root):
        for i, seed in enumerate((*range(300, 300 + count), *others)):
            save(root / "fox" / f"{i}.png", textured(seed))

    return add


def split(root):
    """Make the folder's classes those of train/, and give test/ a third one."""
    for label in ("cat", "dog"):
        (root / "train").mkdir(exist_ok=True)
        os.rename(root / label, root / "train" / label)
        save(root / "test" / label / "a.png", textured(700 + len(label)))


def elks(root):
    for i in range(12):
        (root / "elk").mkdir(exist_ok=True)
        (root / "elk" / f"{i}.png").write_bytes(b"no image")


@pytest.mark.parametrize(
    ("spoil", "decodes", "message"),
    [
        (shutil.rmtree, False, "does not exist"),
        (lambda root: shutil.rmtree(root / "dog"), False, "holds 12 images and one class alone, 'cat'"),
        (lambda root: split(root) or fox(1)(root / "test"), False, "class 'fox' is in test and not in train"),
        (
            fox(2),
            False,
            "class 'fox' has 2 different images .* each class needs 10.* or take peft-vit train, which needs 2",
        ),
        (fox(1), False, "and each class needs 10; add images, or remove the class$"),
        (fox(9, 300), True, r"has 9 different images that can be used \(of copies, .*\), and each class needs 10"),
        (elks, True, "class 'elk' has 0 different images that can be used, and each class needs 10"),
    ],
)
def test_refused_in_one_line(root, monkeypatch, spoil, decodes, message):
    spoil(root)
    if not decodes:
        monkeypatch.setattr(decoding_module, "decode_image", lambda *_, **__: pytest.fail("nothing else is done"))
    with pytest.raises(UserError, match=message):
        inspect_images(root)


def test_an_own_test_split_says_nothing_about_what_decides(tmp_path):
    root = tmp_path / "split"
    for number, (place, count) in enumerate((("train/cat", 10), ("train/dog", 10), ("test/cat", 2), ("test/dog", 60))):
        fill(root / place, count, 100 * number)
    seen = inspect_images(root)
    assert seen.metric is ACCURACY
    assert seen.chosen_counts.tolist() == [10, 10]
    assert np.bincount(seen.labels).tolist() == [12, 70]
    assert "metric: accuracy, since no class has more than 3 times as many images" in "\n".join(seen.lines())


def test_a_class_that_loses_its_last_validation_image_is_still_a_class(tmp_path):
    root = tmp_path / "split"
    for place, count in (("train", 10), ("val", 1), ("test", 2)):
        fill(root / place / "cat", count, 1000 * len(place))
        fill(root / place / "dog", count, 1000 * len(place) + 100)
    (root / "val" / "dog" / "00.png").write_bytes(b"no image")
    seen = inspect_images(root)
    assert list(seen.left_out) == ["val/dog/00.png"]
    index = open_index(config(root, write(tmp_path, seen), validation_images=4))
    assert (len(index.labels), int(index.official_test.sum())) == (25, 4)


# --- neighbours by name ---


def clips(root, place, step=4):
    """Write three clips of eight frames for each of two classes: windows that move over a smooth picture."""
    for clip in range(6):
        noise = np.random.default_rng(clip).integers(0, 256, (10, 10, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(noise).resize((160, 160), Image.Resampling.BICUBIC))
        for frame in range(8):
            at = 8 + step * frame
            save(root / f"class{clip // 3}" / place.format(clip=clip, frame=frame), picture[at : at + 64, 20:84])
    return root


@pytest.mark.parametrize(
    ("place", "group"),
    [
        ("clip{clip:02}_{frame:04}.png", "'(.+)_[0-9]+'"),
        ("clip{clip}b - {frame}.png", r"'(.+)\ \-\ [0-9]+'"),
        ("clip{clip}b{frame}.png", "'(.+?)[0-9]+[.]'"),
        ("clip{clip}/{frame}.png", "folder"),
    ],
)
def test_frames_that_neighbour_by_name_and_look_alike_are_told_with_what_keeps_them_together(tmp_path, place, group):
    root = clips(tmp_path / "images", place)
    (line,) = (line for line in inspect_images(root).lines() if "neighbours by name" in line)
    assert line.endswith(f"--group {group}")
    (pattern,) = shlex.split(group)
    seen = inspect_images(find_images(root, group=pattern))
    assert len(np.unique(seen.together)) == 6
    assert not [line for line in seen.lines() if "neighbours by name" in line]


def test_no_pattern_is_named_that_leaves_a_class_too_few_groups_beside_the_test_split(tmp_path):
    root = clips(tmp_path, "clip{clip}_{frame}.png", step=8)
    rows = [
        f"class{clip // 3}/clip{clip}_{frame}.png,{clip // 3},{'test' if clip % 3 == 2 or frame % 2 else 'train'}\n"
        for clip in range(6)
        for frame in range(8)
    ]
    table = tmp_path / "images.csv"
    table.write_text("path,label,split\n" + "".join(rows))
    (line,) = (line for line in inspect_images(root, least=2).lines() if "neighbours by name" in line)
    assert "--group COLUMN" in line
    with pytest.raises(UserError, match="groups that can be used beside the test split, and each class needs 3"):
        inspect_images(find_images(table, group="(.+)_[0-9]+"), least=0)


def test_neighbours_are_told_only_where_they_are_on_two_sides_look_alike_and_are_many(tmp_path):
    def told(root):
        return [line for line in inspect_images(root, least=2).lines() if "neighbours by name" in line]

    frames = clips(tmp_path / "frames", "frame{clip}{frame}.png")
    assert "COLUMN" in told(frames)[0]  # of one name, which would keep each class together as a whole
    assert not told(clips(tmp_path / "far", "clip{clip}_{frame}.png", step=12))
    assert not told(clips(tmp_path / "near", "clip{clip}_{frame}.png", step=1))  # copies, which stay together anyway
    for side in ("train", "test"):
        clips(tmp_path / "split" / side, f"{side}{{clip}}_{{frame}}.png", step=3 + (side == "test"))
    assert not told(tmp_path / "split")
    for number in range(40):
        save(tmp_path / "others" / f"class{number % 2}" / f"img_{number:03}.png", textured(number))
    assert not told(tmp_path / "others")


# --- many images ------------------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """Compare about 8 images at most, and list what is decoded."""
    names = []

    def counted(read, file, **named):
        names.append(file)
        return decode_image(read, file, **named)

    monkeypatch.setattr(decoding_module, "_MOST_COMPARED", 8)
    monkeypatch.setattr(decoding_module, "_NEIGHBOURING", 2)
    monkeypatch.setattr(decoding_module, "decode_image", counted)
    return names


def test_of_many_images_some_are_decoded_and_equal_files_are_found_among_all(root, tmp_path, decoded, monkeypatch):
    (root / "cat" / "copy of 03.bmp").unlink()
    shutil.copy(root / "dog" / "10.png", root / "dog" / "11.png")
    content = (root / "cat" / "saved again.jpg").read_bytes()
    (root / "cat" / "cut off.jpg").write_bytes(content[:-20])
    seen = inspect_images(root)
    chosen = decoding_module.compared_rows(24)
    assert decoded.count("cat/cut off.jpg") == 1
    assert len(decoded) <= 1 + chosen.sum()
    assert 4 <= chosen.sum() == seen.compared <= 8
    assert list(seen.left_out) == ["cat/cut off.jpg"]
    assert ["dog/10.png", "dog/11.png"] in groups_of(seen)
    assert sorted(seen.sides[:, 0]) == [*[48] * 22, 96]
    assert len(seen.names) == 23

    def none_but_the_cache(place, *args):
        assert "cache" in str(place)
        return read_bytes(place, *args)

    for module, name in (
        (decoding_module, "decode_image"),
        (decoding_module, "read_bytes"),
        (files_module, "sha256_of"),
    ):
        monkeypatch.setattr(module, name, none_but_the_cache)
    again = inspect_images(root)
    assert (again.names, again.compared) == (seen.names, seen.compared)
    assert np.array_equal(again.groups, seen.groups)


def test_of_images_that_were_not_compared_a_run_compares_its_own(root, tmp_path, decoded, monkeypatch):
    for i in range(4):
        save(root / "dog" / f"again {i}.jpg", textured(100 + i), quality=95)
    monkeypatch.setattr(decoding_module, "_MOST_COMPARED", 2)
    seen = inspect_images(root)
    file = write(tmp_path, seen, test_images=8)
    assert json.loads(file.read_text())["compared"] == seen.compared < 3
    data = load_data(config(root, file, image_size=32), 0)
    assert [line for line in data.warnings if "nearly equal one of another split" in line]
    assert "compared" not in json.loads(write(tmp_path, replace(seen, compared=None)).read_text())


def test_only_a_file_that_is_new_is_opened_again(root, monkeypatch):
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*.*"))
    tree, opened, real = find_images(root).tree, [], files_module.sha256_of
    monkeypatch.setattr(files_module, "sha256_of", lambda path: opened.append(path.name) or real(path))
    before = tree.hashed(names).each
    assert len(opened) == len(names)
    save(root / "dog" / "new.png", textured(9))
    (root / "cat" / "00.png").write_bytes((root / "cat" / "01.png").read_bytes())
    after = tree.hashed([*names, "dog/new.png"]).each
    assert sorted(opened[len(names) :]) == ["00.png", "new.png"]
    assert after == {**before, "cat/00.png": before["cat/01.png"], "dog/new.png": after["dog/new.png"]}
    tree.hashed(names[::5])  # of both classes, so of the same folder
    assert len(opened) == len(names) + 2


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif"])
def test_a_file_that_ends_as_its_format_does_need_not_be_decoded(tmp_path, ending):
    save(tmp_path / f"a.{ending}", textured(1))
    content = (tmp_path / f"a.{ending}").read_bytes()
    assert pixels_module.read_facts(content).is_complete == (ending != "gif")
    with suppress(OSError):  # of WebP
        assert not pixels_module.read_facts(content[:-30]).is_complete
