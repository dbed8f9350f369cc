"""One step: task gradient, hooks, penalties, clipping; rates that fall from the head to the embeddings; refusals."""

import allocation_runs
import numpy as np
import pytest
import torch
from timm.optim import param_groups_layer_decay
from tiny_models import TINY_FAMILIES, random_model
from torch.nn import functional as F

from peft_vit import AdaLoRAController
from peft_vit.base.errors import DivergedError, UserError
from peft_vit.core.adapters import freeze_backbone, site_adapters
from peft_vit.core.backbones import Backbone
from peft_vit.core.config import TrainingConfig
from peft_vit.core.training import AllocationHook, Hook, optimization_step
from peft_vit.core.training.optimization import build_optimizer, build_scheduler, layer_groups

pytestmark = pytest.mark.part("trainer")

RATE = 0.1


class Recorder(Hook):
    """A hook that notes what it saw."""

    name = "recorder"

    def __init__(self, penalty: float = 0.0) -> None:
        self.penalty = penalty
        self.seen = None
        self.whole = None

    def penalties(self, model):
        return {"pull": self.penalty * model.head.bias.square().sum()} if self.penalty else {}

    def after_backward(self, model, step) -> None:
        self.seen = model.head.bias.grad.clone()

    def before_step(self, model, step) -> None:
        self.whole = model.head.bias.grad.clone()

    def after_step(self, model, optimizer, step) -> None:
        assert model.head.bias.grad is not None  # not yet cleared


def probe(tiny_vit):
    model = tiny_vit()
    freeze_backbone(model)
    return model, torch.optim.SGD(model.head.parameters(), RATE)


def step_from(model, optimizer, batch, **settings):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    outcome = optimization_step(model, optimizer, F.cross_entropy(model(batch[0]), batch[1]), 1, **settings)
    return outcome, {name: p.detach() - before[name] for name, p in model.named_parameters()}


def test_a_plain_step_and_one_that_is_clipped(tiny_vit, batch) -> None:
    model, optimizer = probe(tiny_vit)
    loss = F.cross_entropy(model(batch[0]), batch[1])
    gradients = torch.autograd.grad(loss, list(model.head.parameters()))
    outcome, moved = step_from(model, optimizer, batch)
    assert outcome.loss == loss.item()
    assert outcome.gradient_norm == pytest.approx(np.sqrt(sum((g.numpy() ** 2).sum() for g in gradients)), rel=1e-5)
    torch.testing.assert_close(moved["head.weight"], -RATE * gradients[0], rtol=1e-4, atol=1e-7)
    assert all(not change.any() for name, change in moved.items() if not name.startswith("head"))
    assert model.head.weight.grad is None
    clipped, moved = step_from(*probe(tiny_vit), batch, clip_norm=0.01)
    assert clipped.gradient_norm == outcome.gradient_norm > 0.1  # before clipping
    length = torch.cat([moved["head.weight"].flatten(), moved["head.bias"]]).norm()
    assert length.item() == pytest.approx(RATE * 0.01, rel=1e-3)


def test_penalties_reach_the_step_and_the_hooks_only_before_it(tiny_vit, batch) -> None:
    outcomes = []
    for penalty in (0.0, 3.0):
        model, optimizer = probe(tiny_vit)
        bias, hook = model.head.bias.detach().clone(), Recorder(penalty)
        outcome, moved = step_from(model, optimizer, batch, hooks=[hook])
        outcomes.append((hook, moved["head.bias"], outcome))
    (plain_hook, plain_moved, plain), (hook, moved, penalized) = outcomes
    assert torch.equal(hook.seen, plain_hook.seen)
    assert torch.equal(plain_hook.whole, plain_hook.seen)
    torch.testing.assert_close(hook.whole - hook.seen, 3.0 * 2 * bias, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moved - plain_moved, -RATE * 3.0 * 2 * bias, rtol=1e-4, atol=1e-6)
    assert plain.penalties == {}
    assert penalized.penalties == pytest.approx({"pull": 3.0 * bias.square().sum().item()})
    assert penalized.loss == plain.loss


