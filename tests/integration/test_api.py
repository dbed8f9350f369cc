"""Functions for Python: models that predict, pages that show themselves, one line for a fault."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import peft_vit
from peft_vit.errors import UserError
from peft_vit.tuning.request import TuneRequest

SETTINGS = {"model": "test_vit", "image_size": 32, "threads": 1, "precision": "fp32", "device": "cpu"}


@pytest.mark.usefixtures("in_this_process", "cache")
def test_train_returns_a_model_and_a_report(images, weights, tmp_path) -> None:
    trained = peft_vit.train(str(images), "linear", output=tmp_path, weights=str(weights), **SETTINGS)
    assert trained.record.test is not None
    assert trained.record.spec.experiment.method == "linear"
    array = np.asarray(Image.open(images / "class_1" / "00.png"))
    by_array, by_path = trained.predict([array, images / "class_1" / "00.png"])
    assert (by_array.class_name, by_array.probability) == (by_path.class_name, by_path.probability)
    assert by_path.class_name in trained.record.class_names
    with pytest.raises(UserError, match="coverage: is of models that `peft-vit tune` has made"):
        trained.predict(array, coverage=0.9)
    assert trained.report.path == tmp_path / "report" / "report.html"
    assert "linear" in trained.report.path.read_text()
    assert trained._repr_html_().startswith("<iframe srcdoc=")


def test_bad_arguments_are_one_line(images, tmp_path) -> None:
    with pytest.raises(UserError, match=r"^method: expected one of linear, .*, got 'lorra'$"):
        peft_vit.train(images, "lorra", output=tmp_path)
    with pytest.raises(TypeError, match="ranks"):
        peft_vit.train(images, "lora", output=tmp_path, ranks=8)
    with pytest.raises(UserError, match="nowhere"):
        peft_vit.train("nowhere", "lora", output=tmp_path)
    with pytest.raises(UserError, match=r"--model: .*'no_such_model'"):
        peft_vit.tune(images, models="no_such_model", output=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"max_bytes": "20"}, "^--max-bytes: '20' is not a size above 0 with its unit"),
        ({"max_latency_s": "50"}, "^--max-latency: '50' is not a time above 0 in ms or s; write it as in 50ms$"),
        ({"max_latency_s": [1]}, r"^--max-latency: .*number, got \[1\]$"),
        ({"image_sizes": 28.5}, "^--image-size: .*, got 28.5$"),
        ({"image_sizes": (0,)}, "^--image-size: .*greater than 0, got 0$"),
        ({"models": [3]}, "^--model: .*string, got 3$"),
        ({"models": 3}, "^--model: .*string, got 3$"),
        ({"executor": "spark"}, "^--executor: .*'local' or 'ray', got 'spark'$"),
        ({"memory_limit": 10**9}, "^--memory-limit: .*string, got 1000000000$"),
        ({"minutes": "many"}, "^--minutes: .*number.*, got 'many'$"),
        ({"threads": 0}, "^--threads: .*greater than 0, got 0$"),
        ({"ranks": 3}, "^--ranks: unexpected keyword argument"),
    ],
)
def test_arguments_of_tune_of_another_type_are_one_line(tmp_path, setting, expected) -> None:
    with pytest.raises(UserError, match=expected):
        peft_vit.tune("nowhere", output=tmp_path, **setting)


def test_tune_takes_times_sizes_and_single_values_as_the_command_does(tmp_path) -> None:
    given = {"max_bytes": "16MB", "max_latency_s": "50ms", "image_sizes": 28, "models": "test_vit"}
    request = TuneRequest.of(images="photos", output=tmp_path, **given)
    assert (request.max_bytes, request.max_latency_s) == (16_000_000, 0.05)
    assert (request.image_sizes, request.models, request.images) == ((28,), ("test_vit",), Path("photos"))
