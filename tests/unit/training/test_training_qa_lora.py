"""QALoRATrainer: layers it packs, a schedule that ends at exactly 1, freed weights, scaled gradients, its state."""

import copy
import gc
import json
import warnings
import weakref
from functools import partial

import allocation_runs
import numpy as np
import pytest
import qa_lora_settings
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from peft_vit import AdaLoRAController, QALoRATrainer
from peft_vit.base.errors import SilentNoEffectWarning
from peft_vit.core.adapters import adapted_modules, attach_adapters, current_ranks, site_adapters, trained_tensors
from peft_vit.core.adapters.footprint import frozen_bytes
from peft_vit.core.backbones import find_sites
from peft_vit.core.training.qa_lora import end_step, quantized_share
from peft_vit.core.training.quantized_layers import format_of, quantized_layers

pytestmark = [pytest.mark.part("trainer"), qa_lora_settings.SILENT]


RATE = 0.1
config, linear = partial(qa_lora_settings.config, rank=2), partial(qa_lora_settings.scheduled, rank=2)


def sgd(model) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE)


def do_step(model, trainer, optimizer, batch, step):
    return trainer.training_step(model, optimizer, F.cross_entropy(model(batch[0]), batch[1]), step)


@pytest.mark.part("quantization")
def test_schedules() -> None:
    steps = range(9)
    assert [quantized_share(config(), 8, step) for step in steps] == [1.0] * 9
    assert [quantized_share(linear(), 8, step) for step in steps] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    cosine = [quantized_share(linear(quantization_schedule="cosine"), 8, step) for step in steps]
    t = np.clip((np.arange(9) - 2) / 4, 0, 1)
    np.testing.assert_allclose(cosine, (1 - np.cos(np.pi * t)) / 2, atol=1e-12)
    assert cosine[6:] == [1.0, 1.0, 1.0]
    assert end_step(linear(quantization_warmup_steps=0, quantization_end_step=None), 48) == 32  # two thirds


@given(
    kind=st.sampled_from(["linear", "cosine"]),
    warmup=st.integers(0, 50),
    length=st.integers(1, 80),
    rest=st.integers(0, 50),
)
def test_every_schedule_rises_from_0_to_exactly_1(kind, warmup, length, rest) -> None:
    end = warmup + length
    settings = linear(quantization_schedule=kind, quantization_warmup_steps=warmup, quantization_end_step=end)
    shares = [quantized_share(settings, end + rest, step) for step in range(end + rest + 1)]
    assert shares == sorted(shares)
    assert set(shares[: warmup + 1]) == {0.0}
    assert set(shares[end:]) == {1.0}
    assert all(0 < share < 1 for share in shares[warmup + 1 : end])


