"""Blocks that are computed again give the gradients of blocks whose activations were kept, bit for bit."""

import itertools
from collections import Counter
from pathlib import Path

import pytest
import tiny_transformers
import torch
from tiny_models import TINY_FAMILIES, random_model
from torch import nn
from torch.nn import functional as F
from trained_together import trained

from peft_vit.core.adapters import adapted_product, attach_adapters, site_adapters
from peft_vit.core.backbones import Backbone, describe, find_sites, load_backbone
from peft_vit.core.config import BackboneConfig
from peft_vit.core.training import loop
from peft_vit.core.training.optimization import blocks_of, recomputed

pytestmark = pytest.mark.part("trainer")


@pytest.fixture(autouse=True)
def _however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let inputs of these small models be computed again, too."""
    monkeypatch.setattr(adapted_product, "LEAST_VALUES", 1)


def gradients(
    model: nn.Module, blocks: list[nn.Module], batch, seed: int = 5
) -> tuple[dict[str, torch.Tensor], int, Counter]:
    """Return gradients by name, bytes kept beside blocks' inputs, and how often each module was called."""
    storages: dict[int, int] = {}
    calls: Counter[str] = Counter()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, module in model.named_modules()
    ]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    torch.manual_seed(seed)  # DINOv3 of transformers draws a scale of positions, once a pass
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with recomputed(blocks):
            logits = model(batch[0])
        held = sum(storages.values())
    F.cross_entropy(logits, batch[1]).backward()
    for handle in handles:
        handle.remove()
    return (
        {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.grad is not None},
        held,
        calls,
    )


def check(model: nn.Module, batch) -> None:
    """Compare with and without, in training mode; adapters have updates."""
    model.train()
    attach_adapters(model, find_sites(model), 2, scale=1.0, seed=0)
    for adapter in site_adapters(model).values():
        nn.init.normal_(adapter.lora_B, std=0.1)
    names, state = [name for name, _ in model.named_modules()], list(model.state_dict())
    plain, held, once = gradients(model, [], batch)
    assert len(plain) > 2 * len(find_sites(model))
    blocks = Backbone.within(model).blocks
    peaks = [held]
    for recomputed_blocks in sorted({1, len(blocks) - 1, len(blocks)}):
        again, less, twice = gradients(model, blocks_of(model)[:recomputed_blocks], batch)
        assert plain.keys() == again.keys()
        for name, gradient in plain.items():
            assert torch.equal(again[name], gradient), name
        assert less < peaks[-1]
        peaks.append(less)
        for place, block in enumerate(blocks):
            inside = [name for name in once if name.startswith(f"{block}.")]
            times = 2 if place < recomputed_blocks else 1
            assert any(twice[name] == times * once[name] for name in inside), block
            assert all(twice[name] <= times * once[name] for name in inside), block
    assert peaks[-1] < held / 2
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
    results = []
    for blocks in ([], blocks_of(model)):
        results.append((*gradients(model.train(), blocks, batch), torch.rand(1)))
    (plain, _, _, after), (again, _, _, after_again) = results
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


@pytest.mark.parametrize("name", ["test_vit", *TINY_FAMILIES])
def test_the_first_blocks_keep_the_most(name) -> None:
    shape = describe(BackboneConfig(model=name, weights="random"), 32)
    for earlier, later in itertools.pairwise(shape.values_by_block):
        assert later < 1.2 * earlier  # what joins two stages of Swin counts with a block
    assert len(shape.values_by_block) == len(blocks_of(random_model(name)))


ALL = (
    "full",
    "growing",
    "global",
    "with_penalty",
    "qa_lora",
    "managed_pace",
    "qa_adalora",
    "peft_lora",
    "peft_adalora",
)
IN_PARTS = ("growing", "qa_adalora", "peft_adalora")


@pytest.mark.parametrize(
    ("method", "micro_batch_size"), [*((name, None) for name in ALL), *((name, 4) for name in IN_PARTS)]
)
def test_trainings_are_the_same_to_the_bit(monkeypatch, method, micro_batch_size) -> None:
    """With ranks that move, probes, packed weights and PEFT's layers."""
    if method.startswith("peft"):
        pytest.importorskip("peft")
    numbers: list[int] = []  # of blocks that are computed again, by pass
    monkeypatch.setattr(loop, "recomputed", lambda blocks: numbers.append(len(blocks)) or recomputed(blocks))
    left = []
    adaptive = {"activation_checkpointing": "adaptive", "recomputed_blocks": 1}
    for settings, number in (({}, 0), (adaptive, 1), ({"activation_checkpointing": "blocks"}, 2)):
        numbers.clear()
        given = {"batch_size": 8, "micro_batch_size": micro_batch_size, **settings}
        made = trained(method, given, images=18, double=False)
        assert set(numbers) == {number}
        left.append({name: value for name, value in made.items() if name not in ("gradients", "tensors")})
    assert left[0] == left[1] == left[2]
