"""Functions for Python: models that predict, pages that show themselves, one line for a fault."""

import inspect
import pickle
import re

import numpy as np
import pytest
from PIL import Image
from torch import nn

import peft_vit
from peft_vit.base.errors import UserError
from peft_vit.base.settings import Request
from peft_vit.fit.request import TrainRequest, TuneRequest

SETTINGS = {"model": "test_vit", "image_size": 32, "threads": 1, "precision": "fp32", "device": "cpu"}


@pytest.mark.usefixtures("in_this_process", "cache")
def test_train_returns_a_model_and_a_report(images, weights, tmp_path) -> None:
    asked = {"output": tmp_path, "weights": str(weights), **SETTINGS}
    trained = peft_vit.train(str(images), "linear", **asked)
    assert trained.path == tmp_path / "0001-linear-32px-test-vit"
    assert trained.record.test is not None
    assert trained.record.spec.experiment.method == "linear"
    array = np.asarray(Image.open(images / "class_1" / "00.png"))
    by_array, by_path = trained.predict([array, images / "class_1" / "00.png"])
    assert (by_array.class_name, by_array.probability) == (by_path.class_name, by_path.probability)
    assert by_path.class_name in trained.record.class_names
    with pytest.raises(UserError, match="coverage"):  # so few images validate
        trained.predict(array, coverage=0.99)
    assert peft_vit.train(images, "linear", **asked) == trained  # which is not done again
    assert trained.report.path == trained.path / "report" / "report.html"
    assert "linear" in trained.report.path.read_text()
    (allowed,) = re.findall(r'^<iframe srcdoc="[^"]*" sandbox="([^"]*)"', trained._repr_html_())
    assert "allow-same-origin" not in allowed.split()  # with it a page could run cells
    first, test, size = repr(trained).splitlines()
    assert first == "linear on test_vit, 32 px, 3 classes: class_0, class_1, class_2"
    assert test.startswith("Test accuracy ")
    assert size.endswith(f" MB beside the backbone: {trained.path}")

    loaded = peft_vit.load(tmp_path / "latest")
    assert isinstance(loaded.model, nn.Module)
    assert loaded.record == trained.record
    probabilities = loaded.predict_proba(images / "class_1")
    assert probabilities.shape == (16, len(loaded.classes))
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
    assert probabilities[0].max() == pytest.approx(by_path.probability, abs=1e-5)  # of another batch
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(loaded)).predict_proba(array), loaded.predict_proba(array))

    with pytest.raises(UserError, match=r"0002-full-.*: DivergedError: the loss is nan at step"):
        peft_vit.train(images, "full", **asked, steps=20, learning_rate=1e30)
    (failed,) = tmp_path.glob("0002-*")
    assert peft_vit.load_results(failed).runs["state"].tolist() == ["failed"]
    assert peft_vit.load(tmp_path / "latest").record == trained.record  # the last that finished


@pytest.mark.usefixtures("in_this_process", "cache")
def test_train_takes_images_that_no_file_holds(tmp_path, weights) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    asked = {"output": tmp_path, "weights": str(weights), **SETTINGS}
    trained = peft_vit.train(pixels, "linear", labels=["cat", "dog"] * 12, test_images=6, **asked)
    assert trained.classes == ("cat", "dog")
    assert trained.record.split_sizes == {"train": 15, "validation": 3, "test": 6}
    with pytest.raises(UserError, match=r"^images: holds one class alone, 'cat'"):
        peft_vit.train(pixels, "linear", labels=["cat"] * 24, **asked)


@pytest.mark.usefixtures("cache")
def test_an_exported_file_is_loaded(run_of, tmp_path) -> None:
    from peft_vit.deploy.export import export_run_to_file

    file = tmp_path / "model.safetensors"
    export_run_to_file(run_of("linear"), file, "safetensors")
    loaded = peft_vit.load(str(file))
    assert isinstance(loaded.model, nn.Module)
    assert loaded.record is None
    assert loaded._repr_html_() is None
    first, size = repr(loaded).splitlines()
    assert first == "test_vit, 32 px, 3 classes: class_0, class_1, class_2"
    assert size.endswith(f" MB: {file}")
    with pytest.raises(UserError, match="is an exported model, without a report; load its run"):
        loaded.report  # noqa: B018
    with pytest.raises(UserError, match="or a run's folder"):
        peft_vit.load(tmp_path / "nothing")


