"""What `peft-vit train` was asked for is checked, zero included."""

from typing import get_args

import numpy as np
import pytest
from PIL import Image

from peft_vit.cli import MethodName
from peft_vit.config import SECTIONS, Method
from peft_vit.errors import UserError
from peft_vit.experiments.own_images import OwnImages, study_of


def asked(tmp_path, **changes) -> OwnImages:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for place in range(10):
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{place}.png")
    settings = {
        "folder": tmp_path, "method": "lora", "shots": 3, "model": "test_vit", "weights": "random", "image_size": 32,
        "epochs": 4, "learning_rate": None, "seed": 0, "threads": 1,
    }  # fmt: skip
    return OwnImages(**{**settings, **changes})


def test_a_fifth_validates_a_fifth_tests_and_the_default_rate_is_the_methods(tmp_path, cache) -> None:
    study = study_of(asked(tmp_path, method="linear"))
    assert (study.data.validation_images, study.data.test_images, study.data.shots_per_class) == (4, 4, 3)
    assert study.experiments[0].training.learning_rate == 3e-3


def test_a_rate_of_zero_is_no_rate(tmp_path, cache) -> None:
    with pytest.raises(UserError, match="learning_rate: input should be greater than 0, got 0"):
        study_of(asked(tmp_path, learning_rate=0.0))


@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_has_a_preset(tmp_path, cache, method) -> None:
    (experiment,) = study_of(asked(tmp_path, method=method, epochs=8)).experiments
    assert experiment.method == method
    assert MethodName(method).value == method
    sections = {name for name in SECTIONS.get(method, ()) if getattr(experiment, name) is not None}
    assert sections == set(SECTIONS.get(method, ()))


@pytest.mark.parametrize(("tested", "batches"), [(5, 3), (25, 1)])
def test_adaptive_ranks_are_decided_in_a_sixth_of_the_steps_also_where_a_folder_brings_its_test_split(
    tmp_path, cache, tested, batches
) -> None:
    for place in range(50):
        part = tmp_path / ("test" if place < tested else "train")
        for value, name in enumerate(("cat", "dog")):
            (part / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (place, value, 0)).save(part / name / f"{place}.png")
    study = study_of(OwnImages(
        folder=tmp_path, method="adalora", shots=None, model="test_vit", weights="random", image_size=32, epochs=24,
        learning_rate=None, seed=0, threads=1,
    ))  # fmt: skip
    adalora = study.experiments[0].adalora
    assert adalora is not None
    steps = 24 * batches  # of 100 images less the test split and the 20 that validate
    assert (adalora.warmup_steps, adalora.update_frequency) == (steps // 12, steps // 12)
    assert adalora.final_steps == steps - 2 * (steps // 12)
