"""A change of rank is real: smaller tensors, smaller optimiser state, and every triplet keeps its own moments."""

import pytest
import torch
from torch.nn import functional as F

from peft_vit.adapters import attach_adapters, current_ranks, resize_adapters, site_adapters
from peft_vit.backbones import find_sites
from peft_vit.errors import UserError
from peft_vit.evaluation import optimizer_bytes, trainable_parameters

pytestmark = pytest.mark.part("controller")
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
}
DIMS = {"lora_A": 0, "lora_B": 1, "lora_lambda": 0}


def trained(model, batch, kind="adamw", parametrization="product", rank=4, steps=2):
    """Return an optimiser after some steps on a model with adapters of one rank."""
    sites = find_sites(model)
    attach_adapters(
        model,
        sites,
        dict.fromkeys((site.name for site in sites), rank),
        scale=2.0,
        seed=0,
        parametrization=parametrization,
    )
    optimizer = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad])
    for _ in range(steps):
        optimize(model, optimizer, batch)
    return optimizer


def optimize(model, optimizer, batch) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def moments(optimizer, parameter) -> dict[str, torch.Tensor]:
    state = optimizer.state[parameter]
    return {key: value.clone() for key, value in state.items() if torch.is_tensor(value) and value.dim() > 0}


def new_ranks(model, change: int) -> dict[str, int]:
    return {name: rank + change for name, rank in current_ranks(model).items()}


def scores_of(model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: torch.rand(rank, generator=generator) for name, rank in current_ranks(model).items()}


@pytest.mark.parametrize("change", [-3, 4])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_under_a_reference_rank_updates_stay_and_the_next_step_is_that_of_the_new_size(
    tiny_vit, batch, kind, change
) -> None:
    model = tiny_vit()
    optimizer = trained(model, batch, kind)  # rank 4
    for adapter in site_adapters(model).values():
        adapter.reference_rank = 4.0
    optimize(model, optimizer, batch)
    old = {
        (site, name): (p.detach().clone(), moments(optimizer, p))
        for site, adapter in site_adapters(model).items()
        for name, p in adapter.named_parameters()
    }
    kept = resize_adapters(model, optimizer, new_ranks(model, change), scores_of(model))
    larger = 4 / (4 + change)
    for site, adapter in site_adapters(model).items():
        count = len(kept[site])
        left, right = (old[site, name][0].index_select(DIMS[name], kept[site]) for name in ("lora_B", "lora_A"))
        torch.testing.assert_close(adapter.lora_A[:count].detach(), larger * right)
        torch.testing.assert_close(adapter.lora_B[:, :count].detach(), left / larger)
        torch.testing.assert_close(adapter.delta().detach(), 2.0 * left @ right, rtol=1e-5, atol=1e-7)
        for name, factor in (("lora_A", larger), ("lora_B", 1 / larger)):  # the gradient of c w is 1 / c that of w
            for key, moment in moments(optimizer, getattr(adapter, name)).items():
                before = old[site, name][1][key].index_select(DIMS[name], kept[site])
                after = moment.narrow(DIMS[name], 0, count)
                torch.testing.assert_close(after, before / factor ** (2 if "sq" in key else 1))


