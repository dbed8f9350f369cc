"""A study gets smaller by patches, then by halves of its images; classes, splits and methods stay."""

from dataclasses import astuple, replace
from itertools import pairwise

import numpy as np
import pytest

from peft_vit.data import make_splits, open_index
from peft_vit.errors import UserError
from peft_vit.studies.sizes import Sizes, smaller_sizes, smaller_study, smallest_image, with_sizes
from peft_vit.studies.smoke import smoke_study

pytestmark = pytest.mark.part("runner")

FULL = Sizes(84, 512, 400, 600)


def test_patches_go_first_and_then_halves_of_the_images() -> None:
    found = list(smaller_sizes(FULL, 14, 2))
    assert found[0] == FULL
    assert [one.image_size for one in found[:5]] == [84, 70, 56, 42, 28]
    assert found[5:] == [Sizes(28, 256, 200, 300), Sizes(28, 128, 100, 200)]
    assert all(one.image_size == 28 for one in found[5:])


def test_every_class_keeps_some_images_and_no_split_grows() -> None:
    many = list(smaller_sizes(Sizes(64, 3000, 900, 150), 16, 100))
    assert many[-1] == Sizes(32, 400, 400, 150)
    for before, after in pairwise(many):
        assert after != before
        assert all(now <= earlier for now, earlier in zip(astuple(after), astuple(before), strict=True))


@pytest.mark.parametrize(
    ("image_size", "patch_size", "smallest"), [(84, 14, 28), (28, 14, 28), (32, 4, 16), (64, 8, 16)]
)
def test_no_image_has_fewer_than_two_patches_a_side(image_size, patch_size, smallest) -> None:
    assert smallest_image(image_size, patch_size) == smallest


def test_only_what_differs_is_said(study) -> None:
    data = study("lora").data.model_copy(update={"train_images": None})
    full = Sizes(32, 1747, 20, 30)
    assert with_sizes(data, full, full, 10) == data
    smaller = with_sizes(data, full, replace(full, image_size=16), 10)
    assert smaller == data.model_copy(update={"image_size": 16})
    fewer = with_sizes(data, full, replace(full, train=873), 10)
    assert (fewer.train_images, fewer.validation_images, fewer.test_images) == (873, 20, 30)
    shots = data.model_copy(update={"shots_per_class": 40})
    halved = with_sizes(shots, Sizes(32, 400, 20, 30), Sizes(32, 200, 20, 30), 10)
    assert (halved.shots_per_class, halved.train_images) == (20, None)


def test_schedules_shrink_with_the_steps_and_only_with_them(study) -> None:
    config = study("lora", "adalora", "qa_adalora", epochs=20)  # 60 steps
    adalora = config.experiments[1].adalora.model_copy(
        update={"warmup_steps": 20, "update_frequency": 10, "final_steps": 10}
    )
    experiments = (config.experiments[0], config.experiments[1].model_copy(update={"adalora": adalora}))
    config = config.model_copy(update={"experiments": experiments})
    index = open_index(config.data)
    assert smaller_study(config, config.data, index) is config
    small = smaller_study(config, config.data.model_copy(update={"image_size": 16}), index)
    assert small.experiments == config.experiments
    fewer = smaller_study(config, config.data.model_copy(update={"train_images": 16}), index)  # 40 steps
    assert fewer.experiments[0] == config.experiments[0]
    changed = fewer.experiments[1].adalora
    assert (changed.warmup_steps, changed.update_frequency, changed.final_steps) == (13, 7, 7)
    assert changed.total_rank_budget == adalora.total_rank_budget


def test_a_class_without_an_image_is_refused(study) -> None:
    config = study("lora")
    index = open_index(config.data)
    with pytest.raises(UserError, match="gets none of the 2 training images"):
        smaller_study(config, config.data.model_copy(update={"train_images": 2}), index)


def test_smaller_studies_of_many_sizes_hold_every_class(study) -> None:
    config = study("lora", seeds=(0, 1, 2))
    data = config.data.model_copy(
        update={"train_images": 800, "validation_images": 300, "test_images": 400, "test_split": "per_seed"}
    )
    config = config.model_copy(update={"data": data})
    index = open_index(data)
    full = Sizes.of(data, make_splits(index, data, 0))
    for sizes in smaller_sizes(full, 16, 10):
        smaller = smaller_study(config, with_sizes(data, full, sizes, 10), index)
        for seed in config.seeds:
            splits = make_splits(index, smaller.data, seed)
            assert Sizes.of(smaller.data, splits) == sizes
            for rows in (splits.train, splits.validation, splits.test):
                assert np.unique(index.labels[rows]).size == 10
    assert smoke_study(config, 16).data.image_size == smallest_image(32, 16)  # both keep two patches a side
