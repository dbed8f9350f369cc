"""The controller inside transformers' Trainer, with PEFT's layers and with ours."""

import pytest
from with_loss import trainer_of

from peft_vit import AdaLoraConfig, AdaLoRAController
from peft_vit.adapters import current_ranks
from peft_vit.errors import UserError

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.part("controller")

STEPS = 8


class AllocateRanks(transformers.TrainerCallback):
    def __init__(self, controller, trainer) -> None:
        self.controller, self.trainer = controller, trainer

    def on_train_begin(self, args, state, control, optimizer, **others) -> None:
        self.controller.attach(self.trainer.model_wrapped, optimizer)

    def on_pre_optimizer_step(self, args, state, control, model, **others) -> None:
        self.scores = self.controller.update_importance_scores(model, state.global_step + 1)

    def on_optimizer_step(self, args, state, control, model, optimizer, **others) -> None:
        ranks = self.controller.reallocate_ranks(self.scores, state.global_step + 1)
        self.controller.apply_ranks(model, optimizer, ranks)


def settings(**changes) -> AdaLoraConfig:
    return AdaLoraConfig(
        allocation_strategy="proportional",
        importance_metric="gradient_norm",
        warmup_steps=2,
        update_frequency=2,
        final_steps=2,
        budget_schedule="constant",
        **changes,
    )


def with_peft(model):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["qkv", "fc1"], modules_to_save=["head"])
    wrapped = peft.get_peft_model(model, config)
    return wrapped, settings(total_rank_budget=16, minimum_rank=1)


def with_ours(model):
    return model, settings(total_rank_budget=24)


@pytest.mark.parametrize("place", [with_peft, with_ours])
@pytest.mark.parametrize("options", [{}, {"optim": "adamw_torch", "gradient_accumulation_steps": 2}, {"optim": "sgd"}])
def test_ranks_change_within_the_budget(tiny_vit, batch, tmp_path, place, options) -> None:
    model, config = place(tiny_vit())
    controller = AdaLoRAController(model, config, STEPS)
    before = controller.ranks
    trainer = trainer_of(model, batch, tmp_path, STEPS, **options)
    trainer.add_callback(AllocateRanks(controller, trainer))
    trainer.train()
    assert controller.ranks == current_ranks(model) != before
    assert sum(controller.ranks.values()) == config.total_rank_budget
    optimizer = trainer.optimizer.optimizer  # within accelerate's
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_a_model_that_trainer_compiles_is_refused(tiny_vit, batch, tmp_path) -> None:
    model, config = with_peft(tiny_vit())
    controller = AdaLoRAController(model, config, STEPS)
    trainer = trainer_of(model, batch, tmp_path, STEPS, torch_compile=True, torch_compile_backend="eager")
    trainer.add_callback(AllocateRanks(controller, trainer))
    with pytest.raises(UserError, match=r"torch\.compile has fixed"):
        trainer.train()