@pytest.mark.part("quantization")
@pytest.mark.parametrize("grouped", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_float_weights_are_freed_at_share_one(tiny_vit, batch, grouped) -> None:
    model = tiny_vit()
    settings = linear(use_group_quantization=grouped, **({} if grouped else {"group_size": 32}))
    trainer = QALoRATrainer(model, settings, 8)
    optimizer = sgd(model)
    watched = [weakref.ref(module.weight) for _, module in adapted_modules(model)]
    weights = sum(module.weight.nbytes for _, module in adapted_modules(model))
    shares, sizes = [], []
    for step in range(1, 9):
        shares.append(do_step(model, trainer, optimizer, batch, step)["quantized_share"])
        gc.collect()
        assert all((reference() is None) == (step >= 6) for reference in watched)
        sizes.append(frozen_bytes(model))
    assert shares == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert sizes[4] - sizes[5] == weights
    packed = {name: module.quantized.bits_per_weight for name, module in adapted_modules(model)}
    overhead = {"qkv": 32 / 16, "fc2": 32 / 16} if grouped else {"qkv": 16 / 64, "fc2": 16 / 128}
    for name, bits in packed.items():
        if name.rpartition(".")[2] in overhead:
            assert bits == 8 + overhead[name.rpartition(".")[2]]
    assert trainer.bits_history == [
        {"step": 0, "bits_per_weight": {name: 32 + bits for name, bits in packed.items()}},
        {"step": 6, "bits_per_weight": packed},
    ]
    assert [trainer.deployable(step) for step in (5, 6, 8)] == [False, True, True]


@pytest.mark.part("quantization")
def test_a_constant_schedule_starts_quantized(tiny_vit, batch) -> None:
    plain, model = tiny_vit(), tiny_vit()
    trainer = QALoRATrainer(model, config(), 8)
    assert trainer.share == 1.0
    assert trainer.deployable(0)
    assert [row["step"] for row in trainer.bits_history] == [0]
    assert set(trainer.bits_history[0]["bits_per_weight"].values()) == {4 + 32 / 16}
    assert all(module.weight is None for _, module in adapted_modules(model))
    state = plain.state_dict()
    for name, module in adapted_modules(model):
        state[f"{name}.weight"] = module.quantized.dequantize()
    plain.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(model(batch[0]), plain(batch[0]))  # untrained adapters add nothing


def test_clipping_comes_after_scaling(tiny_vit, batch, fill_adapters) -> None:
    def step(clip_norm: float | None) -> tuple[float, dict[str, torch.Tensor]]:
        trainer = QALoRATrainer(model := tiny_vit(), config(gradient_scaling_factor=3.0), 8, clip_norm=clip_norm)
        fill_adapters(model)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        row = do_step(model, trainer, sgd(model), batch, 1)
        assert all(p.grad is None for p in model.parameters())
        return row["gradient_norm"], {name: model.get_parameter(name).detach() - p for name, p in before.items()}

    norm, moved = step(None)
    same_norm, clipped = step(norm / 7)
    assert same_norm == norm
    for name, change in clipped.items():
        torch.testing.assert_close(change, moved[name] / 7, rtol=1e-3, atol=1e-6)


def test_a_change_of_type_leaves_packed_weights_as_they_are(tiny_vit, batch) -> None:
    model = tiny_vit()
    QALoRATrainer(model, config(), 10)
    before = model(batch[0])
    assert torch.equal(model.float()(batch[0]), before)
    assert {m.quantized.scales.dtype for _, m in adapted_modules(model.bfloat16())} == {torch.float16}


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("type", ["nf4", "int2"])
def test_gradients_of_a_mixed_weight_equal_plain_autograd(tiny_vit, batch, fill_adapters, kind, type) -> None:
    """The reference adds (1 - s) W + s Wq + scale * (B A) per group with torch's own operations, in float64."""
    bits = {"nf4": 4, "int2": 2}[type]
    settings = linear(quantization_schedule=kind, quantization_type=type, quantization_bits=bits)
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
    trainer = QALoRATrainer(model := tiny_vit(), linear(balance_target=2.0), 8)
    state = trainer.state_dict()
    text, exported = json.dumps(state), trainer.export_quantization_data()
    for step in range(1, 5):
        trainer.after_step(model, torch.optim.SGD(model.head.parameters(), 0.1), step)
    assert json.dumps(state) == text != json.dumps(trainer.state_dict())
    trainer.load_state_dict(json.loads(text), model)
    assert trainer.state_dict() == state
    assert trainer.export_quantization_data() == exported


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
    trainer = QALoRATrainer(model := tiny_vit(), config(**settings), STEPS, clip_norm=None)
    fill_adapters(model, std=0.02)
    return model, trainer


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


def test_the_adaptive_factor_follows_the_layers_relative_error(tiny_vit, batch, fill_adapters) -> None:
    plain, model, settings = tiny_vit(), tiny_vit(), config(**ADAPTIVE)
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


def with_adapters(model, *, rank: int = 2, pool: int = 16, scale: float = 2.0, targets=("query", "fc1")):
    attach_adapters(model, find_sites(model, targets), rank, scale=scale, seed=0, pool=pool)
    return model


def test_formats_and_ranks_can_be_given_by_name(tiny_vit) -> None:
    model, settings = tiny_vit(), qa_lora_settings.config(targets=("query", "fc1"))
    ranks = {"blocks.0.attn.query": 0, "blocks.0.mlp.fc1": 1, "blocks.1.attn.query": 2, "blocks.1.mlp.fc1": 3}
    formats = {"blocks.1.mlp.fc1": format_of(settings, "int2")}
    trainer = QALoRATrainer(model, settings, 8, ranks=ranks, formats=formats)
    assert current_ranks(model) == ranks
    types = {name: module.quantized.format.type for name, module in adapted_modules(model)}
    expected = dict.fromkeys(("blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.attn.qkv"), "nf4")
    assert types == expected | {"blocks.1.mlp.fc1": "int2"}
    assert trainer.relative_error["blocks.1.mlp.fc1"] > 2 * trainer.relative_error["blocks.0.mlp.fc1"]
    assert trainer.bits_history[0]["bits_per_weight"]["blocks.1.mlp.fc1"] == 2 + 32 / 16


def test_adapters_that_are_there_are_taken_as_they_are(tiny_vit, batch, fill_adapters) -> None:
    model, fresh = with_adapters(tiny_vit()), tiny_vit()
    fill_adapters(model)
    before = {name: (adapter.lora_A, adapter.lora_A.clone()) for name, adapter in site_adapters(model).items()}
    QALoRATrainer(model, qa_lora_settings.config(), 8)
    for name, adapter in site_adapters(model).items():
        assert adapter.lora_A is before[name][0]
        assert torch.equal(adapter.lora_A, before[name][1])
    QALoRATrainer(fresh, config(targets=("query", "fc1")), 8)
    fill_adapters(fresh)
    with torch.no_grad():
        assert torch.equal(model(batch[0]), fresh(batch[0]))  # as if the trainer had attached them


def test_adapters_that_are_not_pooled_leave_groups_to_storage_and_it_is_said(tiny_vit) -> None:
    with pytest.warns(SilentNoEffectWarning, match="groups of 16 serve storage alone"):
        QALoRATrainer(with_adapters(tiny_vit(), pool=1), qa_lora_settings.config(), 8)
    QALoRATrainer(with_adapters(model := tiny_vit(), pool=1), qa_lora_settings.config(quantization_offset=False), 8)
    assert all(module.quantized.offsets is None for _, module in adapted_modules(model))


def test_the_controllers_adapters_are_pooled_over_the_groups(tiny_vit) -> None:
    controller = AdaLoRAController(model := tiny_vit(), allocation_runs.config(), 8, pool=16)
    assert {adapter.pool for adapter in site_adapters(model).values()} == {16}
    assert controller.bounds.maximum.tolist() == [4, 4, 4, 4, 4, 8] * 2  # 64 / 16 and 128 / 16 groups
