"""On models of timm's Eva class every method trains, comes back, merges, and goes to ONNX and to PEFT."""

import warnings

import pytest
import timm
import torch
from tiny_models import TINY_EVAS
from torch import nn

from peft_vit.backbones import load_backbone
from peft_vit.config import BackboneConfig
from peft_vit.deployment import export_onnx, load_low_bit, merge, open_onnx, save_low_bit
from peft_vit.runs.export import restore_run

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.parametrize(
        "model", [TINY_EVAS[0], *(pytest.param(one, marks=pytest.mark.slow) for one in TINY_EVAS[1:])]
    ),
]

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(IMAGES)


@pytest.mark.parametrize(
    "name", ["linear", "lora", "adaptive", "theirs", "theirs_adaptive", "int4", "int4_adaptive", "mixed"]
)
def test_a_run_comes_back_and_its_merged_model_computes_the_same_here_and_from_a_file(
    run_of, model, tmp_path, name
) -> None:
    run = restore_run(run_of(name, model))
    expected = logits(run.model)
    merged = merge(run.model, run.card)
    tolerance = {"float": 1e-5, "offsets": 2e-2}[merged.how]  # offsets are rounded to float16
    torch.testing.assert_close(logits(merged.model), expected, rtol=0, atol=tolerance)
    save_low_bit(merged.model, tmp_path / "model.safetensors", run.card)
    loaded, _ = load_low_bit(tmp_path / "model.safetensors")
    assert torch.equal(logits(loaded), logits(merged.model))


@pytest.mark.parametrize("name", ["adaptive", "int4"])
def test_onnxruntime_computes_the_same(run_of, model, tmp_path, name) -> None:
    pytest.importorskip("onnxscript")
    run = restore_run(run_of(name, model))
    merged = merge(run.model, run.card)
    export_onnx(merged.model, tmp_path / "model.onnx", run.card)
    predict, _ = open_onnx(tmp_path / "model.onnx")
    torch.testing.assert_close(predict(IMAGES), logits(merged.model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "lora", "adaptive", "theirs", "theirs_adaptive"])
def test_peft_loads_an_export_over_the_plain_model(run_of, model, tmp_path, command, name) -> None:
    run_dir = run_of(name, model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        command("export", run_dir, "--format", "peft", "--output", tmp_path / "out")
    assert any("qkv_bias_separate" in str(one.message) for one in caught) == (model == "tiny_eva02_fused")
    start = load_backbone(BackboneConfig(model=model, weights="random"), image_size=32, num_classes=3, seed=1)
    plain = timm.create_model(model, img_size=32, num_classes=3)
    plain.load_state_dict(start.model.state_dict())
    if model == "tiny_eva02_fused":  # docs/methods.md: timm would go past PEFT's layer
        for block in plain.blocks:
            block.attn.qkv_bias_separate = True
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    torch.testing.assert_close(logits(theirs), logits(restore_run(run_dir).model), rtol=0, atol=1e-5)
