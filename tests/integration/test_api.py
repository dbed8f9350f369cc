"""Functions for Python: models that predict, pages that show themselves, one line for a fault."""

import numpy as np
import pytest
from PIL import Image

import peft_vit
from peft_vit.errors import UserError

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
    with pytest.raises(UserError, match="max_bytes: '20' is not a size"):
        peft_vit.tune(images, max_bytes="20", output=tmp_path)
    with pytest.raises(UserError, match=r"--model: .*'no_such_model'"):
        peft_vit.tune(images, models="no_such_model", output=tmp_path)
    assert not list(tmp_path.iterdir())