def adaptive(model, weight: float | None, parametrization: str = "svd", **settings) -> AllocationHook:
    of_all = {"total_rank_budget": 24, "allocation_strategy": "global", "update_frequency": 1, "final_steps": 0}
    own = {"importance_metric": "sensitivity", "parametrization": parametrization, "orthogonality_weight": weight}
    config = allocation_runs.config(**of_all, **own | settings)
    return AllocationHook(AdaLoRAController(model, config, 4))


@pytest.mark.parametrize("weight", [0.5, None])
def test_orthogonality_equals_numpy_moves_the_factors_and_leaves_the_scores(
    tiny_vit, batch, fill_adapters, weight
) -> None:
    results = []
    for used in (0.0, weight):
        model = tiny_vit()
        hook = adaptive(model, used)
        fill_adapters(model)
        terms = []
        for adapter in site_adapters(model).values():
            A, B = adapter.lora_A.detach().double().numpy(), adapter.lora_B.detach().double().numpy()
            eye = np.eye(adapter.rank)
            terms += [np.linalg.norm(B.T @ B - eye), np.linalg.norm(A @ A.T - eye)]
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE)
        outcome, moved = step_from(model, optimizer, batch, hooks=[hook])
        results.append((outcome, moved, hook._scores, np.mean(terms)))
    (plain, plain_moved, plain_scores, _), (penalized, moved, scores, mean) = results
    assert plain.penalties == {}
    assert penalized.penalties["orthogonality"] == pytest.approx((0.1 if weight is None else weight) * mean, rel=1e-5)
    assert penalized.loss == plain.loss
    assert scores == plain_scores
    assert min(scores.values()) > 0
    assert adaptive(product := tiny_vit(), None, "product").penalties(product) == {}
    for name in plain_moved:
        if "lora_A" in name or "lora_B" in name:
            assert not torch.allclose(moved[name], plain_moved[name], rtol=1e-3, atol=0), name
        else:
            assert torch.equal(moved[name], plain_moved[name]), name


@pytest.mark.parametrize("metric", ["gradient_norm", "fisher", "sensitivity"])
def test_scores_contain_the_penaltys_gradient_where_asked_for(tiny_vit, batch, fill_adapters, metric) -> None:
    scores, triplets = {}, {}
    for kind in ("task", "task_and_penalty"):
        model = tiny_vit()
        hook = adaptive(model, 0.5, importance_gradient=kind, importance_metric=metric)
        fill_adapters(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE)
        step_from(model, optimizer, batch, hooks=[hook], clip_norm=1e-3)  # clipping comes after both
        scores[kind], triplets[kind] = hook._scores, hook.controller._triplet_scores
    for name, score in scores["task"].items():
        assert scores["task_and_penalty"][name] != pytest.approx(score, rel=1e-3)
    model = tiny_vit()
    hook = adaptive(model, 0.5, importance_metric=metric)
    fill_adapters(model)
    loss = F.cross_entropy(model(batch[0]), batch[1]) + hook.penalties(model)["orthogonality"]
    loss.backward()  # as the official code does: one backward pass of the sum
    expected = hook.controller.update_importance_scores(model, 1)
    assert scores["task_and_penalty"] == pytest.approx(expected, rel=1e-4)


def test_parameters_that_the_optimizer_lacks_are_named(tiny_vit, batch) -> None:
    model, _ = probe(tiny_vit)
    with pytest.raises(UserError, match=r"^head\.weight: .*optimizer"):
        step_from(model, torch.optim.SGD([model.head.bias], RATE), batch)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    loss = torch.tensor(1.0, requires_grad=True) * 2
    model.zero_grad()
    with pytest.raises(UserError, match="no parameter received a gradient"):
        optimization_step(model, torch.optim.SGD([model.head.bias], RATE), loss, 1)


def test_an_optimizer_that_can_not_follow_a_change_of_rank_is_refused_without_attach_too(tiny_vit, batch) -> None:
    hook = adaptive(model := tiny_vit(), 0.0)
    optimizer = torch.optim.RMSprop([p for p in model.parameters() if p.requires_grad], RATE)
    with pytest.raises(UserError, match=r"^optimizer: RMSprop can't follow a change of rank"):
        hook.attach(model, optimizer)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    hook.after_backward(model, 1)
    with pytest.raises(UserError, match="can't follow a change of rank"):
        hook.after_step(model, optimizer, 1)  # no decision yet


