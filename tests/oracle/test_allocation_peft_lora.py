"""The controller on a model that PEFT has wrapped with LoRA keeps its budget there, and PEFT loads what comes out."""

from functools import partial

import pytest
import torch
from allocation_runs import train

from peft_vit import AdaLoraConfig, AdaLoRAController
from peft_vit.base.errors import UserError
from peft_vit.core.adapters import current_ranks, site_adapters

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.part("controller")

STEPS = 12
TARGETS = ["qkv", "attn.proj", "fc1", "fc2"]


settings = partial(
    AdaLoraConfig,
    total_rank_budget=20,
    initial_budget=32,
    minimum_rank=1,
    allocation_strategy="proportional",
    importance_metric="sensitivity",
    warmup_steps=2,
    update_frequency=2,
    final_steps=3,
)


def wrapped(base, targets=TARGETS, **options):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, modules_to_save=["head"], **options)
    return peft.get_peft_model(base, config)


def run(model, config, batch, seed=0):
    controller = AdaLoRAController(model, config, STEPS, seed=seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    controller.attach(model, optimizer)
    train(model, controller, optimizer, batch, range(1, STEPS + 1))
    return controller


@pytest.mark.parametrize("strategy", ["proportional", "threshold", "top_k", "global"])
def test_ranks_follow_the_budget_and_peft_loads_them(tiny_vit, batch, tmp_path, strategy) -> None:
    model = wrapped(tiny_vit(), lora_dropout=0.1)
    controller = run(model, settings(allocation_strategy=strategy), batch)
    assert controller.names[:4] == ("blocks.0.attn.qkv", "blocks.0.attn.out", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2")
    fused = sum(rank for name, rank in controller.ranks.items() if name.endswith("qkv"))
    assert controller.get_layer_importance_summary()["qkv"]["rank"] == fused
    assert controller.ranks == current_ranks(model)
    assert sum(controller.ranks.values()) == 20
    assert min(controller.ranks.values()) >= 1
    assert len(set(controller.ranks.values())) > 1
    for entry in controller.rank_history:
        assert sum(entry["ranks"].values()) <= entry["budget"]
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_vit(), tmp_path)
    assert current_ranks(loaded) == controller.ranks
    model.eval(), loaded.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch[0]), model(batch[0]), rtol=0, atol=1e-6)


def test_growth_follows_from_the_seed(tiny_vit, batch) -> None:
    def values(seed):
        torch.manual_seed(3)  # of PEFT's start
        model = wrapped(tiny_vit())
        run(model, settings(), batch, seed=seed)
        return torch.cat([adapter.lora_A.detach().flatten() for adapter in site_adapters(model).values()])

    first = values(0)
    torch.rand(1)
    assert torch.equal(values(0), first)
    assert not torch.equal(values(1), first)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"minimum_rank": 0}, "adalora.minimum_rank"),
        ({"parametrization": "svd"}, "adalora.parametrization"),
        ({"targets": ("query", "key", "value")}, "adalora.targets"),
        ({"scale": 1.0}, "adalora.scale"),
        ({"initial_budget": 31}, "adalora.initial_budget"),  # 8 layers of rank 4
        ({"initial_budget": None, "budget_schedule": "constant"}, "adalora.total_rank_budget"),
    ],
)
def test_settings_that_peft_can_not_follow_are_refused(tiny_vit, changes, field) -> None:
    with pytest.raises(UserError, match=f"^{field}: "):
        AdaLoRAController(wrapped(tiny_vit()), settings(**changes), STEPS)


def test_settings_that_say_what_peft_has_done_are_fine(tiny_vit) -> None:
    config = settings(targets=("query", "key", "value"), scale=2.0, total_rank_budget=6, initial_budget=8)
    controller = AdaLoRAController(wrapped(tiny_vit(), targets=["qkv"]), config, STEPS)
    assert controller.ranks == {"blocks.0.attn.qkv": 4, "blocks.1.attn.qkv": 4}


def test_costs_are_those_of_the_fused_matrix(tiny_vit) -> None:
    config = settings(total_rank_budget=None, total_parameter_budget=4096, initial_budget=8192)
    controller = AdaLoRAController(wrapped(tiny_vit()), config, STEPS)
    assert dict(zip(controller.names, controller.costs, strict=True))["blocks.1.attn.qkv"] == 64 + 192
