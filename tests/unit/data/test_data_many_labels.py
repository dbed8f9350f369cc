"""Tables of several labels and of numbers: how they are read, what is refused of them, and how they are split."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from written_images import save

from peft_vit.base.errors import UserError
from peft_vit.base.statistics.drawing import assign_folds, stratified_sample
from peft_vit.core.config import DataConfig
from peft_vit.data import find_images, inspect_images, make_splits, open_index

FILES = [f"{number:02}.png" for number in range(12)]


@pytest.fixture
def table(tmp_path):
    """Return what writes a table of images, with the cells of their rows, and names it."""

    def write(header, *cells):
        for number, file in enumerate(FILES):
            save(tmp_path / file, np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8))
        lines = [f"path,{header}", *(f"{file},{cells[n % len(cells)]}" for n, file in enumerate(FILES))]
        (tmp_path / "images.csv").write_text("\n".join(lines) + "\n")
        return tmp_path / "images.csv"

    return write


@pytest.mark.parametrize(
    ("header", "cells", "task", "names", "first"),
    [
        ("Cat,dog", ("1,0", "0,1", ",1"), "multilabel", ("Cat", "dog"), [1, 0]),
        ("cat,dog", ("1.0,False", "0.0,true"), "multilabel", ("cat", "dog"), [1, 0]),
        ("label", ("dog|cat", "dog", "", " bird |cat"), "multilabel", ("bird", "cat", "dog"), [0, 1, 1]),
        ("defect", ("0", "1"), "multilabel", ("defect",), [0]),
        ("age", ("31", "4.5"), "regression", ("age",), [31]),
        ("x,y", ("1,0.5", "0,-2e3"), "regression", ("x", "y"), [1, 0.5]),
        ("label", ("0.5", "1"), "regression", ("label",), [0.5]),
        ("label", ("3", "10"), "classification", ("10", "3"), 1),
        ("label,age", ("a,1", "b,2"), "classification", ("a", "b"), 0),
    ],
)
def test_the_task_is_what_columns_look_like(table, header, cells, task, names, first) -> None:
    index = open_index(DataConfig(dataset="csv", path=str(table(header, *cells)), image_size=32, validation_images=2))
    assert (index.task.name, index.class_names) == (task, names)
    assert index.labels[0].tolist() == first


def test_it_can_be_said_and_what_is_not_known_is_nan(table) -> None:
    path = table("label", "3", "10")
    config = DataConfig(dataset="csv", path=str(path), task="regression", image_size=32, validation_images=2)
    assert open_index(config).labels[:2].tolist() == [[3], [10]]
    path = table("a,b", "1,", "0,1", ",0")
    index = open_index(config.model_copy(update={"task": None}))
    assert np.isnan(index.labels[:3]).tolist() == [[False, True], [False, False], [True, False]]
    assert [index.label(i) for i in range(3)] == ["a|b?", "b", "a?"]


def test_parquet_may_hold_lists(table, tmp_path) -> None:
    table("a", "1")
    columns = {"path": FILES, "label": [["cat", "dog"], [], ["dog"]] * 4}
    parquet.write_table(pa.table(columns), tmp_path / "images.parquet")
    files = find_images(tmp_path / "images.parquet")
    names, labels = files.read()
    assert (files.task.name, names, labels[:3].tolist()) == ("multilabel", ("cat", "dog"), [[1, 1], [0, 0], [0, 1]])


@pytest.mark.parametrize(
    ("header", "cells", "task", "message"),
    [
        ("kind", ("cat", "dog"), None, "column kind holds 'cat' and 'dog', neither numbers nor 0, 1 or nothing; call"),
        ("a,age", ("1,30", ",40"), None, "has columns of 0, 1 or nothing, and others of numbers"),
        ("a,b", ("1,0", "0,0"), None, "every image is without 'b', so nothing can be learned about it"),
        ("a,b", ("1,1", "0,1"), None, "every image has 'b', so nothing can be learned about it"),
        ("age", ("3",), "regression", "'age' is 3 for every image, so there is nothing to learn"),
        ("age", ("3.5", "nan"), None, "column age holds '3.5' and 'nan', neither numbers"),
        ("age", ("3.5", "4.5", "nan"), None, "images.csv:4: expected a number in column age, got 'nan'"),
        ("age", ("3.5", "", ""), "regression", "images.csv:3: expected a number in column age, got ''; 8 of 12 rows"),
        ("age", ("3.5", "4.5", "1e300"), None, "images.csv:4: expected a number in column age, got '1e300'"),
        ("a,b", ("1,0", "0,1", "nan,1"), None, "images.csv:4: expected 0, 1, or nothing for what is not known, got"),
        ("a,split", ("0,train", "1,test"), None, "every training image is without 'a', so nothing can be learned"),
        ("a,split", ("1,train", "0,test"), None, "every training image has 'a', so nothing can be learned about it"),
        ("age,split", ("3.5,train", "4.5,test"), None, "'age' is 3.5 for every training image, so there is nothing"),
        ("age", ("3.5", ""), "regression", "expected a number in column age, got ''"),
        ("a,b", ("1,2", "0,1"), "multilabel", "expected 0, 1, or nothing for what is not known, got '2'"),
        ("label,split", ("", "a,train"), "classification", "expected a path and a label"),
    ],
)
def test_what_can_not_be_learned_is_refused_in_one_line(table, header, cells, task, message) -> None:
    with pytest.raises(UserError) as refused:
        inspect_images(find_images(table(header, *cells), task), least=2)
    assert message in str(refused.value)
    assert "images.csv" in str(refused.value)


def test_numbers_that_training_images_share_are_refused_when_these_are_drawn(table) -> None:
    """One image of twelve is different, and is a test image with some seed: that of the split is not known before."""
    path = table("age", *["9.5"] + ["3.5"] * 11)
    data = {"dataset": "csv", "path": str(path), "image_size": 32, "validation_images": 2, "test_images": 3}
    index, missing = open_index(DataConfig(**data)), 0
    ranked = replace(index, labels=np.array([[99.0], *([float(n)] for n in range(11))]))  # drawn alike
    for seed in range(20):
        config = DataConfig(**data, split_seed=seed)
        if 0 in make_splits(ranked, config, 0).train:
            make_splits(index, config, 0)
            continue
        missing += 1
        with pytest.raises(UserError, match=r"^'age' is 3\.5 for every training image, so there is nothing to learn$"):
            make_splits(index, config, 0)
    assert 0 < missing < 20


def test_a_folder_of_classes_is_no_other_task(tmp_path) -> None:
    for name in ("a/1.png", "b/1.png"):
        save(tmp_path / name, np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=r"data\.task: has a folder for each class, which is not regression"):
        find_images(tmp_path, "regression")


# --- splits -----------------------------------------------------------------------------------------------------------


def test_draws_and_folds_hold_every_label_in_its_share() -> None:
    rng = np.random.default_rng(1)
    members = rng.random((200, 6)) < (0.5, 0.3, 0.1, 0.05, 0.05, 0.02)
    drawn = stratified_sample(np.arange(200), members, 50, rng)
    assert len(drawn) == 50
    assert np.abs(members[drawn].sum(0) - members.sum(0) / 4).max() <= 2
    folds = assign_folds(members, np.arange(200), 5, rng)
    by_fold = np.array([members[folds == k].sum(0) for k in range(5)])
    assert np.abs(by_fold - members.sum(0) / 5).max() <= 2
    assert np.abs(np.bincount(folds) - 40).max() <= 1
    rare = members[:, 5]
    assert (by_fold[:, 5] >= rare.sum() // 5).all()
    by_lot = np.array([np.abs(members[rng.permutation(200)[:50]].sum(0) - members.sum(0) / 4).max() for _ in range(20)])
    assert by_lot.mean() > 2  # what drawing blindly does


def test_copies_stay_in_one_fold() -> None:
    rng = np.random.default_rng(2)
    members, groups = rng.random((60, 3)) < 0.4, np.arange(60) // 3
    folds = assign_folds(members, groups, 4, rng)
    assert all(len(set(folds[groups == group])) == 1 for group in range(20))
