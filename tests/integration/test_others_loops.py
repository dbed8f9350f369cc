"""QALoRATrainer and the controller in others' loops: with PEFT's layers and with ours, in transformers' Trainer."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from qa_lora_settings import config
from torch import Tensor, nn
from torch.nn import functional as F

from peft_vit import AdaLoraConfig, AdaLoRAController, QALoRATrainer
from peft_vit.base.errors import SilentNoEffectWarning, UserError
from peft_vit.core.adapters import AdaptedLinear, adapted_modules, current_ranks, merge_by_requantizing, site_adapters
from peft_vit.core.adapters.peft_format import import_peft

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from peft_vit.integrations import AdaLoRACallback, QALoRACallback  # noqa: E402 - which needs transformers

pytestmark = [
    pytest.mark.part("trainer"),
    pytest.mark.filterwarnings("ignore::peft_vit.base.errors.SilentNoEffectWarning"),
]

STEPS = 8
ADAPTS = {"allocation_strategy": "proportional", "importance_metric": "gradient_norm", "warmup_steps": 2}
ADAPTS |= {"update_frequency": 2, "final_steps": 2}
TARGETS = ["qkv", "attn.proj", "fc1", "fc2"]


settings = partial(config, quantization_offset=False)
LINEAR = {"quantization_schedule": "linear", "quantization_warmup_steps": 2, "quantization_end_step": 6}


def wrapped(model, **changes):
    lora = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "modules_to_save": ["head"], **changes}
    return peft.get_peft_model(model, peft.LoraConfig(**lora))


def optimizer_of(model, rate: float = 1e-2):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)


def train(model, trainer, optimizer, batch, steps: int = STEPS) -> list[float]:
    return [
        trainer.training_step(model, optimizer, F.cross_entropy(model(batch[0]), batch[1]), step)["loss"]
        for step in range(1, steps + 1)
    ]


class WithLoss(nn.Module):
    """Returns the loss beside the logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def trainer_of(model: nn.Module, batch: tuple[Tensor, Tensor], folder: Path, steps: int, **options: Any) -> Any:
    """Return a Trainer that neither clips nor saves; `options` are further TrainingArguments."""
    arguments = {
        "max_steps": steps,
        "per_device_train_batch_size": len(batch[1]),
        "learning_rate": 1e-2,
        "max_grad_norm": 0,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **options,
    }
    return transformers.Trainer(
        model=WithLoss(model),
        args=transformers.TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=[{"pixel_values": x, "labels": y} for x, y in zip(*batch, strict=True)],
    )


def test_peft_layers_stand_on_quantized_weights(tiny_vit, batch) -> None:
    plain, model = tiny_vit(), wrapped(tiny_vit())
    trainer = QALoRATrainer(model, settings(), STEPS)
    bases = dict(adapted_modules(model))
    assert len(bases) == 8
    assert all(isinstance(base, AdaptedLinear) and base.weight is None and not base.sites for base in bases.values())
    assert trainer.relative_error.keys() == {
        name.split("base_model.model.")[1][: -len(".base_layer")] for name in bases
    }
    state = plain.state_dict()
    for name, module in bases.items():
        state[f"{name.split('base_model.model.')[1][:-11]}.weight"] = module.quantized.dequantize()
    plain.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model(batch[0]), plain(batch[0]), rtol=1e-4, atol=1e-4)  # fresh LoRA adds nothing
    measures = trainer.validate_quantization_adaptation_balance(
        model, reference=tiny_vit().state_dict(), images=batch[0]
    )
    assert measures["adapter_to_error_ratio"] == measures["error_removed_in_outputs"] == 0


