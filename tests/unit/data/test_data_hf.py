"""Data sets as the library datasets reads them: columns, splits, labels, copies, and no network."""

import importlib.metadata
import io
import os
import struct
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from written_images import record_of

from peft_vit.base.errors import UserError
from peft_vit.core.config import DATASETS
from peft_vit.data import decode_image, image_warnings, load_data, make_splits, open_index, thumbnails_of
from peft_vit.data.sources import hf as hub_module

datasets = pytest.importorskip("datasets")
CLASSES = ("cat", "dog")
IMAGE, LABEL = datasets.Image(), datasets.ClassLabel(names=list(CLASSES))
UNLABELLED = "split test has no labels and is left out"
THREE = datasets.ClassLabel(names=["cat", "dog", "bird"])


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 6), (value, 2 * value, 255 - value)).save(buffer, format="PNG")
    return buffer.getvalue()


def rows(count, start=0, **columns):
    """Return a table of different images and a column of each kind that is asked for."""
    features = {"image": IMAGE, **{name: feature for name, (feature, _) in columns.items()}}
    content = {"image": [{"bytes": png(start + k), "path": None} for k in range(count)]}
    content |= {name: values for name, (_, values) in columns.items()}
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def labelled(count, start=0):
    return rows(count, start, label=(LABEL, [k % 2 for k in range(count)]))


