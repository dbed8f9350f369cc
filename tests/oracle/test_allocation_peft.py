"""AdaLoRA against PEFT's RankAllocator: the same scores, budgets and choice of triplets, and PEFT's traps."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from allocation_runs import backward, train_step
from torch import Tensor, nn
from torch.nn import functional as F

from peft_vit import AdaLoraConfig, AdaLoRAController
from peft_vit.base.errors import SilentNoEffectWarning
from peft_vit.core.adapters import SiteAdapter, current_ranks, site_adapters
from peft_vit.core.adapters.footprint import optimizer_bytes, trainable_parameters
from peft_vit.core.allocation import BudgetSchedule
from peft_vit.core.training import AllocationHook, optimization_step

peft = pytest.importorskip("peft")
layer = pytest.importorskip("peft.tuners.adalora.layer")
pytestmark = pytest.mark.part("controller")

TARGETS = ("query", "key", "value", "out")
START, END = 20, 4  # ranks a site; 4 sites of 64 x 64
INIT, FINAL, EVERY, TOTAL = 2, 3, 2, 13  # masks at 4, 6, 8; for good at 10; the cubic is whole: 43, 24, 17, 16


published = partial(  # AdaLoRA's own settings, but that what loses is gone
    AdaLoraConfig,
    total_rank_budget=END * len(TARGETS),
    initial_budget=START * len(TARGETS),
    targets=TARGETS,
    parametrization="svd",
    allocation_strategy="global",
    importance_metric="sensitivity",
    budget_schedule="cubic",
    orthogonality_weight=0.1,
    uncertainty_beta=0.8,
    warmup_steps=INIT,
    final_steps=FINAL,
    update_frequency=EVERY,
)


class Peer:
    """PEFT's allocator on a module with its names and our factors."""

    KEYS = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_lambda": "lora_E"}  # noqa: RUF012

    def __init__(self, adapters, **settings) -> None:
        self.holder = nn.Module()
        for index, adapter in enumerate(adapters.values()):
            site = nn.Module()
            for ours, theirs in self.KEYS.items():
                value = getattr(adapter, ours).detach().clone()
                value = value[:, None] if ours == "lora_lambda" else value
                site.add_module(theirs, nn.ParameterDict({"default": nn.Parameter(value)}))
            self.holder.add_module(f"site{index}", site)
        steps = {"tinit": INIT, "tfinal": FINAL, "total_step": TOTAL, "deltaT": EVERY}
        self.settings = SimpleNamespace(**{"beta1": 0.85, "beta2": 0.8, "target_r": END, **steps, **settings})
        self.allocator = layer.RankAllocator(self.holder, self.settings, "default")

    def parameter(self, index: int, ours: str) -> nn.Parameter:
        return self.holder.get_parameter(f"site{index}.{self.KEYS[ours]}.default")

    def copy(self, adapters) -> None:
        """Take over our weights and gradients."""
        for index, adapter in enumerate(adapters.values()):
            for ours in self.KEYS:
                parameter, source = self.parameter(index, ours), getattr(adapter, ours)
                parameter.data.copy_(source.detach().view(parameter.shape))
                parameter.grad = source.grad.view(parameter.shape).clone()

    def scores(self, index: int) -> Tensor:
        part = {key: self.allocator._element_score(f"site{index}.lora_{key}.default") for key in "AEB"}
        return part["E"].flatten() + part["A"].mean(1) + part["B"].mean(0)

    def step(self, step: int) -> dict[str, list[bool]] | None:
        """Do what AdaLoraModel.update_and_allocate does; return the mask if one was made."""
        if step < self.settings.total_step - self.settings.tfinal:
            return self.allocator.update_and_allocate(self.holder, step)[1]
        if step == self.settings.total_step - self.settings.tfinal:
            mask = self.allocator.update_and_allocate(self.holder, step, force_mask=True)[1]
            self.allocator.reset_ipt()
            return mask
        return None

    def alive(self) -> list[list[bool]]:
        return [(self.parameter(i, "lora_lambda") != 0).flatten().tolist() for i in range(len(TARGETS))]


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def decide(model, controller, optimizer, scores, step) -> None:
    controller.apply_ranks(model, optimizer, controller.reallocate_ranks(scores, step))


def random_gradients(adapters, generator) -> None:
    """Put gradients on the adapters; those of some sites are larger, so that ranks differ."""
    for index, adapter in enumerate(adapters.values()):
        for parameter in adapter.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * (1 + index / 4)


