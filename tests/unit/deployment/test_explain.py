"""A map of where a model looked shows what it looks at, however large the image, and of tasks without a class there is
none.
"""

import numpy as np
import pytest
from tiny_models import CARD

from peft_vit.base.errors import UserError
from peft_vit.deploy import Classifier
from peft_vit.deploy.explain import explain


def looking_at(size: int, corner: int) -> Classifier:
    """Return a model that says class 1 the more, the brighter a square at an offset from the upper left is."""

    def logits(images: np.ndarray) -> np.ndarray:
        scores = np.zeros((len(images), len(CARD.class_names)), np.float32)
        scores[:, 1] = images[:, :, corner : corner + 14, corner : corner + 14].mean((1, 2, 3))
        return scores

    return Classifier(logits, CARD.model_copy(update={"image_size": size, "channels": 3}))


@pytest.mark.parametrize(("size", "cells"), [(28, 2), (56, 4), (112, 8), (224, 8)])
def test_a_map_is_largest_where_the_model_looks(size, cells) -> None:
    image = np.zeros((size, size, 3), np.uint8)
    image[-14:, -14:] = 255
    looked = explain(looking_at(size, size - 14), image)
    assert looked.class_name == CARD.class_names[1]
    assert looked.drops.shape == (cells, cells)
    assert looked.drops[-1, -1] > 0.1
    others = looked.drops.copy()
    others[-1, -1] = 0
    assert np.abs(others).max() < 1e-6
    picture = np.asarray(looked.picture)
    assert picture.shape == (224, 224, 3)
    assert picture[-1, -1].min() > 250


def test_where_nothing_matters_all_is_dark_and_grey_images_are_shown_too() -> None:
    looked = explain(looking_at(28, 0), np.full((28, 28), 100, np.uint8))
    assert not looked.drops.any()
    assert set(np.unique(looked.picture)) == {25}  # a quarter of the light


def test_a_model_without_one_class_an_image_is_refused() -> None:
    numbers = Classifier(
        lambda images: np.zeros((len(images), 1), np.float32), CARD.model_copy(update={"task": "regression"})
    )
    with pytest.raises(UserError) as refused:
        explain(numbers, np.zeros((8, 8), np.uint8))
    assert (refused.value.field, "this one is of regression" in refused.value.message) == ("--explain", True)
