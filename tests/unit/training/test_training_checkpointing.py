"""Blocks that are computed again give the gradients of blocks whose activations were kept, bit for bit."""

from collections import Counter
from pathlib import Path

import pytest
import tiny_transformers
import torch
from prepared_methods import METHODS, STEPS
from tiny_models import TINY_FAMILIES, random_model
from torch import nn
from torch.nn import functional as F

from peft_vit.adapters import attach_adapters, current_ranks, site_adapters, trained_tensors
from peft_vit.backbones import Backbone, find_sites, load_backbone
from peft_vit.config import BackboneConfig, TrainingConfig
from peft_vit.training import train
from peft_vit.training.activation_checkpointing import blocks_of, recomputed

pytestmark = pytest.mark.part("trainer")


def gradients(
    model: nn.Module, blocks: list[nn.Module], batch, seed: int = 5
) -> tuple[dict[str, torch.Tensor], int, Counter]:
    """Return gradients by name, bytes kept beside blocks' inputs, and how often each module was called."""
    kept: dict[int, int] = {}
    calls: Counter[str] = Counter()
    own = {one.untyped_storage().data_ptr() for one in [*model.parameters(), *model.buffers()]}
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, module in model.named_modules()
    ]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    torch.manual_seed(seed)  # DINOv3 of transformers draws a scale of positions, once a pass
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with recomputed(blocks):
            logits = model(batch[0])
        held = sum(kept.values())
    F.cross_entropy(logits, batch[1]).backward()
    for handle in handles:
        handle.remove()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}, held, calls


def check(model: nn.Module, batch) -> None:
    """Compare with and without, in training mode; adapters have updates."""
    model.train()
    attach_adapters(model, find_sites(model), 2, scale=1.0, seed=0)
    for adapter in site_adapters(model).values():
        nn.init.normal_(adapter.lora_B, std=0.1)
    names, state = [name for name, _ in model.named_modules()], list(model.state_dict())
    plain, held, once = gradients(model, [], batch)
    again, less, twice = gradients(model, blocks_of(model), batch)
    assert plain.keys() == again.keys()
    assert len(plain) > 2 * len(find_sites(model))
    for name, gradient in plain.items():
        assert torch.equal(again[name], gradient), name
    assert less < held / 2
    for block in Backbone.within(model).blocks:
        inside = [name for name in once if name.startswith(f"{block}.")]
        assert any(twice[name] == 2 * once[name] for name in inside), block
    assert [name for name, _ in model.named_modules()] == names
    assert list(model.state_dict()) == state
    assert not any("forward" in vars(module) for module in blocks_of(model))


@pytest.mark.parametrize("name", ["test_vit", "tiny_swin", "tiny_eva02"])
def test_gradients_are_the_same_and_less_is_kept(name, batch) -> None:
    check(random_model(name), batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TINY_FAMILIES, "cait_xxs24_224", "maxvit_rmlp_pico_rw_256"])
def test_every_family_of_timm(name, batch) -> None:
    check(random_model(name), batch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny_transformers.TYPES)
def test_every_family_of_transformers(kind, batch, tmp_path: Path) -> None:
    tiny_transformers.folder_of(kind, tmp_path)
    config = BackboneConfig(library="transformers", model=str(tmp_path), weights="file")
    check(load_backbone(config, image_size=32, num_classes=5, seed=0).model, batch)


def test_what_is_dropped_is_dropped_again(tiny_vit, batch) -> None:
    model = tiny_vit()
    for block in model.blocks:
        block.mlp.drop1 = nn.Dropout(0.5)
    found = []
    for blocks in ([], blocks_of(model)):
        found.append((*gradients(model.train(), blocks, batch), torch.rand(1)))
    (plain, _, _, after), (again, _, _, after_again) = found
    assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())
    assert after == after_again  # draws to come are the same, too
    assert not torch.equal(gradients(model, [], batch, seed=6)[0]["head.weight"], plain["head.weight"])


def test_a_forward_of_another_library_stays(tiny_vit) -> None:
    block = tiny_vit().blocks[0]
    theirs = block.forward
    block.forward = theirs
    with recomputed([block]):
        assert vars(block)["forward"] is not theirs
    assert vars(block)["forward"] is theirs


@pytest.mark.parametrize("micro_batch_size", [None, 4])
@pytest.mark.parametrize(
    "method",
    [
        "full",
        "growing",
        "reversible",
        "with_penalty",
        "qa_lora",
        "managed_pace",
        "qa_adalora",
        "peft_lora",
        "peft_adalora",
    ],
)
def test_trainings_are_the_same_to_the_bit(tiny_vit, data, runtime, method, micro_batch_size) -> None:
    """With ranks that move, probes, packed weights and PEFT's layers."""
    if method.startswith("peft"):
        pytest.importorskip("peft")
    left = []
    for checkpointing in ("none", "blocks"):
        model = tiny_vit()
        hooks = METHODS[method](model)
        config = TrainingConfig(
            epochs=4,
            batch_size=8,
            learning_rate=3e-3,
            micro_batch_size=micro_batch_size,
            activation_checkpointing=checkpointing,
        )
        calls: Counter[str] = Counter()
        first = model.blocks[0].norm1
        first.register_forward_hook(lambda module, *_, calls=calls: calls.update([str(module.training)]))
        result = train(model, data(), config, runtime, seed=4, hooks=hooks)
        left.append((result, current_ranks(model), trained_tensors(model), calls["True"]))
    (one, ranks, tensors, once), (other, ranks_again, tensors_again, twice) = left
    assert twice == 2 * once >= 2 * STEPS
    assert [row.model_dump(exclude={"seconds"}) for row in other.steps] == [
        row.model_dump(exclude={"seconds"}) for row in one.steps
    ]
    assert other.evaluations == one.evaluations
    assert ranks_again == ranks
    assert other.optimizer_sha256 == one.optimizer_sha256
    torch.testing.assert_close(tensors_again, tensors, rtol=0, atol=0)
