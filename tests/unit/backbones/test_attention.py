"""The two ways through attention compute the same, and the choice follows device and length."""

import timm
import torch
from torch import nn

from peft_vit.core.backbones import choose_attention


def vit(image_size: int) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=image_size, depth=2, num_classes=3)
    return model


def test_same_logits_and_gradients() -> None:
    model, images = vit(48), torch.randn(2, 3, 48, 48)
    results = []
    for plain in (False, True):
        if plain:
            assert choose_attention(model, torch.device("cpu"), "bf16")
        assert all(block.attn.fused_attn is not plain for block in model.blocks)
        model.zero_grad()
        logits = model(images)
        logits.square().sum().backward()
        results.append((logits.detach(), model.blocks[0].attn.qkv.weight.grad.clone()))
    for fused, unfused in zip(*results, strict=True):
        torch.testing.assert_close(fused, unfused, rtol=1e-4, atol=1e-6)


def test_long_sequences_and_other_devices_stay_fused() -> None:
    assert choose_attention(vit(272), torch.device("cpu"), "bf16")  # 17 x 17 patches and a class token
    long = vit(288)  # 18 x 18
    for model, device, precision in ((long, "cpu", "bf16"), (vit(48), "meta", "bf16"), (vit(48), "cpu", "fp32")):
        assert not choose_attention(model, torch.device(device), precision)
        assert all(block.attn.fused_attn for block in model.blocks)