def test_scores_and_the_last_mask(tiny_vit) -> None:
    """Weights move by the same gradients on both sides, up to the one decision, at which losers leave here."""
    model = tiny_vit(depth=1)
    last = TOTAL - FINAL
    controller = AdaLoRAController(model, published(warmup_steps=last), TOTAL)
    optimizer = torch.optim.SGD(trained(model), 0.05)
    adapters = site_adapters(model)
    peer, generator = Peer(adapters, tinit=last - 1), torch.Generator().manual_seed(0)
    for step in range(1, last + 1):
        random_gradients(adapters, generator)
        peer.copy(adapters)
        scores = controller.update_importance_scores(model, step)
        peer.allocator.update_ipt(peer.holder)  # trap: PEFT scores no more at the step that decides; see below
        for index, name in enumerate(adapters):
            torch.testing.assert_close(controller._triplet_scores[name], peer.scores(index), rtol=1e-5, atol=0)
        if step < last:
            optimizer.step()
    before = {name: (a.lora_A.detach().clone(), a.lora_lambda.detach().clone()) for name, a in adapters.items()}
    decide(model, controller, optimizer, scores, last)
    peer.allocator.update_and_allocate(peer.holder, last, force_mask=True)
    masks = peer.alive()
    assert sum(map(sum, masks)) == sum(controller.ranks.values()) == controller.schedule.budget_at(last)
    for index, (name, adapter) in enumerate(adapters.items()):
        kept = torch.tensor(masks[index])
        assert adapter.rank == kept.sum() == controller.ranks[name]
        assert torch.equal(adapter.lora_A.detach(), before[name][0][kept])  # really smaller, and the same triplets
        assert torch.equal(adapter.lora_lambda.detach(), before[name][1][kept])
    assert len(set(current_ranks(model).values())) > 1


@pytest.mark.parametrize(
    ("warmup", "theirs", "ours"),
    [
        (3, [4, 6, 8, 10], [3, 5, 7, 9, 10]),  # no multiple of EVERY: masks at other steps, and with other budgets
        (4, [6, 8, 10], [4, 6, 8, 10]),  # a multiple: the same steps, and one decision at 4 that removes nothing
    ],
)
def test_trap_masks_at_multiples_of_the_interval_in_peft(tiny_vit, warmup, theirs, ours) -> None:
    model = tiny_vit(depth=1)
    controller = AdaLoRAController(model, published(warmup_steps=warmup), TOTAL)
    optimizer = torch.optim.SGD(trained(model), 0.05)
    adapters = site_adapters(model)
    peer, generator = Peer(adapters, tinit=warmup), torch.Generator().manual_seed(0)
    masked: dict[int, int] = {}  # triplets that are left
    for step in range(1, TOTAL - FINAL + 1):
        random_gradients(adapters, generator)
        for parameter in peer.holder.parameters():  # its own: only ours get smaller
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        scores = controller.update_importance_scores(model, step)
        if (mask := peer.step(step)) is not None:
            masked[step] = sum(map(sum, mask.values()))
        optimizer.step()
        decide(model, controller, optimizer, scores, step)
    decided = {entry["step"]: sum(entry["ranks"].values()) for entry in controller.rank_history[1:]}
    assert (list(masked), list(decided)) == (theirs, ours)
    assert decided[warmup] == START * len(TARGETS)
    shared = masked.keys() & decided.keys()
    assert shared == ({10} if warmup == 3 else set(theirs))
    assert all(masked[step] == decided[step] == controller.schedule.budget_at(step) for step in shared)


def adaptive(tiny_vit, batch, total=8, **settings):
    """Return model, controller and optimizer before the first step, with the task's gradients."""
    model = tiny_vit(depth=1)
    given = {"total_rank_budget": 8, "initial_budget": 16, "warmup_steps": 1, "final_steps": 2, "update_frequency": 1}
    controller = AdaLoRAController(model, published(**{**given, **settings}), total)
    optimizer = torch.optim.AdamW(trained(model), 1e-2)
    backward(model, batch)
    return model, controller, optimizer


@pytest.mark.filterwarnings("ignore::peft_vit.base.errors.SilentNoEffectWarning")
def test_trap_allocation_before_the_first_step_masks_everything_in_peft(tiny_vit, batch) -> None:
    """At lambda = 0 every |w dL/dw| is 0, and PEFT masks what is at or below the threshold, 0. We keep the budget."""
    model, controller, optimizer = adaptive(tiny_vit, batch)
    adapters = site_adapters(model)
    peer = Peer(adapters, tinit=0, tfinal=2, total_step=8, deltaT=1, target_r=2)
    peer.copy(adapters)
    mask = peer.step(1)
    assert sum(map(sum, mask.values())) == 0 < peer.allocator.budget_schedule(1)[0]
    controller.update_importance_scores(model, 1)
    scores = controller.update_importance_scores(model, 2)  # still no step was made
    assert set(scores.values()) == {0.0}
    decide(model, controller, optimizer, scores, 2)
    assert sum(controller.ranks.values()) == controller.schedule.budget_at(2) > 0
    assert controller.ranks == current_ranks(model)


