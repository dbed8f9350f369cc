"""What is asked for is checked with the names of the images, before one is opened."""

import pytest
from PIL import Image

from peft_vit.base.errors import UserError
from peft_vit.core.config import named_as_typed
from peft_vit.fit.request import TrainRequest, check_images


@pytest.mark.parametrize(
    ("asked", "field", "message"),
    [
        ({"metric": "mae"}, "--metric", "mae is not a metric of classification"),
        ({"shots": 6}, "--shots", "6 are too many: class 'a' has 6 images"),
        ({"test_images": 11}, "--test-images", "11 are too many: there are 12 images"),
        ({"output": "x" * 300}, None, "can't be a folder (File name too long); choose another --output"),
        ({"images": "nowhere"}, None, "does not exist"),
        ({"group": "(x)"}, "--group", "'(x)' is not a column"),
    ],
)
def test_refused_before_an_image_is_opened(tmp_path, asked, field, message):
    for i in range(12):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[i % 2] / f"{i}.png").write_bytes(b"not opened")
    with pytest.raises(UserError) as refused, named_as_typed(TrainRequest):
        check_images(TrainRequest.of(**{"images": tmp_path, **asked}), str)
    assert (refused.value.field, refused.value.message.startswith(message)) == (field, True)


def test_the_digits_are_images_by_name_where_no_file_is_called_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_VIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    found = TrainRequest.of(images="digits").found
    assert (found.path, len(found.classes)) == (tmp_path / "cache" / "digits", 1797)
    assert found.classes["7/0007.png"] == "7"
    assert Image.open(found.path / "7" / "0007.png").getextrema() == (0, 255)
    for name in "ab":
        (tmp_path / "digits" / name).mkdir(parents=True)
        (tmp_path / "digits" / name / "1.png").touch()
    assert list(TrainRequest.of(images="digits").found.classes) == ["a/1.png", "b/1.png"]
