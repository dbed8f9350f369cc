"""Which layers QALoRATrainer quantizes, in which formats, under which adapters: new ones or those that are there."""

import pytest
import torch
from qa_lora_settings import config

from peft_vit import AdaLoraConfig, AdaLoRAController, QALoRATrainer
from peft_vit.adapters import adapted_modules, attach_adapters, current_ranks, site_adapters
from peft_vit.backbones import describe, find_sites
from peft_vit.config import BackboneConfig
from peft_vit.errors import SilentNoEffectWarning, UserError
from peft_vit.training.quantized_layers import check_ranks, format_of

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


def test_adaptive_bits_need_formats(tiny_vit) -> None:
    from_measurement = {"quantization_bits": None, "quantization_type": None}
    settings = config(**from_measurement, rank=2, adaptive_bits={"average_bits": 5.0})
    with pytest.raises(UserError, match=r"qa_lora\.adaptive_bits: .* give them as `formats`"):
        QALoRATrainer(tiny_vit(), settings, 8)
    model = tiny_vit()
    names = {site.module for site in find_sites(model)}
    QALoRATrainer(model, settings, 8, formats={name: format_of(settings, "int4") for name in names})
    assert {module.quantized.format.type for _, module in adapted_modules(model)} == {"int4"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"formats": {"blocks.9.attn.qkv": None}}, r"formats: there is no adapted layer blocks\.9\.attn\.qkv"),
        ({"ranks": {"blocks.0.attn.query": 1}}, r"ranks: ranks and the model's sites differ at blocks\.0\.attn\.key"),
        (
            {"formats": {"blocks.0.mlp.fc1": format_of(config(group_size=8))}},
            r"formats\[blocks\.0\.mlp\.fc1\]: groups of 8, but its adapters pool 16 inputs",
        ),
    ],
)
def test_names_and_groups_that_do_not_fit_are_refused(tiny_vit, given, message) -> None:
    with pytest.raises(UserError, match=message):
        QALoRATrainer(tiny_vit(), config(rank=None if "ranks" in given else 2), 8, **given)


def test_adapters_that_are_there_are_taken_as_they_are(tiny_vit, batch, fill_adapters) -> None:
    model, fresh = with_adapters(tiny_vit()), tiny_vit()
    fill_adapters(model)
    before = {name: (one.lora_A, one.lora_A.clone()) for name, one in site_adapters(model).items()}
    QALoRATrainer(model, config(), 8)
    for name, adapter in site_adapters(model).items():
        assert adapter.lora_A is before[name][0]
        assert torch.equal(adapter.lora_A, before[name][1])
    QALoRATrainer(fresh, config(targets=("query", "fc1"), rank=2), 8)
    fill_adapters(fresh)
    with torch.no_grad():
        assert torch.equal(model(batch[0]), fresh(batch[0]))  # as if the trainer had attached them


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({"group_size": 32}, {}, r"qa_lora\.group_size: the model's adapters pool 16 inputs, .* groups of 32"),
        ({"rank": 3}, {}, r"qa_lora\.rank: the model's adapters have ranks of their own"),
        ({"scale": 1.0}, {}, r"qa_lora\.scale: the model's adapters have 2\.0"),
        ({"targets": ("query",)}, {}, r"qa_lora\.targets: adapters are on fc1, query"),
        ({}, {"ranks": {}}, r"ranks: the model carries adapters, whose ranks stay"),
    ],
)
def test_settings_that_contradict_the_adapters_are_refused(tiny_vit, settings, given, message) -> None:
    with pytest.raises(UserError, match=message):
        QALoRATrainer(with_adapters(tiny_vit()), config(**settings), 8, **given)


def test_a_model_is_quantized_once(tiny_vit) -> None:
    QALoRATrainer(model := tiny_vit(), config(rank=1), 8)
    with pytest.raises(UserError, match="quantized already"):
        QALoRATrainer(model, config(), 8)


def test_adapters_that_are_not_pooled_leave_groups_to_storage_and_it_is_said(tiny_vit) -> None:
    with pytest.warns(SilentNoEffectWarning, match="groups of 16 serve storage alone"):
        QALoRATrainer(with_adapters(tiny_vit(), pool=1), config(), 8)
    QALoRATrainer(with_adapters(model := tiny_vit(), pool=1), config(quantization_offset=False), 8)
    assert all(module.quantized.offsets is None for _, module in adapted_modules(model))


def test_the_controllers_adapters_are_pooled_over_the_groups(tiny_vit) -> None:
    settings = AdaLoraConfig(
        total_rank_budget=20,
        allocation_strategy="proportional",
        importance_metric="gradient_norm",
        warmup_steps=2,
        update_frequency=2,
        final_steps=2,
    )
    controller = AdaLoRAController(model := tiny_vit(), settings, 8, pool=16)
    assert {one.pool for one in site_adapters(model).values()} == {16}
    assert controller.bounds.maximum.tolist() == [4, 4, 4, 4, 4, 8] * 2  # 64 / 16 and 128 / 16 groups


@pytest.mark.parametrize(
    ("name", "group", "remedy"),
    [
        ("swin_tiny_patch4_window7_224", 64, "64 does not divide the 96 inputs .*; use one of 2, 3, 4, .*, 48, 96$"),
        ("vit_so400m_patch14_siglip_224", 32, "32 does not divide the 4304 inputs .*; use one of 2, 4, 8, 16$"),
    ],
)
def test_groups_that_do_not_divide_are_refused_with_those_that_divide_all_sites(name, group, remedy) -> None:
    sites = describe(BackboneConfig(model=name, weights="random"), 224).sites
    with pytest.raises(UserError, match=remedy) as caught:
        check_ranks(sites, 0, group)
    for size in map(int, caught.value.message.rpartition("use one of ")[2].split(", ")):
        check_ranks(sites, 1, size)
