"""Predicted losses and gains against gradients and divergences of copies of the model, computed one by one."""

import copy

import numpy as np
import pytest
import torch
from tiny_models import TINY_EVAS, random_model
from torch.nn import functional as F

from peft_vit.base.errors import UserError
from peft_vit.base.seeding import torch_generator
from peft_vit.core.allocation import loss_prediction
from peft_vit.core.allocation.loss_prediction import fit_head, layer_losses, rank_gains
from peft_vit.core.backbones import find_sites
from peft_vit.core.quantization import QuantizationFormat, quantize

pytestmark = pytest.mark.part("quantization")
FORMATS = [QuantizationFormat(type, 16, True, torch.float16) for type in ("int2", "int4", "int8")]


def layers(model) -> list[str]:
    return list(dict.fromkeys(site.module for site in find_sites(model)))


def features(model, images):
    return model.forward_head(model.forward_features(images), pre_logits=True)


def measured(model, batch, by: str, seed: int = 3):
    head, _ = fit_head(model, *batch)
    return head, layer_losses(model, dict.fromkeys(layers(model), FORMATS), batch[0], head, by=by, seed=seed)


@pytest.mark.parametrize("classes", [2, 5])
def test_the_head_is_where_the_penalized_loss_is_least(tiny_vit, classes) -> None:
    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = 3 * (torch.arange(12) % classes)  # labels need not be 0, 1, 2
    model = tiny_vit().eval()
    head, places = fit_head(model, images, labels)
    assert places.tolist() == (labels // 3).tolist()
    with torch.no_grad():
        x = features(model, images).double()
    spread = (x - x.mean(0)).square().sum(1).mean().sqrt()
    weight = (head.weight.double() * spread).requires_grad_()
    bias = head.bias.double().requires_grad_()
    logits = x @ (weight / spread).T + bias
    penalty = weight.square().sum() / 2 if classes > 2 else (weight[1] - weight[0]).square().sum() / 2
    loss = penalty + 4 * F.cross_entropy(logits, places, reduction="sum")
    assert head.weight.shape == (classes, 64)
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert gradient.abs().max() < 1e-2 * loss.item()


def test_fisher_equals_squared_gradients_one_image_at_a_time(tiny_vit, batch) -> None:
    model = tiny_vit()
    head, losses = measured(model, batch, "fisher")
    double = copy.deepcopy(model).double().eval()
    logits = head(features(model.eval(), batch[0]))
    drawn = torch.multinomial(logits.softmax(1), 1, generator=torch_generator(3, "calibration")).squeeze(1)
    weights = [double.get_submodule(name).weight for name in layers(model)]
    fisher = [torch.zeros_like(weight) for weight in weights]
    for image, label in zip(batch[0].double(), drawn, strict=True):
        z = features(double, image[None]) @ head.weight.double().T + head.bias.double()
        gradients = torch.autograd.grad(F.cross_entropy(z, label[None]), weights)
        fisher = [total + gradient**2 / 6 for total, gradient in zip(fisher, gradients, strict=True)]
    for name, weight, square in zip(layers(model), weights, fisher, strict=True):
        errors = [quantize(weight.float(), format).dequantize().double() - weight for format in FORMATS]
        expected = [(square * error**2).sum().item() / 2 for error in errors]
        assert losses[name] == pytest.approx(expected, rel=1e-3)
        assert expected[0] > expected[1] > expected[2] > 0


@pytest.mark.parametrize("made", [None, *TINY_EVAS, "tiny_pool", "tiny_parallel", "tiny_swin", "tiny_hiera"])
def test_loss_equals_the_divergence_of_a_quantized_copy(tiny_vit, batch, made) -> None:
    model = tiny_vit() if made is None else random_model(made)
    head, losses = measured(model, batch, "loss")
    model.eval()
    with torch.no_grad():
        p = head(features(model, batch[0])).double().softmax(1).numpy()
        for name in layers(model):
            for place, format in enumerate(FORMATS):
                other = copy.deepcopy(model)
                weight = other.get_submodule(name).weight
                weight.copy_(quantize(weight, format).dequantize())
                q = head(features(other, batch[0])).double().softmax(1).numpy()
                assert losses[name][place] == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("pool", [1, 16])
def test_gains_follow_the_gradients_best_low_rank_parts(tiny_vit, batch, pool) -> None:
    model = tiny_vit()
    sites = find_sites(model, ("query", "value", "fc2"))
    head, places = fit_head(model, *batch)
    gains = rank_gains(model, sites, batch[0], places, head, pool=pool)
    double = copy.deepcopy(model).double().eval()
    z = features(double, batch[0].double()) @ head.weight.double().T + head.bias.double()
    loss = F.cross_entropy(z, batch[1])
    bounds = {}
    for site in sites:
        weight = double.get_submodule(site.module).weight
        (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
        rows = site.span
        pooled = gradient[rows].numpy().reshape(site.out_features, -1, pool).sum(2)
        u, s, v = np.linalg.svd(pooled, full_matrices=False)
        assert len(gains[site.name]) == min(site.out_features, site.in_features // pool) + 1
        bounds[site.name] = [
            np.linalg.norm(weight.detach().numpy()[rows]) * np.linalg.norm(u[:, :rank] * s[:rank] @ v[:rank])
            for rank in range(len(s) + 1)
        ]
    total = sum(bound[-1] for bound in bounds.values())
    for name, bound in bounds.items():
        np.testing.assert_allclose(gains[name], float(loss) * np.array(bound) / total, rtol=1e-3, atol=1e-9)
        assert gains[name][0] == 0
        assert (np.diff(gains[name], 2) <= 1e-9).all()  # each rank gains no more than the one before
    assert sum(gain[-1] for gain in gains.values()) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("by", ["fisher", "loss"])
def test_batches_of_any_size_give_the_same_and_the_model_is_left_alone(tiny_vit, batch, by, monkeypatch) -> None:
    model = tiny_vit()
    model.head.weight.requires_grad_(False)
    before = {name: (p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    head, whole = measured(model, batch, by)
    monkeypatch.setattr(loss_prediction, "BACKWARD_IMAGES", 3)
    monkeypatch.setattr(loss_prediction, "_FORWARD_IMAGES", 4)
    parts = layer_losses(model, dict.fromkeys(layers(model), FORMATS), batch[0], head, by=by, seed=3)
    for name, losses in whole.items():
        assert parts[name] == pytest.approx(losses, rel=1e-3, abs=1e-8)
    assert model.training
    for name, parameter in model.named_parameters():
        same, value, trainable = before[name]
        assert parameter is same
        assert parameter.grad is None
        assert parameter.requires_grad == trainable
        assert torch.equal(parameter, value)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_images_of_one_class_measure_nothing(tiny_vit, batch) -> None:
    with pytest.raises(UserError, match=r"adaptive_bits\.calibration_images: the 6 .* all of one class.* use more"):
        fit_head(tiny_vit(), batch[0], torch.ones_like(batch[1]))
