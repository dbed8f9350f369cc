"""Training on a GPU: bf16 follows fp32 on the CPU, and what resizing and packing free is free on the device.

Each test also runs on the CPU, where the marked half is skipped.
"""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qa_lora_settings import config
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from written_runs import plan_of, run_and_write, tiny_study

from peft_vit import QALoRATrainer
from peft_vit.core.adapters import adapter_bytes, attach_adapters, current_ranks, resize_adapters, site_adapters
from peft_vit.core.backbones import find_sites
from peft_vit.core.quantization import QuantizedTensor
from peft_vit.core.quantization.integers import Int8Weight, largest_exact_code
from peft_vit.core.records import RunRecord
from peft_vit.deploy.restore import restore_run
from peft_vit.runs.records.storage import RECORD_FILE, read_record, run_folder

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
METHODS = ("lora", "adaptive", "nf4", "int4_adaptive")
pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.filterwarnings("ignore::peft_vit.base.errors.DataWarning")]

Run = Callable[[str, str, str], tuple[RunRecord, Path]]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def run(images: Path, weights: Path, tmp_path: Path) -> Run:
    """Return what does a run of a method on a device in a precision, on one set of images and weights."""

    def do(name: str, device: str, precision: str) -> tuple[RunRecord, Path]:
        folder = tmp_path / f"{device}-{precision}"
        backbone = {"model": "test_vit", "weights": "file", "file": str(weights)}
        mapping = tiny_study(name, images=images, device=device, precision=precision, backbone=backbone)
        (planned,) = plan_of(mapping, folder).runs
        record = run_and_write(planned.spec, folder)
        assert record.status == "done", record.traceback
        return record, run_folder(folder, planned.spec)

    return do