def test_gradients_on_a_wrapped_model_equal_plain_autograd_times_the_factor(tiny_vit, batch) -> None:
    torch.manual_seed(0)
    model, reference = wrapped(tiny_vit(), init_lora_weights=False), wrapped(tiny_vit(), init_lora_weights=False)
    reference.load_state_dict(model.state_dict())
    trainer = QALoRATrainer(model, settings(gradient_scaling_factor=3.0), STEPS)
    for name, module in adapted_modules(model):
        reference.get_submodule(name).weight.data.copy_(module.quantized.dequantize())
    for each in (model, reference):
        F.cross_entropy(each(batch[0]), batch[1]).backward()
    trainer.before_step(model, 1)
    compared = 0
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            factor = 3.0 if "lora_" in name else 1.0
            torch.testing.assert_close(model.get_parameter(name).grad, factor * parameter.grad, rtol=1e-3, atol=1e-5)
            compared += 1
    assert compared == 8 * 2 + 2


def test_a_wrapped_model_learns_is_saved_and_is_merged_by_quantizing_anew(tiny_vit, batch, tmp_path) -> None:
    model = wrapped(tiny_vit())
    trainer = QALoRATrainer(model, settings(**LINEAR), 24)
    losses = train(model, trainer, optimizer_of(model), batch, 24)
    assert losses[-1] < 0.5 * losses[0]
    assert trainer.share == 1.0
    assert {m.weight for _, m in adapted_modules(model)} == {None}
    model.save_pretrained(str(tmp_path))
    model.eval()

    loaded = peft.PeftModel.from_pretrained(tiny_vit(), str(tmp_path)).eval()
    QALoRATrainer(loaded, settings(), 1)  # quantizes the weights under the adapter at once
    ours = tiny_vit().eval()
    import_peft(ours, tmp_path)
    QALoRATrainer(ours, settings(), 1)
    with torch.no_grad():
        trained = model(batch[0])
        assert torch.equal(loaded(batch[0]), trained)
        torch.testing.assert_close(ours.eval()(batch[0]), trained, rtol=1e-4, atol=1e-4)
        errors = merge_by_requantizing(ours)
        assert set(errors) == set(trainer.relative_error)
        assert 0 < max(errors.values()) < 0.2
        assert current_ranks(ours) == {}
        assert not torch.equal(ours(batch[0]), trained)


@pytest.mark.parametrize(
    ("changes", "lora", "message"),
    [
        ({"rank": 8}, {}, r"qa_lora\.rank: the model's adapters have ranks of their own; leave it out"),
        ({"scale": 1.0}, {}, r"qa_lora\.scale: the model's adapters have 2\.0; leave it out"),
        ({"targets": ("fc1",)}, {}, r"qa_lora\.targets: adapters are on fc1, fc2, key, out, query, value"),
        ({}, {"use_dora": True}, "Dora.* is more than plain LoRA"),
    ],
)
def test_what_peft_has_decided_is_not_decided_again(tiny_vit, changes, lora, message) -> None:
    with pytest.raises(UserError, match=message):
        QALoRATrainer(wrapped(tiny_vit(), **lora), settings(**changes), STEPS)


def test_what_has_no_effect_is_said(tiny_vit, batch, tmp_path) -> None:
    with pytest.warns(SilentNoEffectWarning, match="groups of 16 serve storage alone"):
        QALoRATrainer(wrapped(tiny_vit()), settings(quantization_offset=True), STEPS)
    model = tiny_vit()
    quantizer = QALoRATrainer(model, settings(gradient_scaling_factor=2.0, rank=2), 1)
    trainer = trainer_of(model, batch, tmp_path, steps=1)  # accelerate wraps its Adam
    trainer.add_callback(QALoRACallback(quantizer))
    with pytest.warns(SilentNoEffectWarning, match=r"gradient_scaling_factor 2\.0 nearly cancels under AdamW"):
        trainer.train()


