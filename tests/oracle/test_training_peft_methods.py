"""PEFT's methods in our loop compute what PEFT computes in a loop of its own, and LoRA what our LoRA computes."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from peft_vit.core.adapters import attach_adapters, merged_state_dict, site_adapters
from peft_vit.core.adapters.peft_format import export_peft, import_peft
from peft_vit.core.adapters.peft_layers import peft_factors, peft_layers, peft_ranks
from peft_vit.core.adapters.peft_tuner import attach_peft_lora
from peft_vit.core.backbones import find_sites
from peft_vit.core.config import PeftAdaLoraConfig, PeftLoraConfig
from peft_vit.core.training import PeftAdaLoraHook, optimization_step

peft = pytest.importorskip("peft")

MODULES = {"out": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
STEPS, LAST = 8, 6
ADALORA = PeftAdaLoraConfig(
    initial_rank=4, target_rank=2, warmup_steps=1, update_frequency=2, final_steps=STEPS - LAST, beta1=0.8, beta2=0.9
)


def optimizer_of(model, rate=0.02):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)


def train(model, batch, steps=5, hooks=(), watch=lambda: None):
    """Return the loss of each step in our loop."""
    optimizer, losses = optimizer_of(model), []
    for step in range(1, steps + 1):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        losses.append(optimization_step(model, optimizer, loss, step, hooks=hooks, clip_norm=1.0).loss)
        watch()
    return torch.tensor(losses)


def test_lora_of_both_learns_alike_from_the_same_start(tiny_vit, batch) -> None:
    ours, theirs = tiny_vit(), tiny_vit()
    attach_adapters(ours, find_sites(ours, tuple(MODULES)), 3, scale=1.5, seed=0)
    attach_peft_lora(theirs, PeftLoraConfig(rank=3, scale=1.5, targets=tuple(MODULES)), seed=0)
    layers = peft_layers(theirs)
    with torch.no_grad():
        for name, adapter in site_adapters(ours).items():
            _, block, _, matrix = name.split(".")
            layer = layers[f"blocks.{block}.{MODULES[matrix]}"]
            layer.lora_A.default.weight.copy_(adapter.lora_A)
            layer.lora_B.default.weight.copy_(adapter.lora_B)
    losses = train(ours, batch)
    assert losses[0] - losses[-1] > 0.1
    torch.testing.assert_close(train(theirs, batch), losses, rtol=0, atol=1e-5)


def test_lora_on_the_fused_matrix_learns_alike_too(tiny_vit, batch, tmp_path) -> None:
    theirs, ours = tiny_vit(), tiny_vit()
    attach_peft_lora(theirs, PeftLoraConfig(rank=3, scale=1.5), seed=0)
    assert peft_ranks(theirs)["blocks.1.attn.qkv"] == 3
    export_peft(theirs, tmp_path, {})
    import_peft(ours, tmp_path)
    losses = train(ours, batch)
    assert losses[0] - losses[-1] > 0.1
    torch.testing.assert_close(train(theirs, batch), losses, rtol=0, atol=1e-5)


def test_only_the_wanted_modules_are_adapted_and_the_head_is_trained_as_it_is(tiny_vit) -> None:
    model = tiny_vit(depth=12)  # blocks.1 is the end of blocks.11: names must be whole
    attach_peft_lora(model, PeftLoraConfig(rank=2, targets=("out", "fc1")), seed=0)
    wanted = {f"blocks.{block}.{name}" for block in range(12) for name in ("attn.proj", "mlp.fc1")}
    assert set(peft_layers(model)) == wanted
    assert type(model.patch_embed.proj) is torch.nn.Conv2d
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors = {f"{name}.lora_{factor}.default.weight" for name in wanted for factor in "AB"}
    assert trainable == factors | {"head.weight", "head.bias"}


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_the_start_follows_the_seed_and_no_global_generator(tiny_vit, batch, method) -> None:
    def start(seed):
        model = tiny_vit()
        torch.manual_seed(5 + seed)
        before = torch.random.get_rng_state()
        if method == "lora":
            attach_peft_lora(model, PeftLoraConfig(rank=2), seed=seed)
        else:
            PeftAdaLoraHook(model, ADALORA, STEPS, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.testing.assert_close(model(batch[0]), tiny_vit()(batch[0]), rtol=0, atol=0)
        return [p.detach() for p in model.parameters() if p.requires_grad]

    same = [torch.equal(a, b) for a, b in zip(start(0), start(0), strict=True)]
    assert all(same)
    assert not all(torch.equal(a, b) for a, b in zip(start(0), start(1), strict=True))


def test_the_penalty_is_the_one_that_peft_adds_to_a_loss(tiny_vit, batch) -> None:
    model = tiny_vit()
    config = ADALORA.model_copy(update={"orthogonality_weight": 0.7})
    hook = PeftAdaLoraHook(model, config, STEPS, seed=0)
    ours = hook.penalties(model)["orthogonality"]
    forward = model.forward
    model.forward = lambda x: SimpleNamespace(loss=forward(x).sum() * 0)
    theirs = hook.tuner(batch[0]).loss
    assert theirs > 0.1
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    gradients = [layer.lora_A["default"].grad.clone() for layer in peft_layers(model).values()]
    assert min(g.abs().max() for g in gradients) > 0
    model.zero_grad()
    theirs.backward()
    for ours_, layer in zip(gradients, peft_layers(model).values(), strict=True):
        torch.testing.assert_close(ours_, layer.lora_A["default"].grad)
    without = config.model_copy(update={"orthogonality_weight": 0.0})
    assert PeftAdaLoraHook(tiny_vit(), without, STEPS, seed=0).penalties(model) == {}


def test_the_scale_is_the_stated_one(tiny_vit) -> None:
    model = tiny_vit()
    hook = PeftAdaLoraHook(model, ADALORA.model_copy(update={"scale": 1.7}), STEPS, seed=0)
    for layer in peft_layers(model).values():
        with torch.no_grad():
            layer.lora_E["default"].copy_(torch.tensor([[1.0], [0.0], [-2.0], [0.5]]))
        a, b, e = (getattr(layer, name)["default"].detach() for name in ("lora_A", "lora_B", "lora_E"))
        expected = 1.7 * b @ torch.diag(e.flatten()) @ a
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(layer.get_delta_weight("default"), expected, rtol=1e-5 / 4 + 1e-6, atol=1e-9)
        right, left, scale = peft_factors(layer)
        assert (len(right), left.shape[1]) == (3, 3)  # the masked triplet is left out
        torch.testing.assert_close(scale * left @ right, layer.get_delta_weight("default"))
    assert hook.tuner.peft_config["default"].lora_alpha == 1.7 * 4


def test_adalora_in_our_loop_is_adalora_in_a_loop_as_peft_documents_it(tiny_vit, batch) -> None:
    ours = tiny_vit()
    hook = PeftAdaLoraHook(ours, ADALORA, STEPS, seed=3)
    theirs = tiny_vit()
    other = PeftAdaLoraHook(theirs, ADALORA, STEPS, seed=3)  # only for the same start
    optimizer, losses = optimizer_of(theirs), []
    for step in range(1, STEPS + 1):
        loss = F.cross_entropy(theirs(batch[0]), batch[1])
        losses.append(loss.item())
        (loss + other.penalties(theirs)["orthogonality"]).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        other.tuner.update_and_allocate(step)
        optimizer.zero_grad()
    torch.testing.assert_close(train(ours, batch, STEPS, [hook]), torch.tensor(losses), rtol=0, atol=1e-5)
    patterns = [tuner.peft_config["default"].rank_pattern for tuner in (hook.tuner, other.tuner)]
    assert patterns[0] == patterns[1]
    assert [(entry["step"], entry["budget"]) for entry in hook.rank_history] == [(0, 32), (2, 24), (4, 17), (6, 16)]


def test_masks_end_at_the_budget_and_free_nothing(tiny_vit, batch) -> None:
    model = tiny_vit()
    hook = PeftAdaLoraHook(model, ADALORA, STEPS, seed=0)
    before = sum(p.numel() for p in model.parameters() if p.requires_grad)
    deployable = []
    train(model, batch, STEPS, [hook], lambda: deployable.append(hook.deployable(len(deployable) + 1)))
    assert deployable == [False] * (LAST - 1) + [True] * (STEPS - LAST + 1)
    ranks = peft_ranks(model)
    assert sum(ranks.values()) == 16
    assert len(set(ranks.values())) > 1
    assert hook.rank_history[-1]["ranks"] == ranks
    live = {name: int((layer.lora_E["default"] != 0).sum()) for name, layer in peft_layers(model).items()}
    assert list(live.values()) == list(ranks.values())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == before


def test_a_final_mask_that_takes_everything_is_an_error(tiny_vit, batch) -> None:
    model = tiny_vit()
    hook = PeftAdaLoraHook(model, ADALORA, STEPS, seed=0)
    allocator = hook.tuner.rankallocator
    allocator.update_ipt = lambda model: None  # all scores stay 0, and PEFT masks what is `<=` the threshold
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            allocator.exp_avg_ipt[name] = allocator.exp_avg_unc[name] = torch.zeros_like(parameter)
    with pytest.raises(RuntimeError, match="left 0 triplets"):
        train(model, batch, STEPS, [hook])


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_what_was_trained_exports_and_merges_with_the_same_logits(tiny_vit, batch, tmp_path, method) -> None:
    model = tiny_vit()
    if method == "lora":
        attach_peft_lora(model, PeftLoraConfig(rank=3), seed=0)
        train(model, batch)
    else:
        train(model, batch, STEPS, [PeftAdaLoraHook(model, ADALORA, STEPS, seed=0)])
    with torch.inference_mode():
        expected = model.eval()(batch[0])
        assert (expected - tiny_vit().eval()(batch[0])).abs().max() > 0.1
        export_peft(model, tmp_path, {})
        theirs = peft.PeftModel.from_pretrained(tiny_vit(), tmp_path).eval()
        torch.testing.assert_close(theirs(batch[0]), expected, rtol=0, atol=1e-5)
        plain = tiny_vit().eval()
        plain.load_state_dict(merged_state_dict(model))
        torch.testing.assert_close(plain(batch[0]), expected, rtol=0, atol=1e-5)
