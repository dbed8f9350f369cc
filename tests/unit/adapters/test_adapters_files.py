"""An adapter file holds what was trained and gives it back, at the ranks it had; anything else is refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import (
    adapted_modules,
    adapter_bytes,
    attach_adapters,
    current_ranks,
    load_trained,
    read_adapter_file,
    set_ranks,
    trained_tensors,
)
from peft_vit.core.adapters.footprint import trainable_parameters
from peft_vit.core.backbones import find_sites
from peft_vit.core.quantization import QuantizationFormat, quantize

FORM = {"scale": 2.0, "parametrization": "product", "pool": 1}


def adapted(model, rank=2, parametrization="product", targets=("query", "fc1")):
    attach_adapters(model, find_sites(model, targets), rank, scale=2.0, seed=0, parametrization=parametrization)
    return model


@pytest.mark.parametrize("parametrization", ["product", "svd"])
def test_a_file_restores_ranks_and_values(tiny_vit, batch, fill_adapters, tmp_path, parametrization) -> None:
    model = adapted(tiny_vit(), parametrization=parametrization)
    ranks = dict(zip(current_ranks(model), [3, 0, 1, 5], strict=True))
    set_ranks(model, ranks)
    fill_adapters(model)
    with torch.no_grad():
        model.head.weight.mul_(1.5)
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(adapter_bytes(model, {"note": "x"}))
    fresh = adapted(tiny_vit(), parametrization=parametrization)
    metadata = load_trained(fresh, file)
    assert (metadata["note"], metadata["ranks"]) == ("x", ranks)
    assert current_ranks(fresh) == ranks
    assert trainable_parameters(fresh) == trainable_parameters(model)
    assert all(torch.equal(tensor, trained_tensors(model)[name]) for name, tensor in trained_tensors(fresh).items())
    with torch.no_grad():
        assert torch.equal(fresh(batch[0]), model(batch[0]))


def test_a_file_of_another_configuration_is_refused_whole(tiny_vit, tmp_path) -> None:
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(adapter_bytes(adapted(tiny_vit()), {}))
    with pytest.raises(UserError, match="other modules"):
        load_trained(adapted(tiny_vit(), targets=("key",)), file)
    with pytest.raises(UserError, match=r"belongs to another configuration|attach them in the same form"):
        load_trained(adapted(tiny_vit(), parametrization="svd"), file)
    with pytest.raises(UserError, match=r"head\.weight: expected shape \(7, 64\), got \(5, 64\)"):
        load_trained(adapted(tiny_vit(num_classes=7)), file)


FORMATS = {
    "blocks.0.attn.qkv": QuantizationFormat("int2", 16, True, torch.float16),
    "blocks.0.mlp.fc1": QuantizationFormat("int8", 16, False, torch.float32),
    "blocks.1.attn.qkv": QuantizationFormat("nf4", None, False, torch.float16),
}  # the last layer stays in float


def quantized(model, formats=FORMATS):
    model = adapted(model)
    for name, module in adapted_modules(model):
        if name in formats:
            module.set_quantized(quantize(module.weight.detach(), formats[name]))
            module.drop_float()
    return model


def test_a_file_says_how_each_weight_is_stored(tiny_vit, batch, fill_adapters, tmp_path) -> None:
    model = quantized(tiny_vit())
    fill_adapters(model)
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(adapter_bytes(model, {}))
    saved = read_adapter_file(file)
    assert (saved.formats, saved.ranks) == (FORMATS, current_ranks(model))
    fresh = quantized(tiny_vit(), saved.formats)
    load_trained(fresh, file)
    with torch.no_grad():
        assert torch.equal(fresh(batch[0]), model(batch[0]))
    others = {**FORMATS, "blocks.0.mlp.fc1": QuantizationFormat("int4", 16, False, torch.float32)}
    for other in (quantized(tiny_vit(), others), adapted(tiny_vit())):
        with pytest.raises(
            UserError, match=r"was trained on blocks\.0\.\S+ as .*, the model has .*; quantize it in the same way"
        ):
            load_trained(other, file)


def test_older_files_without_formats_are_read_and_damaged_ones_refused(tiny_vit, tmp_path) -> None:
    file = tmp_path / "adapter.safetensors"
    model = quantized(tiny_vit())

    def write(formats) -> None:
        header = {"ranks": current_ranks(model), "form": FORM}
        header |= {} if formats is None else {"formats": formats}
        file.write_bytes(adapter_bytes(model, {}))
        save_file(load_file(file), file, metadata={"peft_vit": json.dumps(header)})

    write(None)
    assert read_adapter_file(file).formats == {}
    load_trained(model, file)
    good = {"type": "int4", "group_size": 16, "offset": True, "scale_dtype": "torch.float16"}  # now without "torch."
    write({"blocks.0.attn.qkv": good})
    assert read_adapter_file(file).formats == {"blocks.0.attn.qkv": QuantizationFormat("int4", 16, True, torch.float16)}
    for bad in ({**good, "type": "int5"}, {**good, "scale_dtype": "torch.int8"}, {**good, "x": 1}, 7):
        write({"blocks.0.attn.qkv": bad})
        with pytest.raises(UserError, match="damaged peft_vit header"):
            read_adapter_file(file)


SITE = "blocks.0.attn.query"
NF3 = {"type": "nf3", "group_size": 32, "offset": False, "scale_dtype": "float16"}  # of an earlier version
NOT_A_FILE: list[Callable[[Path], object]] = [
    lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(b"no tensors here"),
    lambda file: file.write_bytes(file.read_bytes()[:-3]),
    lambda file: file.unlink(),
    lambda file: (file.unlink(), os.mkfifo(file)),  # which is not waited for
    lambda file: save_file({"head.weight": torch.zeros(2)}, file),
]
HEADERS = [  # JSON, or what the header has instead
    '{"ranks": {"a": 1}, "form": {"a": {"scale": [1]}}}',
    '{"ranks": {"a": 1}, "form": {}}',
    '{"ranks": {"a": 1}, "form": ' + "[" * 50_000,
    "{}",
    "null",
    {"formats": {SITE: NF3}},
    {"ranks": [1, 2]},
    {"ranks": {}},
    *({"form": form} for form in (None, 7, [], "scale")),
    *({"ranks": {SITE: rank}} for rank in (10**9, -1, 65, 2.0, "2", None, True, [2], float("inf"))),
]


@pytest.mark.parametrize("damage", [*NOT_A_FILE, *HEADERS])
def test_what_is_no_adapter_file_is_refused_in_one_line_with_its_name(tiny_vit, tmp_path, damage) -> None:
    """Wrong ranks before memory is asked for."""
    file, model = tmp_path / "adapter.safetensors", adapted(tiny_vit())
    file.write_bytes(adapter_bytes(model, {}))
    if callable(damage):
        damage(file)
    else:
        good = {"ranks": current_ranks(model), "form": FORM}
        if isinstance(damage, dict) and isinstance(ranks := damage.get("ranks"), dict):
            damage = {"ranks": good["ranks"] | ranks if ranks else {}}
        header = damage if isinstance(damage, str) else json.dumps(good | damage)
        save_file(load_file(file), file, metadata={"peft_vit": header})
    with pytest.raises(UserError) as caught:
        load_trained(adapted(tiny_vit()), file)
    assert caught.value.file == str(file)
    assert len(str(caught.value).splitlines()) == 1
