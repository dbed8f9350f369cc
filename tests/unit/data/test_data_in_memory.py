"""Images that a program holds become paths or pixels, and a table that training reads."""

import csv
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from peft_vit.base.errors import UserError
from peft_vit.data import decode_image, find_images
from peft_vit.data.sources.in_memory import held_images, write_table

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
LABELS = [1, 0, 1, 0]
LISTED = [[0, 1], [1], [], [0]]


class Pairs(torch.utils.data.Dataset):
    """As torchvision's are: tensors (3, H, W) from 0 to 1, and labels."""

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(PIXELS[place]).permute(2, 0, 1) / 255, torch.tensor(LABELS[place])


def of_hugging_face():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = [{"image": Image.fromarray(image), "label": label} for image, label in zip(PIXELS, LABELS, strict=True)]
    return datasets.Dataset.from_list(rows, features=features)


FORMS = {
    "uint8": lambda: PIXELS,
    "integers": lambda: PIXELS.astype(np.int64),
    "floats": lambda: PIXELS / 255,
    "channels first": lambda: np.moveaxis(PIXELS, 3, 1),
    "tensor": lambda: torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float() / 255,
    "list": lambda: list(PIXELS),
    "PIL": lambda: [Image.fromarray(image) for image in PIXELS],
    "of all kinds": lambda: [PIXELS[0], Image.fromarray(PIXELS[1]), PIXELS[2] / 255, torch.from_numpy(PIXELS[3])],
    "series": lambda: pd.Series(list(PIXELS), index=[7, 3, 5, 1]),
    "one column": lambda: pd.DataFrame({"photo": list(PIXELS)}),
}
WITH_LABELS = {
    "pairs": lambda: list(zip(PIXELS, LABELS, strict=True)),
    "frame": lambda: pd.DataFrame({"label": LABELS, "n": 0, "image": list(PIXELS)}),
    "torch": Pairs,
    "Hugging Face": of_hugging_face,
}


@pytest.mark.parametrize("form", FORMS | WITH_LABELS)
def test_all_forms_are_the_same_pixels(form) -> None:
    images, labels = zip(*held_images((FORMS | WITH_LABELS)[form]()), strict=True)
    np.testing.assert_array_equal(np.stack(images), PIXELS)
    assert list(labels) == (LABELS if form in WITH_LABELS else [None] * 4)


def test_grey_images_and_paths() -> None:
    grey = PIXELS[..., 0]
    for held in (grey, grey[..., None], grey[:, None], [Image.fromarray(image) for image in grey]):
        for (image, _), expected in zip(held_images(held), grey, strict=True):
            assert (image if image.ndim == 2 else image[..., 1]).tolist() == expected.tolist()
    paths = ["a/b.png", "c.png"]
    for held in (
        paths,
        np.array(paths),
        pd.Series(paths),
        pd.DataFrame({"path": paths, "n": [1, 2]}),
        [*map(Path, paths)],
    ):
        assert [image for image, _ in held_images(held)] == [Path("a/b.png"), Path("c.png")]
    assert list(held_images("a.png")) == [(Path("a.png"), None)]


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (PIXELS.reshape(4, -1), "images: expected images as (N, H, W), (N, H, W, 3) or (N, 3, H, W), got (4, 90)"),
        (PIXELS[0], "got (6, 5, 3); of one image give [image]"),
        (np.zeros((2, 6, 5, 7)), "images[0]: expected a path, a PIL image or numbers (H, W), (H, W, 3) or (3, H, W)"),
        ([PIXELS[0], np.zeros((0, 5, 3))], "images[1]: expected a path"),
        ([PIXELS[0] > 3], "got (6, 5, 3) bool"),
        ([3 + 1j], "images[0]: expected a path, a PIL image or numbers (H, W), (H, W, 3) or (3, H, W), got complex"),
        ([None], "got NoneType"),
        (PIXELS * 1.0, "images[0]: has values from 0 to 248; integers are 0 to 255, floats 0 to 1"),
        (PIXELS.astype(int) - 9, "integers are 0 to 255"),
        (np.full((1, 4, 5), np.nan), "has values from nan to nan"),
        ([Image.fromarray(np.zeros((4, 4), np.uint16))], "images[0]: has pixels of mode I;16; scale them to 8 bits"),
        (
            pd.DataFrame({"a": [1], "b": [2]}),
            "expected a column image, img, path, file, filename, file_name, filepath, and perhaps label; got a, b",
        ),
    ],
)
def test_what_is_no_image_is_told_in_a_line(held, said) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        list(held_images(held))


