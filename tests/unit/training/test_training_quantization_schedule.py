"""Between float and quantized weights: gradients of the mixture, and what a trainer saves."""

import json

import numpy as np
import pytest
import torch
from qa_lora_settings import SILENT, scheduled
from torch.nn import functional as F

from peft_vit import QALoRATrainer
from peft_vit.core.training.quantized_layers import quantized_layers

pytestmark = [pytest.mark.part("trainer"), SILENT]


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


def test_a_state_is_plain_values_and_a_copy(tiny_vit) -> None:
    trainer = QALoRATrainer(model := tiny_vit(), scheduled(rank=2, balance_target=2.0), 8)
    state = trainer.state_dict()
    text = json.dumps(state)
    for step in range(1, 5):
        trainer.after_step(model, torch.optim.SGD(model.head.parameters(), 0.1), step)
    assert json.dumps(state) == text != json.dumps(trainer.state_dict())
    trainer.load_state_dict(json.loads(text), model)
    assert trainer.state_dict() == state
