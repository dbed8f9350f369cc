"""A safetensors file is read tensor by tensor: when each is asked for, and given back before the next one is."""

from __future__ import annotations

import gc
import mmap
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from qa_lora_settings import config
from safetensors.torch import save_file

from peft_vit import QALoRATrainer
from peft_vit.base.errors import UserError
from peft_vit.core.adapters import adapted_modules
from peft_vit.core.backbones import load_backbone
from peft_vit.core.backbones import weights as tensor_file
from peft_vit.core.backbones.weights import TensorFile
from peft_vit.core.config import BackboneConfig
from peft_vit.core.training import qa_lora, quantized_layers

SETTINGS = config(rank=2)
LAYERS = 4 * 6  # of test_vit: query, key and value in one, out, fc1, fc2


@pytest.fixture
def everything_mapped(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Map small tensors too; return how many are in memory now."""
    made: list[weakref.ref[mmap.mmap]] = []

    class Noted(mmap.mmap):
        def __new__(cls, *args: object, **kwargs: object) -> Noted:
            made.append(weakref.ref(mapped := super().__new__(cls, *args, **kwargs)))
            return mapped

    monkeypatch.setattr(tensor_file, "_SMALLEST_MAPPED_BYTES", 1)
    monkeypatch.setattr(tensor_file.mmap, "mmap", Noted)

    def alive() -> int:
        assert made, "none was mapped"
        return sum(mapped() is not None for mapped in made)

    return alive


@pytest.fixture
def weights(tmp_path: Path) -> BackboneConfig:
    torch.manual_seed(3)
    save_file(timm.create_model("test_vit", img_size=32).state_dict(), tmp_path / "w.safetensors")
    return BackboneConfig(model="test_vit", weights="file", file=str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("smallest", [1, 1 << 20])
def test_it_holds_what_the_file_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smallest: int) -> None:
    monkeypatch.setattr(tensor_file, "_SMALLEST_MAPPED_BYTES", smallest)
    tensors = {
        "large": torch.randn(300, 1000),
        "odd": torch.randn(7).bfloat16(),  # so that others may not begin where a float32 should
        "bytes": torch.arange(5, dtype=torch.uint8),
        "bias": torch.randn(3),
        "number": torch.tensor(2.5),
        "none": torch.zeros(0, 4),
        "half": torch.randn(2, 3).half(),
    }
    save_file(tensors, tmp_path / "w.safetensors", metadata={"of": "nothing"})
    stored = TensorFile(tmp_path / "w.safetensors")
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert stored[name].dtype == tensor.dtype
        assert stored[name].shape == tensor.shape
        assert torch.equal(stored[name], tensor)
    content = (tmp_path / "w.safetensors").read_bytes()
    assert list(TensorFile(tmp_path / "w.safetensors", "b")) == [name.removeprefix("b") for name in stored]
    stored["large"].zero_()
    assert torch.equal(stored["large"], tensors["large"])
    assert (tmp_path / "w.safetensors").read_bytes() == content


def test_a_file_that_changes_meanwhile_is_refused(weights: BackboneConfig) -> None:
    file = Path(weights.file or "")
    stored = TensorFile(file)
    stored["norm.weight"]
    os.utime(file, ns=(0, 0))
    with pytest.raises(UserError, match=r"w\.safetensors: has changed since it was first read"):
        stored["norm.weight"]
    file.unlink()
    with pytest.raises(UserError, match=r"w\.safetensors: can't be read any more \(No such file"):
        stored["norm.weight"]


def test_weights_that_are_copied_are_read_one_at_a_time(
    weights: BackboneConfig, everything_mapped: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    isfinite, counts = torch.Tensor.isfinite, []
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda tensor: counts.append(everything_mapped()) or isfinite(tensor))
    model = load_backbone(weights, image_size=32, num_classes=3, seed=0).model
    assert counts == list(range(counts[0], counts[0] - len(counts), -1))  # one fewer each time
    gc.collect()
    assert everything_mapped() == 0
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.part("quantization")
def test_each_layers_float_weights_are_gone_before_the_next_are_packed(
    weights: BackboneConfig, everything_mapped: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = load_backbone(weights, image_size=32, num_classes=3, seed=0).model
    part = load_backbone(weights, image_size=32, num_classes=3, seed=0, mapped=("blocks.1.mlp.*",)).model
    gc.collect()
    assert everything_mapped() == 2
    assert all(torch.equal(tensor, own.state_dict()[name]) for name, tensor in part.state_dict().items())
    del part
    gc.collect()
    model = load_backbone(weights, image_size=32, num_classes=3, seed=0, mapped=SETTINGS.targets).model
    assert everything_mapped() == LAYERS
    quantize, check = quantized_layers.quantize, qa_lora.check_gradients
    counts = []
    monkeypatch.setattr(
        quantized_layers,
        "quantize",
        lambda *args, **named: counts.append(everything_mapped()) or quantize(*args, **named),
    )
    monkeypatch.setattr(qa_lora, "check_gradients", lambda model: counts.append(everything_mapped()) or check(model))
    ours = QALoRATrainer(model, SETTINGS, 8)
    assert counts == list(range(LAYERS, -1, -1))
    theirs = QALoRATrainer(own, SETTINGS, 8)  # of weights that were copied
    assert ours.relative_error == theirs.relative_error
    packed = dict(adapted_modules(own))
    for name, module in adapted_modules(model):
        for part, tensor in module.quantized.tensors().items():
            assert torch.equal(tensor, packed[name].quantized.tensors()[part]), name
    for (name, first), (_, second) in zip(model.named_parameters(), own.named_parameters(), strict=True):
        assert torch.equal(first, second), name
        assert first.requires_grad == second.requires_grad
