"""Three sites compute what PEFT's LoRA does on the fused matrix, gradients too; the rest: test_adapters_peft_format."""

import pytest
import torch
from torch.nn import functional as F

from peft_vit.adapters import attach_adapters, site_adapters
from peft_vit.backbones import find_sites

peft = pytest.importorskip("peft")

RANK, SCALE, TOLERANCE = 3, 1.5, 1e-5


def gradients_of(model, batch):
    logits = model(batch[0])
    F.cross_entropy(logits, batch[1]).backward()
    return logits


def test_query_key_value_equal_a_block_diagonal_lora_on_the_fused_matrix(tiny_vit, batch, fill_adapters) -> None:
    ours = tiny_vit()
    attach_adapters(ours, find_sites(ours, ("query", "key", "value")), RANK, scale=SCALE, seed=0)
    fill_adapters(ours)
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