@pytest.mark.part("controller")
@pytest.mark.parametrize("by_peft", [True, False])
def test_ranks_adapt_on_quantized_sites_in_ones_own_loop(tiny_vit, batch, by_peft) -> None:
    minimum = 1 if by_peft else 0
    ranks = AdaLoraConfig(
        total_rank_budget=20, minimum_rank=minimum, budget_schedule="constant" if by_peft else "cubic", **ADAPTS
    )
    model = wrapped(tiny_vit(), r=2) if by_peft else tiny_vit()
    controller = AdaLoRAController(model, ranks, STEPS, pool=1 if by_peft else 16)
    trainer = QALoRATrainer(model, settings(**LINEAR), STEPS)
    optimizer = optimizer_of(model)
    before = controller.ranks
    for step in range(1, STEPS + 1):
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        scores = controller.update_importance_scores(model, step)
        trainer.before_step(model, step)
        optimizer.step()
        controller.apply_ranks(model, optimizer, controller.reallocate_ranks(scores, step))
        trainer.after_step(model, optimizer, step)
        optimizer.zero_grad()
    assert controller.ranks == current_ranks(model) != before
    assert sum(controller.ranks.values()) == 20
    assert trainer.share == 1.0


@pytest.mark.parametrize("make", [lambda model: model, wrapped], ids=["ours", "peft"])
def test_transformers_trainer_does_what_a_plain_loop_does(tiny_vit, batch, tmp_path, make) -> None:
    def prepared():
        torch.manual_seed(0)
        model = make(tiny_vit())
        rank = {"rank": 2} if make is not wrapped else {}
        config = settings(**LINEAR, gradient_scaling_factor=2.0, balance_target=0.5, **rank)
        return model, QALoRATrainer(model, config, STEPS, clip_norm=None)

    model, quantizer = prepared()
    trainer = trainer_of(model, batch, tmp_path, STEPS, optim="sgd", lr_scheduler_type="constant")
    trainer.add_callback(QALoRACallback(quantizer))
    trainer.train()
    assert [row["share"] for row in quantizer.share_history] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert {module.weight for _, module in adapted_modules(model)} == {None}

    plain, by_hand = prepared()
    train(plain, by_hand, torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], 1e-2), batch)
    for name, adapter in site_adapters(plain).items():
        other = site_adapters(model)[name]
        assert adapter.lora_B.abs().sum() > 0
        # The same images at every step, in another order: sums differ in their last bits.
        torch.testing.assert_close(other.lora_B, adapter.lora_B, rtol=1e-2, atol=1e-4)
    scales = [row["gradient_scale"] for row in by_hand.balance_history]
    assert scales == pytest.approx([row["gradient_scale"] for row in quantizer.balance_history], rel=1e-2)


# --- the controller in transformers' Trainer ---


def with_peft(model):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["qkv", "fc1"], modules_to_save=["head"])
    adapted = peft.get_peft_model(model, config)
    return adapted, AdaLoraConfig(total_rank_budget=16, minimum_rank=1, budget_schedule="constant", **ADAPTS)


def with_ours(model):
    return model, AdaLoraConfig(total_rank_budget=24, budget_schedule="constant", **ADAPTS)


@pytest.mark.parametrize("place", [with_peft, with_ours])
@pytest.mark.parametrize("options", [{}, {"optim": "adamw_torch", "gradient_accumulation_steps": 2}, {"optim": "sgd"}])
@pytest.mark.part("controller")
def test_ranks_change_within_the_budget(tiny_vit, batch, tmp_path, place, options) -> None:
    model, config = place(tiny_vit())
    controller = AdaLoRAController(model, config, STEPS)
    before = controller.ranks
    trainer = trainer_of(model, batch, tmp_path, STEPS, **options)
    trainer.add_callback(AdaLoRACallback(controller))
    trainer.train()
    assert controller.ranks == current_ranks(model) != before
    assert sum(controller.ranks.values()) == config.total_rank_budget
    optimizer = trainer.optimizer.optimizer  # within accelerate's
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


@pytest.mark.part("controller")
def test_a_model_that_trainer_compiles_is_refused(tiny_vit, batch, tmp_path) -> None:
    model, config = with_peft(tiny_vit())
    controller = AdaLoRAController(model, config, STEPS)
    trainer = trainer_of(model, batch, tmp_path, STEPS, torch_compile=True, torch_compile_backend="eager")
    trainer.add_callback(AdaLoRACallback(controller))
    with pytest.raises(UserError, match=r"torch\.compile continues with the old tensors"):
        trainer.train()
