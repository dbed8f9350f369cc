"""Between float and quantized weights: freed at 1 for good, gradients of the mixture, a run that is taken up again."""

import copy
import json

import numpy as np
import pytest
import torch
from qa_lora_settings import scheduled
from torch.nn import functional as F

from peft_vit import QALoRATrainer
from peft_vit.core.adapters import adapted_modules, adapter_bytes, load_trained, trained_tensors
from peft_vit.core.training.quantized_layers import quantized_layers

pytestmark = [
    pytest.mark.part("trainer"),
    pytest.mark.filterwarnings("ignore::peft_vit.base.errors.SilentNoEffectWarning"),
]


def step_with(model, trainer, optimizer, batch, step) -> None:
    trainer.training_step(model, optimizer, F.cross_entropy(model(batch[0]), batch[1]), step)


def adam(model) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("type", ["nf4", "int2"])
def test_gradients_of_a_mixed_weight_equal_plain_autograd(tiny_vit, batch, fill_adapters, kind, type) -> None:
    """The reference adds (1 - s) W + s Wq + scale * (B A) per group with torch's own operations, in float64."""
    bits = {"nf4": 4, "int2": 2}[type]
    settings = scheduled(rank=2, quantization_schedule=kind, quantization_type=type, quantization_bits=bits)
    model, plain = tiny_vit(), tiny_vit().double()
    trainer = QALoRATrainer(model, settings, 8)
    optimizer = torch.optim.SGD(model.head.parameters(), 0.0)
    for step in (1, 2, 3):
        trainer.after_step(model, optimizer, step)
    share = {"linear": 0.25, "cosine": (1 - np.cos(np.pi / 4)) / 2}[kind]
    assert trainer.share == pytest.approx(share, abs=1e-12)
    fill_adapters(model)
    images = batch[0].clone().requires_grad_()
    F.cross_entropy(model(images), batch[1]).backward()

    factors, weights = {}, dict(plain.named_parameters())
    for name, (module, _) in quantized_layers(model).items():
        low = module.quantized.dequantize().double()
        total = (1 - share) * weights[f"{name}.weight"].detach() + share * low
        rows = []
        for site, adapter in module.adapters():
            A, B = (p.detach().double().requires_grad_() for p in (adapter.lora_A, adapter.lora_B))
            factors[site.name] = (A, B)
            rows.append(adapter.scale * (B @ A).repeat_interleave(16, dim=1))
        weights[f"{name}.weight"] = total + torch.cat(rows)
    again = batch[0].double().requires_grad_()
    F.cross_entropy(torch.func.functional_call(plain, weights, (again,)), batch[1]).backward()

    torch.testing.assert_close(images.grad.double(), again.grad, rtol=1e-3, atol=1e-5)
    for module, _ in quantized_layers(model).values():
        assert module.weight.grad is None
        for site, adapter in module.adapters():
            A, B = factors[site.name]
            torch.testing.assert_close(adapter.lora_A.grad.double(), A.grad, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(adapter.lora_B.grad.double(), B.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "stop"),
    [
        ({}, 14),
        ({"quantization_schedule": "cosine", "balance_target": 2.0, "balance_by": "schedule_pace"}, 9),
        ({"gradient_scaling": "adaptive", "balance_target": 2.0}, 3),
    ],
)
def test_a_resumed_run_equals_one_that_was_not_interrupted(tiny_vit, batch, tmp_path, settings, stop) -> None:
    settings = scheduled(rank=2, quantization_end_step=12, **settings)
    model = tiny_vit()
    trainer, optimizer = QALoRATrainer(model, settings, 16), adam(model)
    for step in range(1, stop + 1):
        step_with(model, trainer, optimizer, batch, step)
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(adapter_bytes(model, {}))
    state, later = json.loads(json.dumps(trainer.state_dict())), trainer.state_dict()  # plain values, copies
    optimizer_state = copy.deepcopy(optimizer.state_dict())  # load_state_dict would share its tensors

    resumed = tiny_vit()
    after = QALoRATrainer(resumed, settings, 16)
    load_trained(resumed, file)
    again = adam(resumed)
    again.load_state_dict(optimizer_state)
    after.load_state_dict(state, resumed)
    assert all((module.weight is None) == (stop >= 12) for _, module in adapted_modules(resumed))
    for step in range(stop + 1, 17):
        step_with(model, trainer, optimizer, batch, step)
        step_with(resumed, after, again, batch, step)
    assert json.loads(json.dumps(later)) == state
    assert after.export_quantization_data() == trainer.export_quantization_data()
    for name, tensor in trained_tensors(model).items():
        assert torch.equal(trained_tensors(resumed)[name], tensor), name