def parquet(folder, **splits):
    """Write a folder as on the hub."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, table in splits.items():
        table.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return folder


@pytest.fixture(autouse=True)
def own_library_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture
def hf(config, tmp_path):
    return lambda path, **settings: open_index(config("hf", path, **settings))


def level(index, i):
    return np.asarray(index.read(i))[0, 0, 0]


# --- forms ----------------------------------------------------------------------------------------------------------


def image_folder(tmp_path, made):
    for split, table in made.items():
        for k, row in enumerate(table.with_format("arrow").to_dict()["image"]):
            folder = tmp_path / "folder" / split / CLASSES[k % 2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{k}.png").write_bytes(row["bytes"])
    return tmp_path / "folder"


def saved(tmp_path, made):
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


FORMS = {
    "parquet": lambda tmp_path, made: parquet(tmp_path / "parquet", **made),
    "saved": saved,
    "image folder": image_folder,
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form, hf, tmp_path, monkeypatch):
    made = {"train": labelled(6), "test": labelled(2, 50)}
    path = FORMS[form](tmp_path, made)
    monkeypatch.setattr("peft_vit.data.sources.hf.decode_image", lambda *_: pytest.fail("nothing is decoded yet"))
    index = hf(path)
    monkeypatch.setattr("peft_vit.data.sources.hf.decode_image", decode_image)
    assert index.name == "hf"
    assert index.class_names == CLASSES
    order = np.argsort([level(index, i) for i in range(8)])  # a folder's images lie class by class
    assert [level(index, i) for i in order] == [0, 1, 2, 3, 4, 5, 50, 51]
    assert index.labels[order].tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    assert index.official_test[order].tolist() == [False] * 6 + [True] * 2
    assert index.names[order[0]] == ("train/cat/0.png" if form == "image folder" else "train[0]")
    assert index.contents.tolist() == np.unique(index.contents, return_inverse=True)[1].tolist()
    assert len(set(index.contents)) == 8
    assert (index.channels, index.licence) == (3, DATASETS["hf"].licence)


def test_one_hash_for_the_same_tables_however_they_are_stored(hf, tmp_path):
    made = {"train": labelled(6), "test": labelled(2, 50)}
    hashes = [hf(FORMS[form](tmp_path, made)).sha256 for form in ("parquet", "saved")]
    assert hashes[0] == hashes[1]
    assert hf(saved(tmp_path / "other", {"train": labelled(6), "test": labelled(2, 51)})).sha256 != hashes[0]
    swapped = rows(6, 0, label=(LABEL, [1, 0, 0, 1, 0, 1]))
    assert hf(saved(tmp_path / "swapped", {"train": swapped, "test": labelled(2, 50)})).sha256 != hashes[0]


def test_a_single_parquet_file_is_read_anew_if_it_has_changed(hf, tmp_path, monkeypatch):
    file = parquet(tmp_path / "one", train=labelled(4)) / "data/train-00000-of-00001.parquet"
    before = hf(file)
    assert before.official_test is None
    assert [level(before, i) for i in range(4)] == [0, 1, 2, 3]
    with monkeypatch.context() as patch:
        patch.setattr("peft_vit.data.sources.hf._stored", lambda *_: pytest.fail("hashed again"))
        assert hf(file).sha256 == before.sha256
    labelled(4, 9).to_parquet(str(file))
    os.utime(file, (1, 1))
    after = hf(file)
    assert after.sha256 != before.sha256
    assert level(after, 0) == 9


def test_a_run_on_it(config, tmp_path):
    folder = parquet(tmp_path / "set", train=labelled(12), test=labelled(4, 50))
    configured = config("hf", folder, validation_images=4)
    data = load_data(configured, 0)
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 4, 4)
    assert data.warnings == ()
    files = thumbnails_of(record_of(configured, data.data_sha256), [0, 15])
    assert [np.asarray(Image.open(io.BytesIO(file)))[0, 0, 0] for file in files] == [0, 53]


# --- columns --------------------------------------------------------------------------------------------------------


def plain_parquet(folder, images):
    """Write Parquet as other tools do, which say nothing of images and classes."""
    folder.mkdir()
    pq.write_table(pa.table({"photo": images, "kind": ["x", "y"] * 2}), folder / "train.parquet")
    return folder


@pytest.mark.parametrize("kind", ["bytes", "struct"])
def test_images_in_plain_parquet(hf, tmp_path, kind):
    contents = [png(k) for k in range(4)]
    images = contents if kind == "bytes" else [{"bytes": content, "path": "x.png"} for content in contents]
    index = hf(plain_parquet(tmp_path / "plain", images))
    assert [level(index, i) for i in range(4)] == [0, 1, 2, 3]
    assert index.class_names == ("x", "y")


INTS, TEXTS = (datasets.Value("int64"), [10, 9, 10, 9]), (datasets.Value("string"), ["b", "a", "b", "a"])
FLOATS = (datasets.Value("float32"), [0.5, 0.25, 4, 0.5])
PAIRS = (datasets.List(datasets.Value("int64")), [[0, 1]] * 4)
LISTS = (datasets.List(THREE), [[0, 1], [1], [0], [2]])
COLUMNS = {
    "whole numbers": ({"number": INTS}, {}, ("9", "10"), [1, 0, 1, 0]),
    "texts": ({"kind": TEXTS}, {}, ("a", "b"), [1, 0, 1, 0]),
    "truth": ({"is_cat": (datasets.Value("bool"), [True, False] * 2)}, {}, ("False", "True"), [1, 0, 1, 0]),
    "classes before texts": ({"id": TEXTS, "y": (LABEL, [0, 1, 1, 0])}, {}, CLASSES, [0, 1, 1, 0]),
    "texts before lists and numbers": ({"tags": PAIRS, "x": FLOATS, "y": TEXTS}, {}, ("a", "b"), [1, 0, 1, 0]),
    "called label": ({"id": INTS, "label": TEXTS}, {}, ("a", "b"), [1, 0, 1, 0]),
    "chosen": ({"id": INTS, "label": TEXTS}, {"label_column": "id"}, ("9", "10"), [1, 0, 1, 0]),
    "chosen over classes": ({"y": (LABEL, [0, 1, 1, 0]), "x": TEXTS}, {"label_column": "x"}, ("a", "b"), [1, 0, 1, 0]),
    "labels in their order": ({"y": (THREE, [2, 0, 2, 0])}, {}, ("cat", "bird"), [1, 0, 1, 0]),
    "a list beside": ({"y": (LABEL, [0, 1, 1, 0]), "tags": LISTS}, {}, CLASSES, [0, 1, 1, 0]),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_columns_are_found_or_chosen(case, hf, tmp_path):
    columns, settings, names, labels = COLUMNS[case]
    index = hf(parquet(tmp_path / "set", train=rows(4, **columns)), **settings)
    assert index.class_names == names
    assert index.labels.tolist() == labels
    notes = ("1 of 3 classes have no image, such as 'dog'",)
    assert index.notes == (notes if case == "labels in their order" else ())


@pytest.mark.parametrize(
    ("columns", "settings", "task", "names", "labels"),
    [
        ({"tags": LISTS}, {}, "multilabel", ("bird", "cat", "dog"), [[0, 1, 1], [0, 0, 1], [0, 1, 0], [1, 0, 0]]),
        ({"id": INTS, "tags": LISTS}, {}, "multilabel", ("bird", "cat", "dog"), None),
        (
            {"label": (datasets.List(datasets.Value("string")), [["a", "b"], [], ["b"], []])},
            {},
            "multilabel",
            ("a", "b"),
            [[1, 1], [0, 0], [0, 1], [0, 0]],
        ),
        ({"score": FLOATS}, {}, "regression", ("score",), [[0.5], [0.25], [4], [0.5]]),
        ({"age": INTS}, {"task": "regression"}, "regression", ("age",), [[10], [9], [10], [9]]),
    ],
)
def test_lists_are_several_labels_and_numbers_are_numbers(columns, settings, task, names, labels, hf, tmp_path):
    index = hf(parquet(tmp_path / "set", train=rows(4, **columns)), **settings)
    assert (index.task.name, index.class_names) == (task, names)
    assert labels is None or index.labels.tolist() == labels
    assert level(index, 3) == 3


def test_an_image_column_is_chosen(hf, tmp_path):
    masks = (IMAGE, [{"bytes": png(100 + k), "path": None} for k in range(4)])
    folder = parquet(tmp_path / "set", train=rows(4, mask=masks, y=TEXTS))
    images, masks = (hf(folder, image_column=column) for column in ("image", "mask"))
    assert (level(images, 1), level(masks, 1)) == (1, 101)
    assert images.sha256 != masks.sha256
    with pytest.raises(UserError, match=r"data\.image_column: 2 of the columns image, mask, y hold images; name the"):
        hf(folder)


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"at": PAIRS, "y": TEXTS}, {"label_column": "at"}, r"column 'at' holds no labels, but List; name one of"),
        ({"at": PAIRS}, {}, r"label_column: 0 of the columns image, at could be the label"),
        ({"score": (FLOATS[0], [0.5, float("nan"), 1, 2])}, {}, r"label_column: train\[1\]: expected a number in"),
        ({"score": (FLOATS[0], [0.5] * 4)}, {}, r"'score' is 0.5 for every image, so there is nothing to learn"),
        ({"tags": (LISTS[0], [[0], [0, 1], [0], []])}, {"task": "classification"}, r"are not classification;"),
        ({"y": TEXTS}, {"task": "regression"}, r"label_column: train\[0\]: expected a number in column y, got 'b'"),
        ({"tags": (LISTS[0], [[0], [0, 1], [0], [0]])}, {}, r"every image has 'cat', so nothing can be learned ab"),
        ({"tags": (LISTS[0], [[0], [0, 1], None, []])}, {}, r"label_column: train\[2\] has no label; remove it"),
        ({"tags": (datasets.List(datasets.Value("string")), [["a|b"], ["c"]] * 2)}, {}, r"'a\|b' is not the name of"),
        ({"a": TEXTS, "b": TEXTS}, {}, r"label_column: 2 of the columns image, a, b could be the label; name the one"),
        ({"a": TEXTS}, {"label_column": "c"}, r"label_column: there is no column 'c'; expected one of image, a"),
        ({"a": TEXTS}, {"image_column": "c"}, r"image_column: there is no column 'c'"),
        ({"a": TEXTS}, {"image_column": "a"}, r"image_column: column 'a' holds no images, but string; name one of im"),
        ({"a": (LABEL, [0, 1, None, 0])}, {}, r"label_column: train\[2\] has no label; remove it"),
        ({"a": (LABEL, [-1, -1, 1, 0])}, {}, r"label_column: train\[0\] has no label, as 2 of 4 there"),
        ({"a": (LABEL, [-1] * 4)}, {}, r"data\.path: holds no image with a label"),
        ({"a": TEXTS}, {"hub_subset": "small"}, r"data\.hub_subset: can't be read .*'small' not found"),
    ],
)
def test_columns_that_do_not_serve_are_one_line(columns, settings, message, hf, tmp_path):
    folder = parquet(tmp_path / "set", train=rows(4, **columns))
    with pytest.raises(UserError, match=message) as caught:
        hf(folder, **settings)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


# --- splits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "test", "notes"),
    [
        (("train",), None, ()),
        (("data",), None, ()),
        (("train", "test"), "test", ()),
        (("train", "validation"), "validation", ()),
        (("train", "validation", "test"), "test", ()),
        (("train", "extra", "test"), "test", ("split extra is left out; only train, validation and test are read",)),
    ],
)
def test_own_splits_are_kept(names, test, notes, hf, tmp_path):
    made = {name: labelled(4, 20 * k) for k, name in enumerate(names)}
    index = hf(saved(tmp_path, made))
    used = [name for name in names if name != "extra"]
    assert index.names == [f"{name}[{k}]" for name in used for k in range(4)]
    expected = None if test is None else [name == test for name in used for _ in range(4)]
    assert (None if index.official_test is None else index.official_test.tolist()) == expected
    assert tuple(note for note in index.notes if "split" in note) == notes


def test_test_images_without_labels_give_way_to_validation_and_that_is_told(config, hf, tmp_path):
    hidden = rows(4, 90, label=(LABEL, [-1] * 4))
    configured = config("hf", saved(tmp_path, {"train": labelled(12), "validation": labelled(4, 50), "test": hidden}))
    index = open_index(configured)
    assert index.names[np.argmax(index.official_test)] == "validation[0]"
    assert image_warnings(index, make_splits(index, configured, 0), 14) == (f"Images: {UNLABELLED}",)
    without_column = hf(saved(tmp_path / "other", {"test": rows(4, 90), "train": labelled(12)}))
    assert (without_column.official_test, without_column.notes) == (None, (UNLABELLED,))


# --- files of others ------------------------------------------------------------------------------------------------


def one_row(folder, value):
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = pa.array([value, {"bytes": png(1), "path": None}], kind)
    folder.mkdir()
    pq.write_table(pa.table({"image": images, "label": ["a", "b"]}), folder / "train.parquet")
    return folder


def row_of(value):
    return lambda tmp_path: one_row(tmp_path / "set", value)


def splits_of(**made):
    return lambda tmp_path: saved(tmp_path, made)


def file_of(name, content):
    def write(tmp_path):
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / name).write_bytes(content)
        return tmp_path / "set"

    return write


def lying(tmp_path):
    """Write a table of texts of one letter each, of which the last one's end is beyond all of them."""
    folder = saved(tmp_path, {"train": rows(4, y=TEXTS)})
    (file,) = (folder / "train").glob("*.arrow")
    content, ends = file.read_bytes(), struct.pack("<5i", 0, 1, 2, 3, 4)
    assert content.count(ends) == 1
    file.write_bytes(content.replace(ends, struct.pack("<5i", 0, 1, 2, 3, 1 << 30)))
    return folder