@pytest.mark.filterwarnings("ignore::peft_vit.base.errors.SilentNoEffectWarning")
def test_trap_ties_keep_fewer_than_the_budget_in_peft(tiny_vit, batch, monkeypatch) -> None:
    """PEFT drops every triplet that ties with the threshold. We keep the budget, and of equals the first."""
    model, controller, optimizer = adaptive(tiny_vit, batch)
    tied = [torch.tensor([3.0, 1.0, 1.0, 1.0]) for _ in TARGETS]
    peer = Peer(site_adapters(model))
    peer.allocator._combine_ipt = lambda value, vector: tied[0]
    peer.copy(site_adapters(model))
    peer.allocator.update_ipt(peer.holder)
    mask = peer.allocator.mask_to_budget(peer.holder, 8)
    assert sum(map(sum, mask.values())) == 4
    monkeypatch.setattr(controller.tracker, "update", lambda adapters, scale: dict(zip(adapters, tied, strict=True)))
    scores = controller.update_importance_scores(model, 6)
    decide(model, controller, optimizer, scores, 6)
    assert sum(controller.ranks.values()) == sum(current_ranks(model).values()) == 8


def test_trap_equal_start_and_target_stop_peft(tiny_vit, batch) -> None:
    """PEFT asks for the 0th smallest score, which does not exist. We keep everything, and say that nothing happens."""
    with pytest.warns(SilentNoEffectWarning, match="global has no effect"):
        model, controller, optimizer = adaptive(tiny_vit, batch, initial_budget=8)
    peer = Peer(site_adapters(model), target_r=2)
    peer.copy(site_adapters(model))
    peer.allocator.update_ipt(peer.holder)
    with pytest.raises((RuntimeError, IndexError), match="selected number k out of range"):
        peer.allocator.mask_to_budget(peer.holder, peer.allocator.target_bgt)
    first = controller.ranks
    scores = controller.update_importance_scores(model, 6)
    decide(model, controller, optimizer, scores, 6)
    assert controller.ranks == current_ranks(model) == first


def peft_model(model, **settings):
    """Return the model with PEFT's AdaLoRA on the same four matrices (query, key and value are fused)."""
    given = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 8, **settings}
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.AdaLoraConfig(target_modules=["qkv", "attn.proj"], **given))


def peft_step(model, optimizer, batch, step) -> None:
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()
    model.base_model.update_and_allocate(step)
    optimizer.zero_grad()


def alive_in_peft(model) -> int:
    return sum(int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name)


def test_trap_finalisation_needs_an_exact_step_in_peft(tiny_vit, batch) -> None:
    """Without a call at total - tfinal, PEFT's last mask is that of a higher budget, for good. Ours is taken late."""
    theirs = peft_model(tiny_vit(depth=1), init_r=12)
    peer = torch.optim.AdamW(trained(theirs), 1e-2)
    ours, controller, optimizer = adaptive(tiny_vit, batch)
    optimizer.zero_grad()
    for step in (1, 2, 7, 8):  # 6 = 8 - 2 is left out
        peft_step(theirs, peer, batch, step)
        train_step(ours, controller, optimizer, batch, step)
    assert alive_in_peft(theirs) > 2 * 2  # target_r of two modules
    assert sum(current_ranks(ours).values()) == 8


def test_trap_finalisation_uses_the_scores_of_the_step_before_in_peft(tiny_vit) -> None:
    """PEFT stops scoring one step before it decides for good; ours includes the deciding step's gradients."""
    model = tiny_vit(depth=1)
    controller = AdaLoRAController(model, published(), TOTAL)
    adapters, generator = site_adapters(model), torch.Generator().manual_seed(0)
    peer = Peer(adapters)
    for step in (TOTAL - FINAL - 1, TOTAL - FINAL):
        random_gradients(adapters, generator)
        with torch.no_grad():
            for adapter in adapters.values():
                adapter.lora_lambda.normal_(generator=generator)
        peer.copy(adapters)
        before = dict(controller._triplet_scores)
        controller.update_importance_scores(model, step)
        if step < TOTAL - FINAL:
            peer.step(step)
        else:
            kept = {name: peer.scores(index) for index, name in enumerate(adapters)}
            peer.allocator.update_and_allocate(peer.holder, step, force_mask=True)
            for index, name in enumerate(adapters):
                assert torch.equal(peer.scores(index), kept[name])
                torch.testing.assert_close(kept[name], before[name], rtol=1e-5, atol=0)
                assert not torch.allclose(controller._triplet_scores[name], before[name], rtol=1e-2, atol=0)