@pytest.mark.parametrize("shape", [(1, 384, 1536), (16, 100, 30), (65, 384, 10)])
def test_products_of_8_bit_integers_are_exact(device: torch.device, shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    largest = largest_exact_code("int_mm", inner, device.type)
    generator = torch.Generator().manual_seed(0)
    left = torch.randint(-127, 128, (rows, inner), generator=generator, dtype=torch.int8)
    right = torch.randint(-largest, largest + 1, (inner, columns), generator=generator, dtype=torch.int8)
    product = Int8Weight(right.T.to(device), torch.ones(columns, device=device)).multiply(left.to(device))
    assert torch.equal(product.cpu(), (left.long() @ right.long()).float())


def losses(record: RunRecord) -> list[float]:
    return [step.loss for step in record.steps]


def allocated_bytes(device: torch.device, *holders: Any) -> int:
    """Return what tensors hold on a device: of the GPU as its allocator knows it, of the CPU what its holders do."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    storages: dict[int, int] = {}
    pending: list[Any] = list(holders)
    while pending:
        holder = pending.pop()
        if isinstance(holder, torch.Tensor):
            storages[holder.untyped_storage().data_ptr()] = holder.untyped_storage().nbytes()
        elif isinstance(holder, nn.Module):
            pending += [*holder.parameters(), *(getattr(layer, "quantized", None) for layer in holder.modules())]
        elif isinstance(holder, torch.optim.Optimizer):
            pending += [value for state in holder.state.values() for value in state.values()]
        elif isinstance(holder, QuantizedTensor):
            pending += holder.tensors().values()
    return sum(storages.values())


def nbytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", METHODS)
def test_bf16_follows_fp32_on_the_cpu(run: Run, run_of: Callable[[str], Path], device: torch.device, name: str) -> None:
    expected = read_record(run_of(name) / RECORD_FILE)
    record, folder = run(name, device.type, "bf16")
    assert record.provenance is not None
    assert torch.device(record.provenance.device).type == device.type
    assert losses(record)[0] == pytest.approx(losses(expected)[0], rel=0.01)  # the same model, images and head
    assert losses(record) == pytest.approx(losses(expected), rel=0.1)
    assert losses(record) != losses(expected)  # it did compute in bf16
    assert record.validation.nll == pytest.approx(expected.validation.nll, rel=0.1)
    assert record.parameters == expected.parameters or "adaptive" in name
    ranks, expected_ranks = (each.rank_history[-1].ranks for each in (record, expected))
    assert sum(ranks.values()) == sum(expected_ranks.values())
    if record.quantization is not None and expected.quantization is not None:  # codes do not depend on the device
        assert record.quantization.relative_error == expected.quantization.relative_error
        assert record.quantization.size == expected.quantization.size
    assert restore_run(folder).record == record  # what was trained there is read anywhere


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
def test_fp32_agrees_with_the_cpu(run: Run, run_of: Callable[[str], Path], name: str) -> None:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the default of convolutions
        record, folder = run(name, "cuda", "fp32")
    reference = run_of(name)
    expected = read_record(reference / RECORD_FILE)
    assert losses(record) == pytest.approx(losses(expected), rel=0.01)
    assert record.test.nll == pytest.approx(expected.test.nll, rel=0.02)
    there, here = (load_file(folder_of / "adapter.safetensors") for folder_of in (folder, reference))
    if "adaptive" not in name:  # a close call on a rank may end otherwise
        assert there.keys() == here.keys()
        off = sum(float((there[key].float() - tensor.float()).square().sum()) for key, tensor in here.items())
        whole = sum(float(tensor.float().square().sum()) for tensor in here.values())
        assert off < 0.05**2 * whole  # Adam turns a gradient near zero of another sign into a step of full length


def test_a_step_on_the_device_leaves_nothing_on_the_cpu(tiny_vit: Any, batch: Any, device: torch.device) -> None:
    model = tiny_vit().to(device)
    trainer = QALoRATrainer(model, config(rank=2), 8)
    images, labels = (tensor.to(device) for tensor in batch)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    with torch.autocast(device.type, torch.bfloat16):
        loss = F.cross_entropy(model(images), labels)
    assert np.isfinite(trainer.training_step(model, optimizer, loss, 1)["loss"])
    held = {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]}
    held |= {tensor.device.type for state in optimizer.state.values() for tensor in state.values() if tensor.ndim}
    for layer in model.modules():
        if getattr(layer, "quantized", None) is not None:
            held |= {tensor.device.type for tensor in layer.quantized.tensors().values()}
    assert held == {device.type}
    assert adapter_bytes(model, {})  # and it can be written


def test_resizing_frees_and_takes_memory(tiny_vit: Any, batch: Any, device: torch.device) -> None:
    model = tiny_vit().to(device)
    attach_adapters(model, find_sites(model), 32, scale=1.0, seed=0)
    images, labels = (tensor.to(device) for tensor in batch)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def resize(rank: int) -> None:
        scores = {name: torch.arange(float(adapter.rank)) for name, adapter in site_adapters(model).items()}
        resize_adapters(model, optimizer, dict.fromkeys(scores, rank), scores)

    step()
    large, parameters = allocated_bytes(device, model, optimizer), nbytes(model)
    resize(4)
    step()
    assert set(current_ranks(model).values()) == {4}
    small = allocated_bytes(device, model, optimizer)
    freed = parameters - nbytes(model)
    assert freed > 0.8 * parameters
    assert large - small == pytest.approx(3 * freed, rel=0.05)  # parameters and two moments; the device rounds up
    resize(32)
    step()
    assert allocated_bytes(device, model, optimizer) - small == pytest.approx(3 * freed, rel=0.05)


def test_packing_frees_the_float_weights(tiny_vit: Any, batch: Any, device: torch.device) -> None:
    model = tiny_vit(depth=6).to(device)
    model(batch[0].to(device)).sum().backward()  # a GPU's libraries keep memory of their own from then on
    model.zero_grad(set_to_none=True)
    before = allocated_bytes(device, model)
    weights = sum(model.get_submodule(site.module).weight[site.span].nbytes for site in find_sites(model))
    QALoRATrainer(model, config(rank=2), 8)
    packed = sum(
        module.quantized.nbytes for module in model.modules() if getattr(module, "quantized", None) is not None
    )
    assert packed < weights / 4
    adapters = sum(p.nbytes for adapter in site_adapters(model).values() for p in adapter.parameters())
    assert before - allocated_bytes(device, model) == pytest.approx(weights - packed - adapters, rel=0.1)
