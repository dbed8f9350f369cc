"""Functions for Python: models that predict, pages that show themselves, one line for a fault."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import peft_vit
from peft_vit.errors import UserError
from peft_vit.tuning.tune_request import TuneRequest

SETTINGS = {"model": "test_vit", "image_size": 32, "threads": 1, "precision": "fp32", "device": "cpu"}


@pytest.mark.usefixtures("in_this_process", "cache")
def test_train_returns_a_model_and_a_report(images, weights, tmp_path) -> None:
    asked = {"output": tmp_path, "weights": str(weights), **SETTINGS}
    trained = peft_vit.train(str(images), "linear", **asked)
    assert trained.folder == tmp_path / "0001-linear-32px-test-vit"
    assert trained.record.test is not None
    assert trained.record.spec.experiment.method == "linear"
    array = np.asarray(Image.open(images / "class_1" / "00.png"))
    by_array, by_path = trained.predict([array, images / "class_1" / "00.png"])
    assert (by_array.class_name, by_array.probability) == (by_path.class_name, by_path.probability)
    assert by_path.class_name in trained.record.class_names
    with pytest.raises(UserError, match="coverage"):  # so few images validate
        trained.predict(array, coverage=0.99)
    assert peft_vit.train(images, "linear", **asked) == trained  # which is not done again
    assert trained.report.path == trained.folder / "report" / "report.html"
    assert "linear" in trained.report.path.read_text()
    assert trained._repr_html_().startswith("<iframe srcdoc=")
    with pytest.raises(UserError, match=r"0002-full-.*: DivergedError: the loss is nan at step"):
        peft_vit.train(images, "full", **asked, steps=20, learning_rate=1e30)
    assert peft_vit.load_results(tmp_path / "latest").runs["state"].tolist() == ["failed"]


REFUSED = [  # the function, its arguments, the parameter that is named, and a part of what is said
    ("train", {"method": "lorra"}, "method", "should be 'linear', "),
    ("train", {"ranks": 8}, "ranks", "unknown key"),
    ("train", {"learning_rate": 0}, "learning_rate", "should be greater than 0, got 0"),
    ("train", {"method": "linear", "rank": 8}, "rank", "has no effect with method linear; leave it out; "),
    ("train", {"init_adapter": "adapter", "rank": 8}, "rank", "has no effect with init_adapter; "),
    ("train", {"images": "nowhere"}, None, "nowhere"),
    ("tune", {"models": "no_such_model"}, "models", "'no_such_model'"),
    ("tune", {"max_bytes": "20"}, "max_bytes", "'20' is not a size above 0 with its unit"),
    (
        "tune",
        {"max_latency": "50"},
        "max_latency",
        "is not a time above 0 with its unit, ms, s, min; write it as in 50ms",
    ),
    ("tune", {"max_latency": [1]}, "max_latency", "number, got [1]"),
    ("tune", {"image_sizes": 28.5}, "image_sizes", ", got 28.5"),
    ("tune", {"image_sizes": (0,)}, "image_sizes", "should be greater than or equal to 14, got 0"),
    ("tune", {"models": [3]}, "models", "string, got 3"),
    ("tune", {"models": 3}, "models", "string, got 3"),
    ("tune", {"models": ""}, "models", "is empty"),
    ("tune", {"executor": "spark"}, "executor", "should be 'local' or 'ray', got 'spark'"),
    ("tune", {"image_sizes": (32, 2048)}, "image_sizes", "should be less than or equal to 1024, got 2048"),
    ("tune", {"seed": -1}, "seed", "got -1"),
    ("tune", {"margin": 0.0}, "margin", "should be greater than 0, got 0"),
    ("tune", {"memory_limit": 10**9}, "memory_limit", "1000000000 has no unit"),
    ("tune", {"minutes": "many"}, "minutes", "got 'many'"),
    ("tune", {"threads": 0}, "threads", "got 0"),
    ("tune", {"ranks": 3}, "ranks", "unknown key"),
]


@pytest.mark.parametrize(("function", "arguments", "parameter", "said"), REFUSED)
def test_a_bad_argument_is_one_line_that_names_the_parameter(
    images, tmp_path, function, arguments, parameter, said
) -> None:
    method = {"method": "lora"} if function == "train" else {}
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        getattr(peft_vit, function)(**{"images": images, "output": tmp_path / "out", **method, **arguments})
    assert caught.value.field == parameter
    assert not list(tmp_path.iterdir())


def test_tune_takes_times_sizes_and_single_values_as_the_command_does(tmp_path) -> None:
    given = {"max_bytes": "16MB", "max_latency": "50ms", "image_sizes": 28, "models": "test_vit"}
    request = TuneRequest.of(images="photos", output=tmp_path, **given)
    assert (request.max_bytes, request.max_latency) == (16_000_000, 0.05)
    assert (request.image_sizes, request.models, request.images) == ((28,), ("test_vit",), Path("photos"))