@pytest.mark.parametrize("parametrization", ["product", "svd"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_shrinking_keeps_the_strongest_triplets_with_their_moments(tiny_vit, batch, kind, parametrization) -> None:
    model = tiny_vit()
    optimizer = trained(model, batch, kind, parametrization)
    scores = scores_of(model)
    bytes_before, parameters_before = optimizer_bytes(optimizer), trainable_parameters(model)
    old = {
        (site, name): (p.detach().clone(), moments(optimizer, p))
        for site, adapter in site_adapters(model).items()
        for name, p in adapter.named_parameters()
    }
    kept = resize_adapters(model, optimizer, new_ranks(model, -3), scores)
    assert set(current_ranks(model).values()) == {1}
    for site, adapter in site_adapters(model).items():
        strongest = int(scores[site].argmax())
        assert kept[site].tolist() == [strongest]
        for name, parameter in adapter.named_parameters():
            values, states = old[site, name]
            chosen = torch.tensor([strongest])
            assert parameter.shape[DIMS[name]] == 1
            assert torch.equal(parameter, values.index_select(DIMS[name], chosen))
            carried = moments(optimizer, parameter)
            assert carried.keys() == states.keys() != set()
            for key, state in states.items():
                assert torch.equal(carried[key], state.index_select(DIMS[name], chosen))
    removed = parameters_before - trainable_parameters(model)
    per_triplet = 64 + 64, 64 + 64, 64 + 64, 64 + 64, 64 + 128, 128 + 64
    assert removed == 2 * 3 * sum(n + (parametrization == "svd") for n in per_triplet)
    per_value = {"adamw": 2, "adam": 3, "sgd": 1}[kind]
    assert bytes_before - optimizer_bytes(optimizer) == 4 * per_value * removed
    optimize(model, optimizer, batch)


@pytest.mark.parametrize("parametrization", ["product", "svd"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_growing_leaves_the_logits_and_starts_from_no_moments(tiny_vit, batch, kind, parametrization) -> None:
    model = tiny_vit()
    optimizer = trained(model, batch, kind, parametrization, rank=2)
    old = {(s, n): moments(optimizer, p) for s, a in site_adapters(model).items() for n, p in a.named_parameters()}
    with torch.no_grad():
        before = model(batch[0])
    kept = resize_adapters(model, optimizer, new_ranks(model, 3), scores_of(model))
    with torch.no_grad():
        after = model(batch[0])
    assert (after - before).norm() <= 1e-6 * before.norm()
    for site, adapter in site_adapters(model).items():
        assert adapter.rank == 5
        assert not (adapter.lora_B[:, 2:] if adapter.lora_lambda is None else adapter.lora_lambda[2:]).any()
        assert kept[site].tolist() == [0, 1]
        for name, parameter in adapter.named_parameters():
            for key, state in moments(optimizer, parameter).items():
                first, added = state.split([2, 3], DIMS[name])
                assert torch.equal(first, old[site, name][key])
                assert not added.any()
    before_step = {name: a.lora_B.detach().clone() for name, a in site_adapters(model).items()}
    optimize(model, optimizer, batch)
    changed = [not torch.equal(before_step[name], a.lora_B) for name, a in site_adapters(model).items()]
    assert all(changed)


def test_growing_from_rank_zero_and_back(tiny_vit, batch) -> None:
    model = tiny_vit()
    optimizer = trained(model, batch, rank=0)
    empty = trainable_parameters(model)
    with torch.no_grad():
        before = model(batch[0])
    resize_adapters(model, optimizer, {"blocks.1.mlp.fc1": 2}, scores_of(model))
    with torch.no_grad():
        assert torch.equal(model(batch[0]), before)
    assert trainable_parameters(model) == empty + 2 * (64 + 128)
    optimize(model, optimizer, batch)
    resize_adapters(model, optimizer, {"blocks.1.mlp.fc1": 0}, scores_of(model))
    assert trainable_parameters(model) == empty
    with torch.no_grad():
        merged = model(batch[0])
    assert torch.isfinite(merged).all()


@pytest.mark.parametrize("parametrization", ["product", "svd"])
def test_a_site_without_rank_costs_nothing(tiny_vit, batch, parametrization) -> None:
    model = tiny_vit(depth=3)
    optimizer = trained(model, batch, parametrization=parametrization)
    ranks = {name: 2 if name == "blocks.2.attn.value" else 0 for name in current_ranks(model)}
    resize_adapters(model, optimizer, ranks, scores_of(model))
    for name, adapter in site_adapters(model).items():
        if not ranks[name]:
            assert sum(p.numel() for p in adapter.parameters()) == 0
            assert sum(p.untyped_storage().nbytes() for p in adapter.parameters()) == 0
            assert not any(p in optimizer.state for p in adapter.parameters())
    head = 64 * 5 + 5
    assert trainable_parameters(model) == head + 2 * (64 + 64 + (parametrization == "svd"))
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda _block, _inputs, output: outputs.append(output))
    logits = model(batch[0])
    assert [output.grad_fn is None for output in outputs] == [True, True, False]  # back-propagation stops there
    F.cross_entropy(logits, batch[1]).backward()
    optimizer.step()
    assert {name for name, adapter in site_adapters(model).items() if adapter.lora_B.grad is not None} == {
        "blocks.2.attn.value"
    }


def test_parameters_and_state_fall_with_the_rank(tiny_vit, batch) -> None:
    model = tiny_vit()
    optimizer = trained(model, batch, rank=6)
    held = []
    for rank in (6, 4, 2, 1, 0):
        resize_adapters(model, optimizer, dict.fromkeys(current_ranks(model), rank), scores_of(model))
        optimize(model, optimizer, batch)
        held.append((trainable_parameters(model), optimizer_bytes(optimizer)))
    head, per_rank = 64 * 5 + 5, 2 * (4 * 128 + 2 * 192)
    assert [parameters for parameters, _ in held] == [head + rank * per_rank for rank in (6, 4, 2, 1, 0)]
    steps = [4 * 26] * 4 + [4 * 2]  # a float32 step count for each of 2 * 12 factors and the head's two parameters
    assert [size - 8 * parameters for parameters, size in held] == steps


def test_of_equal_triplets_the_later_go_and_order_is_kept(tiny_vit, batch) -> None:
    model = tiny_vit()
    optimizer = trained(model, batch)
    name = "blocks.0.attn.value"
    kept = resize_adapters(model, optimizer, {name: 3}, {name: torch.tensor([1.0, 1.0, 2.0, 1.0])})
    assert kept[name].tolist() == [0, 1, 2]


def test_the_learning_rate_course_goes_on(tiny_vit, batch) -> None:
    model = tiny_vit()
    optimizer = trained(model, batch, steps=0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=6, cycle_momentum=False)
    lone = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], 1e-2)
    expected = torch.optim.lr_scheduler.OneCycleLR(lone, 1e-2, total_steps=6, cycle_momentum=False)
    rates = []
    for step in range(6):
        rates.append((optimizer.param_groups[0]["lr"], lone.param_groups[0]["lr"]))
        optimize(model, optimizer, batch)
        lone.step()
        if step == 2:
            resize_adapters(model, optimizer, new_ranks(model, -2), scores_of(model))
        if step == 3:
            resize_adapters(model, optimizer, new_ranks(model, 1), scores_of(model))
        scheduler.step()
        expected.step()
    assert [ours for ours, _ in rates] == [theirs for _, theirs in rates]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}  # nothing lost, nothing stale
    assert set(map(id, optimizer.state)) == held


def test_what_cannot_be_resized_is_refused(tiny_vit, batch) -> None:
    model = tiny_vit()
    trained(model, batch)
    scores = scores_of(model)
    for unsupported in (torch.optim.RMSprop, torch.optim.Adagrad):
        with pytest.raises(UserError, match=f"{unsupported.__name__} can't follow a change of rank; use one of AdamW"):
            resize_adapters(model, unsupported(model.parameters(), 1e-2), {}, scores)
    foreign = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], 1e-2)
    with pytest.raises(UserError, match="does not hold the adapters' parameters"):
        resize_adapters(model, foreign, new_ranks(model, -1), scores)


@pytest.mark.parametrize(("site", "rank"), [("blocks.0.attn.query", -1), ("blocks.0.attn.query", 65), ("blocks.9", 1)])
def test_an_impossible_rank_is_refused_by_site_before_anything_changes(tiny_vit, batch, site, rank) -> None:
    model = tiny_vit()
    optimizer = trained(model, batch)
    wanted = {"blocks.0.attn.key": 1, site: rank}
    with pytest.raises(UserError, match=site):
        resize_adapters(model, optimizer, wanted, scores_of(model))
    assert set(current_ranks(model).values()) == {4}
