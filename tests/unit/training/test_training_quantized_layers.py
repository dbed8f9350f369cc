"""Which layers QALoRATrainer quantizes, in which formats, under which adapters: new ones or those that are there."""

import allocation_runs
import pytest
import torch
from qa_lora_settings import config

from peft_vit import AdaLoRAController, QALoRATrainer
from peft_vit.base.errors import SilentNoEffectWarning
from peft_vit.core.adapters import adapted_modules, attach_adapters, current_ranks, site_adapters
from peft_vit.core.backbones import find_sites
from peft_vit.core.training.quantized_layers import format_of

pytestmark = pytest.mark.part("trainer")


def with_adapters(model, *, rank: int = 2, pool: int = 16, scale: float = 2.0, targets=("query", "fc1")):
    attach_adapters(model, find_sites(model, targets), rank, scale=scale, seed=0, pool=pool)
    return model


def test_formats_and_ranks_can_be_given_by_name(tiny_vit) -> None:
    model, settings = tiny_vit(), config(targets=("query", "fc1"))
    ranks = {"blocks.0.attn.query": 0, "blocks.0.mlp.fc1": 1, "blocks.1.attn.query": 2, "blocks.1.mlp.fc1": 3}
    formats = {"blocks.1.mlp.fc1": format_of(settings, "int2")}
    trainer = QALoRATrainer(model, settings, 8, ranks=ranks, formats=formats)
    assert current_ranks(model) == ranks
    types = {name: module.quantized.format.type for name, module in adapted_modules(model)}
    expected = dict.fromkeys(("blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.attn.qkv"), "nf4")
    assert types == expected | {"blocks.1.mlp.fc1": "int2"}
    assert trainer.relative_error["blocks.1.mlp.fc1"] > 2 * trainer.relative_error["blocks.0.mlp.fc1"]
    assert trainer.bits_history[0]["bits_per_weight"]["blocks.1.mlp.fc1"] == 2 + 32 / 16


def test_adapters_that_are_there_are_taken_as_they_are(tiny_vit, batch, fill_adapters) -> None:
    model, fresh = with_adapters(tiny_vit()), tiny_vit()
    fill_adapters(model)
    before = {name: (adapter.lora_A, adapter.lora_A.clone()) for name, adapter in site_adapters(model).items()}
    QALoRATrainer(model, config(), 8)
    for name, adapter in site_adapters(model).items():
        assert adapter.lora_A is before[name][0]
        assert torch.equal(adapter.lora_A, before[name][1])
    QALoRATrainer(fresh, config(targets=("query", "fc1"), rank=2), 8)
    fill_adapters(fresh)
    with torch.no_grad():
        assert torch.equal(model(batch[0]), fresh(batch[0]))  # as if the trainer had attached them


def test_adapters_that_are_not_pooled_leave_groups_to_storage_and_it_is_said(tiny_vit) -> None:
    with pytest.warns(SilentNoEffectWarning, match="groups of 16 serve storage alone"):
        QALoRATrainer(with_adapters(tiny_vit(), pool=1), config(), 8)
    QALoRATrainer(with_adapters(model := tiny_vit(), pool=1), config(quantization_offset=False), 8)
    assert all(module.quantized.offsets is None for _, module in adapted_modules(model))


def test_the_controllers_adapters_are_pooled_over_the_groups(tiny_vit) -> None:
    controller = AdaLoRAController(model := tiny_vit(), allocation_runs.config(), 8, pool=16)
    assert {adapter.pool for adapter in site_adapters(model).values()} == {16}
    assert controller.bounds.maximum.tolist() == [4, 4, 4, 4, 4, 8] * 2  # 64 / 16 and 128 / 16 groups