@pytest.mark.usefixtures("cache")
def test_a_table_names_images_that_are_read_again(tmp_path) -> None:
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.png")
    held = [tmp_path / "a.png", PIXELS[1], PIXELS[1], PIXELS[1], PIXELS[2, ..., 0]]
    table, classes = write_table(held, np.array([3, 20, 20, 3, 3]))
    assert classes.tolist() == [3, 20]
    with table.open() as file:
        rows = list(csv.reader(file))
    assert rows[:2] == [["path", "label"], [str(tmp_path / "a.png"), "3"]]
    assert [label for _, label in rows[2:]] == ["20", "3", "3"]  # equal ones of a class are one
    images = find_images(table)
    for (name, _), expected in zip(rows[2:], (PIXELS[1], PIXELS[1], PIXELS[2, ..., 0]), strict=True):
        np.testing.assert_array_equal(decode_image(lambda name=name: images.tree.read(name), name), expected)
    before = {file: file.stat().st_mtime_ns for file in table.parent.iterdir() if file != table}
    assert write_table(held, ["3", "20", "20", "3", "3"])[0] == table
    assert {file: file.stat().st_mtime_ns for file in table.parent.iterdir() if file != table} == before
    assert not [name for name in os.listdir(table.parent) if name.startswith(".")]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_missing_label_is_no_class(missing: float | None) -> None:
    with pytest.raises(UserError, match="labels: are missing, the first at 3"):
        write_table(PIXELS, ["a", "b", "a", missing])


@pytest.mark.parametrize("names", [("image", "label"), ("filename", "class"), ("filepath", "category")])
def test_columns_of_a_frame_are_called_as_those_of_a_table(names: tuple[str, str], tmp_path) -> None:
    rows = pd.DataFrame({"date": ["today"], names[0]: [tmp_path / "a.png"], names[1]: ["cat"]})
    assert list(held_images(rows)) == [(tmp_path / "a.png", "cat")]


@pytest.mark.usefixtures("cache")
def test_lists_of_names_and_numbers_are_labels_of_their_tasks() -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"image": Image.fromarray(pixels), "label": own} for pixels, own in zip(PIXELS, LISTED, strict=True)]
    inner = datasets.List(datasets.ClassLabel(names=["no", "yes"]))
    features = datasets.Features({"image": datasets.Image(), "label": inner})
    files = find_images(write_table(datasets.Dataset.from_list(rows, features=features), of_classes=False)[0])
    assert (files.task.name, files.read()[0]) == ("multilabel", ("no", "yes"))
    assert files.read()[1].tolist() == [[1, 1], [0, 1], [0, 0], [1, 0]]
    numbers = find_images(write_table(PIXELS, [0.5, 1, 2, 0.25], of_classes=False)[0])
    assert (numbers.task.name, numbers.read()[1].tolist()) == ("regression", [[0.5], [1], [2], [0.25]])
    with pytest.raises(UserError, match="labels: 1 in a list is not the name of a class; of several numbers give"):
        write_table(PIXELS, [[1, 2]] * 4, of_classes=False)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (PIXELS, [1, 2], r"inconsistent numbers of samples: \[4, 2\]"),
        (PIXELS, [0.1, 0.2, 0.3, 0.4], "Unknown label type: continuous"),
        (PIXELS, np.eye(4), "y should be a 1d array"),
        (PIXELS, None, "labels: are missing, the first at 0; give one for each image"),
        (PIXELS, ["a", "b", "", "a"], "labels: '' is empty"),
        (PIXELS, ["a", " b", "a", "a"], "labels: ' b' is empty, or begins or ends with a space"),
        ([], None, "images: are none"),
        (PIXELS, np.array(["a", float("nan"), "b", None], dtype=object), "labels: are missing, the first at 1"),
    ],
)
def test_labels_that_are_none_are_refused(images, labels, said) -> None:
    with pytest.raises((UserError, ValueError), match=said):
        write_table(images, labels)