def test_trap_the_penalty_never_reaches_a_plain_vision_model_in_peft(tiny_vit, batch) -> None:
    """PEFT adds it to the `.loss` of an output, and a timm model returns a tensor. Our loop adds it by name."""
    gradients = []
    for weight in (0.0, 50.0):
        model = peft_model(tiny_vit(depth=1), orth_reg_weight=weight)
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(without, penalized) for without, penalized in zip(*gradients, strict=True))
    moved = []
    for weight in (0.0, 50.0):
        model, controller, _ = adaptive(tiny_vit, batch, orthogonality_weight=weight)
        model.zero_grad()
        optimizer = torch.optim.SGD(trained(model), 1e-3)
        outcome = optimization_step(
            model, optimizer, F.cross_entropy(model(batch[0]), batch[1]), 1, hooks=[AllocationHook(controller)]
        )
        assert outcome.penalties.keys() == ({"orthogonality"} if weight else set())
        moved.append(next(iter(site_adapters(model).values())).lora_A.detach().clone())
    assert not torch.allclose(*moved)


def test_trap_new_weights_meet_old_gradients_in_peft(tiny_vit, batch) -> None:
    """PEFT is called after the optimizer's step; our scores take both from the same moment."""
    theirs = peft_model(tiny_vit(depth=1))
    peer = torch.optim.AdamW(trained(theirs), 1e-2)
    name, parameter = next((name, p) for name, p in theirs.named_parameters() if "lora_A" in name)
    F.cross_entropy(theirs(batch[0]), batch[1]).backward()
    parameter.grad.fill_(1.0)  # at lambda = 0 it is zero
    before = parameter.detach().clone()
    peer.step()
    theirs.base_model.update_and_allocate(1)
    ipt = theirs.base_model.rankallocator.ipt[name.removeprefix("base_model.model.")]
    torch.testing.assert_close(ipt, parameter.detach().abs())
    assert not torch.allclose(ipt, before.abs())
    model, controller, optimizer = adaptive(tiny_vit, batch)
    adapter = next(iter(site_adapters(model).values()))
    adapter.lora_A.grad.fill_(1.0)
    before = adapter.lora_A.detach().clone()
    controller.update_importance_scores(model, 1)
    optimizer.step()
    smooth = controller.tracker.state_dict()[f"smoothed/{controller.names[0]}/lora_A.sensitivity"]
    torch.testing.assert_close(smooth, 0.15 * before.abs())


def test_trap_masks_free_nothing_and_importance_is_not_saved_in_peft(tiny_vit, batch) -> None:
    theirs = peft_model(tiny_vit(depth=1), init_r=12)
    peer = torch.optim.AdamW(trained(theirs), 1e-2)
    ours, controller, optimizer = adaptive(tiny_vit, batch)
    optimizer.zero_grad()
    sizes = {}
    for step in range(1, 9):
        peft_step(theirs, peer, batch, step)
        train_step(ours, controller, optimizer, batch, step)
        sizes[step] = [
            (trainable_parameters(model), optimizer_bytes(o)) for model, o in ((theirs, peer), (ours, optimizer))
        ]
        if step == 4:
            importance = theirs.base_model.rankallocator.exp_avg_ipt
            assert importance
            saved = theirs.state_dict().values()
            assert not any(torch.equal(score, tensor) for score in importance.values() for tensor in saved)
            smoothed = [tensor for name, tensor in controller.state_dict()["tensors"].items() if "smoothed" in name]
            assert sum(bool(tensor.any()) for tensor in smoothed) == 2 * 3 * len(TARGETS)
    assert alive_in_peft(theirs) == 2 * 2 < 2 * 12
    assert sizes[8][0] == sizes[1][0]
    assert all(last < first for last, first in zip(sizes[8][1], sizes[1][1], strict=True))


def test_budget_course() -> None:
    generator = torch.Generator().manual_seed(0)
    sites = {f"site{i}": SiteAdapter(6, 6, 10, scale=1.0, generator=generator, parametrization="svd") for i in range(7)}
    theirs = Peer(sites, tinit=20, tfinal=30, total_step=150, deltaT=1, target_r=4).allocator
    ours = BudgetSchedule(70, 28, warmup_steps=20, update_frequency=1, final_steps=30, total_steps=150)
    for step in range(1, 151):
        expected, _ = theirs.budget_schedule(step)
        assert ours.budget_at(step) == expected