def test_a_diverged_loss_or_gradient_stops_before_the_step(tiny_vit, batch) -> None:
    model, optimizer = probe(tiny_vit)
    before = model.head.weight.detach().clone()
    parts = (model(batch[0]).sum() * factor for factor in (1.0, torch.nan, 1.0))
    for loss in (model(batch[0]).sum() * torch.nan, parts):
        with pytest.raises(DivergedError, match="the loss is nan at step 3; lower the learning rate"):
            optimization_step(model, optimizer, loss, 3)
    model.zero_grad()
    with pytest.raises(DivergedError, match=r"the gradient norm is (inf|nan) at step 3"):
        optimization_step(model, optimizer, (model(batch[0]) * 0 + model.head.bias.sum() * 0).sqrt().sum(), 3)
    assert torch.equal(model.head.weight, before)


DECAY = 0.6


def rates(model, learning_rate=1.0) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = layer_groups(model, learning_rate, DECAY)
    assert groups[0]["lr"] == learning_rate  # what the record calls the learning rate
    return {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}


def as_mae(name: str, blocks: int) -> int:
    """Return the layer by MAE's get_layer_id_for_vit, util/lr_decay.py, which agrees with BEiT's."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else blocks + 1


@pytest.mark.parametrize("model", ["test_vit", "vit_tiny_patch16_224"])
def test_a_plain_model_has_the_rates_of_mae_and_of_timm_but_for_the_last_norm(model) -> None:
    made = random_model(model)
    rate_of = rates(made)
    depth = len(Backbone(made).blocks)
    assert rate_of == pytest.approx(
        {name: DECAY ** (depth + 1 - as_mae(name, depth)) for name, _ in made.named_parameters()}
    )
    names = {id(parameter): name for name, parameter in made.named_parameters()}
    for group in param_groups_layer_decay(made, layer_decay=DECAY):
        for parameter in group["params"]:
            name = names[id(parameter)]
            if not name.startswith(("norm", "fc_norm")):  # timm has it with the last block, BEiT and MAE with the head
                assert rate_of[name] == pytest.approx(group["lr_scale"]), name


@pytest.mark.parametrize("model", [*TINY_FAMILIES, "pvt_v2_b0"])  # the last is of no family that is described
def test_every_family_has_every_parameter_once_and_blocks_rise_to_the_head(model) -> None:
    made = random_model(model)
    rate_of = rates(made)
    assert rate_of.keys() == dict(made.named_parameters()).keys()
    blocks = Backbone(made).blocks
    for place, block in enumerate(blocks):
        (rate,) = {rate for name, rate in rate_of.items() if name.startswith(f"{block}.")}
        assert rate == pytest.approx(DECAY ** (len(blocks) - place))
    assert {rate_of[name] for name in Backbone(made).of_head(rate_of)} == {1.0}
    first = [name for name in rate_of if name.startswith(("patch_embed", "embeds", "cls_token", "pos_embed"))]
    assert first
    assert all(rate_of[name] == pytest.approx(DECAY ** (len(blocks) + 1)) for name in first)


def test_what_joins_two_stages_goes_with_the_block_that_it_feeds() -> None:
    rate_of = rates(random_model("tiny_swin"))
    joins = {rate for name, rate in rate_of.items() if "downsample" in name}
    assert joins == {rate_of["layers.1.blocks.0.mlp.fc1.weight"]}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("schedule", ["one_cycle", "constant", "warmup_stable_decay"])
def test_a_step_goes_as_far_as_its_layer_s_rate_and_schedules_keep_the_ratios(optimizer, schedule) -> None:
    model = random_model("test_vit")
    config = TrainingConfig(
        steps=10, learning_rate=1e-3, layer_decay=DECAY, optimizer=optimizer, schedule=schedule, weight_decay=0.0
    )
    made = build_optimizer(model, config)
    scheduler, _ = build_scheduler(made, config, 10)
    expected = rates(model)
    for _ in range(3):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        top = made.param_groups[0]["lr"]
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        made.step()
        scheduler.step()
        head = (before["head.bias"] - model.head.bias).abs().max()
        for name, parameter in model.named_parameters():
            moved = (before[name] - parameter.detach()).abs().max()
            assert moved.item() == pytest.approx(expected[name] * head.item(), rel=0.02, abs=2e-7), (name, top)
