"""Learning rates fall from the head to the embeddings, as in timm, BEiT and MAE, in every family."""

import pytest
import torch
from timm.optim import param_groups_layer_decay
from tiny_models import TINY_FAMILIES, random_model

from peft_vit.core.backbones import Backbone
from peft_vit.core.config import TrainingConfig
from peft_vit.core.training.optimization import build_optimizer, build_scheduler, layer_groups

pytestmark = pytest.mark.part("trainer")
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
