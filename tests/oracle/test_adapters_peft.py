"""Logits and gradients equal PEFT's LoRA with the same factors, on separate and on fused matrices."""

import pytest
import torch
from torch.nn import functional as F

from peft_vit.adapters import attach_adapters, site_adapters
from peft_vit.backbones import find_sites

peft = pytest.importorskip("peft")

MODULES = {"out": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
RANK, SCALE, TOLERANCE = 3, 1.5, 1e-5


def pair(tiny_vit, fill_adapters, targets):
    """Return our model with random factors, and PEFT's LoRA on the same backbone."""
    ours = tiny_vit()
    sites = find_sites(ours, targets)
    attach_adapters(ours, sites, dict.fromkeys((site.name for site in sites), RANK), scale=SCALE, seed=0)
    fill_adapters(ours)
    return ours


def gradients_of(model, batch):
    logits = model(batch[0])
    F.cross_entropy(logits, batch[1]).backward()
    return logits


def test_lora_on_separate_matrices(tiny_vit, batch, fill_adapters) -> None:
    ours = pair(tiny_vit, fill_adapters, tuple(MODULES))
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=SCALE * RANK,
        lora_dropout=0.0,
        bias="none",
        target_modules=r".*(attn\.proj|mlp\.fc[12])",
        modules_to_save=["head"],
    )
    theirs = peft.get_peft_model(tiny_vit(), config)
    layers = {}
    with torch.no_grad():
        for name, adapter in site_adapters(ours).items():
            _, block, _, matrix = name.split(".")
            layers[name] = theirs.base_model.model.get_submodule(f"blocks.{block}.{MODULES[matrix]}")
            layers[name].lora_A.default.weight.copy_(adapter.lora_A)
            layers[name].lora_B.default.weight.copy_(adapter.lora_B)
    torch.testing.assert_close(gradients_of(ours, batch), gradients_of(theirs, batch), rtol=0, atol=TOLERANCE)
    for name, adapter in site_adapters(ours).items():
        for factor in ("lora_A", "lora_B"):
            expected = getattr(layers[name], factor).default.weight.grad
            assert expected.abs().max() > 1e-4
            torch.testing.assert_close(getattr(adapter, factor).grad, expected, rtol=0, atol=TOLERANCE)
    head = theirs.base_model.model.head.modules_to_save.default
    torch.testing.assert_close(ours.head.weight.grad, head.weight.grad, rtol=0, atol=TOLERANCE)


def test_query_key_value_equal_a_block_diagonal_lora_on_the_fused_matrix(tiny_vit, batch, fill_adapters) -> None:
    ours = pair(tiny_vit, fill_adapters, ("query", "key", "value"))
    config = peft.LoraConfig(r=3 * RANK, lora_alpha=SCALE * 3 * RANK, lora_dropout=0.0, target_modules=r".*attn\.qkv")
    theirs = peft.get_peft_model(tiny_vit(), config)
    adapters = site_adapters(ours)
    with torch.no_grad():
        for block in range(2):
            three = [adapters[f"blocks.{block}.attn.{matrix}"] for matrix in ("query", "key", "value")]
            layer = theirs.base_model.model.blocks[block].attn.qkv
            layer.lora_A.default.weight.copy_(torch.cat([adapter.lora_A for adapter in three]))
            layer.lora_B.default.weight.copy_(torch.block_diag(*(adapter.lora_B for adapter in three)))
    torch.testing.assert_close(gradients_of(ours, batch), gradients_of(theirs, batch), rtol=0, atol=TOLERANCE)
    for block in range(2):
        layer = theirs.base_model.model.blocks[block].attn.qkv
        for index, matrix in enumerate(("query", "key", "value")):
            adapter, span = adapters[f"blocks.{block}.attn.{matrix}"], slice(index * RANK, (index + 1) * RANK)
            rows = slice(64 * index, 64 * (index + 1))
            expected = layer.lora_B.default.weight.grad[rows, span]
            torch.testing.assert_close(
                adapter.lora_A.grad, layer.lora_A.default.weight.grad[span], rtol=0, atol=TOLERANCE
            )
            torch.testing.assert_close(adapter.lora_B.grad, expected, rtol=0, atol=TOLERANCE)
