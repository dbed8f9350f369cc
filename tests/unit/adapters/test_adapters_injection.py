"""Adapters sit on the sites of plain timm Vision Transformers, once, and start from the run's seed alone."""

import allocation_runs
import pytest
import qa_lora_settings
import torch
from torch import nn

from peft_vit import AdaLoRAController, QALoRATrainer
from peft_vit.adapters import attach_adapters, current_ranks, freeze_backbone, site_adapters
from peft_vit.backbones import find_sites
from peft_vit.errors import UserError


def attach(model: nn.Module, rank: int = 2, seed: int = 0, targets=("query", "fc2")) -> nn.Module:
    attach_adapters(model, find_sites(model, targets), rank, scale=2.0, seed=seed)
    return model


@pytest.mark.part("controller")
def test_other_classes_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(UserError, match="Sequential is no model of timm"):
        AdaLoRAController(model, allocation_runs.config(), 10)
    with pytest.raises(UserError, match="Sequential is no model of timm"):
        QALoRATrainer(model, qa_lora_settings.config(rank=1), 10)


def test_only_head_and_adapters_are_trainable_and_listed_in_order(tiny_vit) -> None:
    model = attach(tiny_vit())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    factors = ("lora_A", "lora_B")
    sites = ("attn.qkv.sites.query", "mlp.fc2.sites.fc2")
    expected = {f"blocks.{i}.{site}.{factor}" for i in range(2) for site in sites for factor in factors}
    assert trainable == expected | {"head.weight", "head.bias"}
    names = ["blocks.0.attn.query", "blocks.0.mlp.fc2", "blocks.1.attn.query", "blocks.1.mlp.fc2"]
    assert current_ranks(model) == dict.fromkeys(names, 2)
    assert list(current_ranks(model)) == names


def test_attaching_twice_and_a_missing_head_are_refused(tiny_vit) -> None:
    with pytest.raises(UserError, match="attach once"):
        attach(attach(tiny_vit()))
    with pytest.raises(UserError, match="no linear classification head"):
        freeze_backbone(tiny_vit(num_classes=0))


def test_the_start_follows_from_seed_and_site_alone(tiny_vit) -> None:
    few, all_sites = (
        attach(tiny_vit()),
        attach(tiny_vit(seed=5), targets=("query", "key", "value", "out", "fc1", "fc2")),
    )
    other = attach(tiny_vit(), seed=1)
    for name, adapter in site_adapters(few).items():
        assert torch.equal(adapter.lora_A, site_adapters(all_sites)[name].lora_A)
        assert not torch.equal(adapter.lora_A, site_adapters(other)[name].lora_A)
        assert adapter.lora_A.abs().max() <= adapter.in_features**-0.5
    first, second = (site_adapters(few)[f"blocks.{i}.attn.query"].lora_A for i in (0, 1))
    assert not torch.equal(first, second)