REFUSED = [  # the function, its arguments, the parameter that is named, and a part of what is said
    ("train", {"method": "lorra"}, "method", "should be 'linear', "),
    ("train", {"method": "linear", "rank": 8}, "rank", "has no effect with method linear; leave it out; "),
    ("train", {"init_adapter": "adapter", "rank": 8}, "rank", "has no effect with init_adapter; "),
    ("train", {"images": ["a.png"]}, "labels", "are missing, the first at 0; give one for each image"),
    ("train", {"images": ["a.png"], "labels": [1], "rank": 0}, "rank", "got 0"),  # nothing is written before
    ("tune", {"max_bytes": "20"}, "max_bytes", "'20' is not a size above 0 with its unit"),
    ("tune", {"max_latency": "50"}, "max_latency", "is not a time above 0 with its unit, ms, s, min; write it as"),
    ("tune", {"max_latency": [1]}, "max_latency", "number, got [1]"),
    ("tune", {"image_size": (0,)}, "image_size", "should be greater than or equal to 14, got 0"),
    ("tune", {"model": 3}, "model", "string, got 3"),
    ("tune", {"model": ""}, "model", "is empty"),
    ("tune", {"executor": "spark"}, "executor", "should be 'local' or 'ray', got 'spark'"),
    ("tune", {"memory_limit": 10**9}, "memory_limit", "1000000000 has no unit"),
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


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: peft_vit.train("photos", lr=1e-3), "train() has no argument lr; did you mean learning_rate?"),
        (lambda: peft_vit.train("photos", ranks=8), "train() has no argument ranks; did you mean rank?"),
        (lambda: peft_vit.tune("photos", max_latency_ms=5), "tune() has no argument max_latency_ms; did you mean max"),
        (lambda: peft_vit.ViTClassifier(bs=8), "ViTClassifier() has no argument bs; did you mean batch_size?"),
        (lambda: peft_vit.tune("photos", xyz=5), "tune() has no argument xyz; it has images, labels, margin, "),
    ],
)
def test_an_unknown_argument_names_the_nearest(call, said) -> None:
    with pytest.raises(TypeError, match=re.escape(said)):
        call()


@pytest.mark.parametrize(("function", "request_type"), [(peft_vit.train, TrainRequest), (peft_vit.tune, TuneRequest)])
def test_arguments_are_the_options_of_the_command(function, request_type: type[Request]) -> None:
    parameters = inspect.signature(function).parameters
    options = {request_type.parameter(field): field for field in request_type.model_fields}
    assert parameters.keys() - {"tell"} == options.keys() | {"labels"}
    given = {options[name]: value.default for name, value in parameters.items() if name in options}
    assert request_type(**given | {"images": "photos"}) == request_type(images="photos")  # the same defaults
    arguments = function.__doc__.partition("Args:")[2].partition("Returns:")[0]
    described = re.findall(r"^        (\w+): ", arguments, re.MULTILINE)
    assert described == list(parameters)


def test_the_classifier_has_what_train_has() -> None:
    ours, others = (set(inspect.signature(f).parameters) for f in (peft_vit.ViTClassifier, peft_vit.train))
    of_train = {"images", "labels", "group", "from_run", "seed", "task", "loss", "strict", "smoke", "executor"}
    assert others - ours == of_train
    assert ours - others == {"random_state", "verbose"}


def test_the_package_shows_what_it_has() -> None:
    names = dir(peft_vit)
    assert {"train", "tune", "load", "ViTClassifier", "integrations"} <= set(names)
    assert all(getattr(peft_vit, name) for name in names)
