"""A factor on the adapters' gradients: under SGD one on their learning rate, layer by layer; under Adam nearly none."""

import copy
import warnings

import numpy as np
import pytest
import torch
from qa_lora_settings import SILENT, config
from torch.nn import functional as F

from peft_vit import QALoRATrainer
from peft_vit.base.errors import SilentNoEffectWarning
from peft_vit.core.adapters import trained_tensors
from peft_vit.core.training.quantized_layers import format_of, quantized_layers

pytestmark = [pytest.mark.part("trainer"), SILENT]
STEPS = 6


def train(model, batch, optimizer, trainer=None, steps: int = STEPS):
    for step in range(1, steps + 1):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        if trainer is None:  # the plain loop that a factor is compared with
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            trainer.training_step(model, optimizer, loss, step)
    return {name: tensor.clone() for name, tensor in trained_tensors(model).items()}


def prepared(tiny_vit, fill_adapters, **settings):
    trainer = QALoRATrainer(model := tiny_vit(), config(rank=2, **settings), STEPS, clip_norm=None)
    fill_adapters(model, std=0.02)
    return model, trainer


def moves(before, after) -> dict[str, torch.Tensor]:
    return {name: after[name] - before[name] for name in before}


ADAPTIVE = {"gradient_scaling": "adaptive", "gradient_scaling_factor": 3.0}


@pytest.mark.parametrize("settings", [{"gradient_scaling_factor": 3.0}, ADAPTIVE])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_under_sgd_it_is_a_learning_rate_for_each_layer(tiny_vit, batch, fill_adapters, settings, momentum) -> None:
    model, trainer = prepared(tiny_vit, fill_adapters, **settings)
    reference = copy.deepcopy(model)
    scales, rate = trainer.gradient_scales(), 0.01
    groups = [{"params": list(reference.head.parameters()), "lr": rate}]
    for name, layer in quantized_layers(reference).items():
        parameters = [parameter for _, adapter in layer.updates for parameter in adapter.parameters()]
        groups.append({"params": parameters, "lr": rate * scales[name]})
    expected = train(reference, batch, torch.optim.SGD(groups, momentum=momentum))
    trained = [p for p in model.parameters() if p.requires_grad]
    got = train(model, batch, torch.optim.SGD(trained, rate, momentum=momentum), trainer)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [{"gradient_scaling_factor": 8.0}, {**ADAPTIVE, "gradient_scaling_factor": 8.0}])
def test_under_adam_it_nearly_cancels_without_clipping_and_decay(tiny_vit, batch, fill_adapters, settings) -> None:
    def run(optimizer_class, **given):
        model, trainer = prepared(tiny_vit, fill_adapters, **given)
        before = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}
        rate = 1e-3 if optimizer_class is torch.optim.AdamW else 1e-2
        kwargs = {"weight_decay": 0.0} if optimizer_class is torch.optim.AdamW else {}
        optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], rate, **kwargs)
        return moves(before, train(model, batch, optimizer, trainer))

    def distance(optimizer_class) -> float:
        plain, scaled = run(optimizer_class), run(optimizer_class, **settings)
        adapters = [name for name in plain if not name.startswith("head")]
        difference = sum(float((scaled[name] - plain[name]).square().sum()) for name in adapters)
        return np.sqrt(difference / sum(float(plain[name].square().sum()) for name in adapters))

    assert distance(torch.optim.AdamW) < 0.02
    assert distance(torch.optim.SGD) > 1


def test_the_adaptive_factor_follows_the_layers_relative_error(tiny_vit, batch, fill_adapters) -> None:
    plain, model, settings = tiny_vit(), tiny_vit(), config(rank=2, **ADAPTIVE)
    formats = {"blocks.0.mlp.fc1": format_of(settings, "int2"), "blocks.1.mlp.fc1": format_of(settings, "int8")}
    trainer = QALoRATrainer(model, settings, 8, formats=formats)
    errors = {}
    for name, layer in quantized_layers(model).items():
        weight = plain.get_submodule(name).weight.detach().double().numpy()
        difference = weight - layer.module.quantized.dequantize().double().numpy()
        errors[name] = np.linalg.norm(difference) / np.linalg.norm(weight)
    scales = trainer.gradient_scales()
    assert scales == pytest.approx({name: 3 * e / np.mean(list(errors.values())) for name, e in errors.items()})
    assert scales["blocks.0.mlp.fc1"] > 20 * scales["blocks.1.mlp.fc1"]
    fill_adapters(model)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    trainer.before_step(model, 1)
    for name, gradient in before.items():
        layer = next((layer for layer in scales if name.startswith(f"{layer}.")), None)
        expected = gradient * (1.0 if layer is None else scales[layer])  # the head's stays
        torch.testing.assert_close(model.get_parameter(name).grad, expected)


@pytest.mark.parametrize(
    ("settings", "optimizer", "cancelled"),
    [
        ({"gradient_scaling": "adaptive"}, torch.optim.Adam, "gradient_scaling: adaptive"),
        ({"gradient_scaling_factor": 1.5}, torch.optim.AdamW, "gradient_scaling_factor 1.5"),
        ({"balance_target": 1.0}, torch.optim.AdamW, "balance_by: gradient_scale"),
        (ADAPTIVE, torch.optim.Adam, "gradient_scaling_factor 3.0 and gradient_scaling: adaptive"),
        ({}, torch.optim.AdamW, None),
        (ADAPTIVE, torch.optim.SGD, None),
    ],
)
def test_what_adam_cancels_is_said_once(tiny_vit, batch, fill_adapters, settings, optimizer, cancelled) -> None:
    model, trainer = prepared(tiny_vit, fill_adapters, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, batch, optimizer([p for p in model.parameters() if p.requires_grad], 1e-3), trainer)
    texts = [str(entry.message) for entry in caught if entry.category is SilentNoEffectWarning]
    assert len(texts) == (cancelled is not None)
    assert all(text.startswith(f"{cancelled} nearly cancel") for text in texts)