def leading_out(tmp_path):
    parquet(tmp_path / "other", train=labelled(4))
    folder = parquet(tmp_path / "set", train=labelled(4))
    files = f"{tmp_path}/other/data/*.parquet"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n")
    return folder


OTHER_CLASSES = rows(2, 50, label=(datasets.ClassLabel(names=["dog", "cat"]), [0, 1]))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (row_of(None), r"data\.image_column: train\[0\] has no image; remove it"),
        (row_of({"bytes": None, "path": "/etc/hostname"}), r"train\[0\]: names the file /etc/hostname, which leads"),
        (row_of({"bytes": None, "path": "none.png"}), r"train\[0\]: names the file none\.png, which does not exist"),
        (row_of({"bytes": None, "path": "https://x.invalid/a.png"}), r"names the file https://x\.invalid/a\.png"),
        (lying, r"saved: has a damaged split train \(ArrowInvalid: .*; fetch it again"),
        (leading_out, r"leads out of .*set|can't be read"),
        (file_of("a.jsonl", b'{"text": "x", "label": 1}\n'), r"set: data\.path: is a set of the kind json; only image"),
        (file_of("train.parquet", b"PAR1broken"), r"train\.parquet: data\.path: can't be read .*Parq"),
        (lambda tmp_path: tmp_path / "hf" / ".." / "hf", r"data\.path: does not exist, and is not a name on the hub"),
        (lambda tmp_path: file_of("a.txt", b"x")(tmp_path) / "a.txt", r"a\.txt: data\.path: expected a folder"),
        (splits_of(train=labelled(4), test=OTHER_CLASSES), r"data\.path: column 'label' of split test is not"),
        (splits_of(train=labelled(4), test=labelled(2, 50).rename_column("image", "picture")), r"'image' of split"),
        (splits_of(test=labelled(4), validation=labelled(4, 9)), r"data\.path: has the splits test, validation"),
    ],
)
def test_refused_in_one_line(write, message, hf, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        hf(write(tmp_path))
    assert str(caught.value).isprintable()


def test_a_broken_image_is_named_when_it_is_read(hf, tmp_path):
    index = hf(one_row(tmp_path / "set", {"bytes": b"broken", "path": None}))
    with pytest.raises(UserError, match=r"set: train\[0\]: is not an image of a known format"):
        index.read(0)


def test_a_set_of_several_configurations(hf, tmp_path):
    folder = tmp_path / "set"
    for k, name in enumerate(("small", "large")):
        parquet(folder / name, train=labelled(4, 10 * k))
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/data/*.parquet\n" for name in ("small", "large"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert level(hf(folder, hub_subset="large"), 0) == 10
    with pytest.raises(UserError, match=r"set: data\.hub_subset: can't be read .*pick one among .*'small', 'large'"):
        hf(folder)
    with pytest.raises(UserError, match=r"data\.hub_subset: has no effect here: this is one set; remove it"):
        hf(folder / "small/data/train-00000-of-00001.parquet", hub_subset="small")


# --- the hub --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nobody/none", "none"])
def test_without_a_network_the_line_says_what_to_do(name, hf, monkeypatch):
    asked = []

    def unreachable(url, timeout):
        asked.append((url, timeout))
        raise OSError("Name or service not known")

    monkeypatch.setattr(hub_module.huggingface_hub, "get_session", lambda: SimpleNamespace(head=unreachable))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: pytest.fail("it would try for half a minute"))
    with pytest.raises(UserError) as caught:
        hf(name)
    said = str(caught.value)
    assert said.startswith(f"{name}: data.path: is not here, and can't be fetched from the hub (OSError: Name or")
    assert f"hf download {name} --repo-type dataset --local-dir FOLDER" in said
    assert asked == [(f"https://huggingface.co/api/datasets/{name}", 5.0)]


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(hub_module.huggingface_hub, "get_session", lambda: pytest.fail("the hub was asked"))


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("path", ["/nowhere/at/all", "./images", "a/b/c", "~nobody/x", "a\0b"])
def test_what_can_be_no_name_does_not_exist(path, hf):
    with pytest.raises(UserError, match=r"data\.path: does not exist, and is not a name on the hub"):
        hf(path)


def test_what_the_hub_has_is_asked_for_by_name_and_subset(hf, tmp_path, monkeypatch):
    folder = parquet(tmp_path / "set", train=labelled(4))
    builder = datasets.load_dataset_builder(str(folder), cache_dir=str(tmp_path / "hub"))
    asked = []
    monkeypatch.setattr(hub_module.huggingface_hub, "get_session", lambda: SimpleNamespace(head=lambda *_, **__: None))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args: asked.append(args) or builder)
    assert level(hf("someone/pets", hub_subset="small"), 3) == 3
    assert asked == [("someone/pets", "small")]


@pytest.mark.usefixtures("no_hub")
def test_a_set_in_the_librarys_cache_is_read_without_asking_the_hub(config, hf, tmp_path):
    folder = parquet(tmp_path / "pets", train=labelled(4))
    builder = datasets.load_dataset_builder(str(folder), cache_dir=str(tmp_path / "made"))
    builder.download_and_prepare()
    (tmp_path / "hf").mkdir()
    (tmp_path / "made/pets").rename(tmp_path / "hf/someone___pets")  # as the library names those of the hub
    index = hf("someone/pets")
    assert [level(index, i) for i in range(4)] == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"the data set someone/cars of the hub: is not on this machine"):
        thumbnails_of(record_of(config("hf", "someone/cars"), "0" * 64), [0])  # which are never downloaded


@pytest.mark.parametrize("version", [None, "2.14.0"])
def test_the_library_is_an_extra(version, hf, tmp_path, without, monkeypatch):
    if version is None:
        without("datasets")
    else:
        monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    with pytest.raises(UserError, match=r"^data\.dataset: hf needs the package datasets.*pip install"):
        hf(tmp_path)
