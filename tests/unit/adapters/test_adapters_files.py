"""An adapter file holds what was trained and gives it back, at the ranks it had; anything else is refused."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_vit.adapters import (
    adapted_modules,
    adapter_bytes,
    attach_adapters,
    current_ranks,
    freeze_backbone,
    load_trained,
    read_adapter_file,
    set_ranks,
    trained_tensors,
)
from peft_vit.backbones import find_sites
from peft_vit.errors import UserError
from peft_vit.evaluation import trainable_parameters
from peft_vit.quantization import QuantizationFormat, quantize


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
    with pytest.raises(UserError, match="other sites"):
        load_trained(adapted(tiny_vit(), targets=("key",)), file)
    with pytest.raises(UserError, match=r"belongs to another configuration|attach them alike"):
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
        with pytest.raises(UserError, match=r"was trained on blocks\.0\.\S+ as .*, the model has .*; quantize alike"):
            load_trained(other, file)


def test_older_files_without_formats_are_read_and_damaged_ones_refused(tiny_vit, tmp_path) -> None:
    file = tmp_path / "adapter.safetensors"
    model = quantized(tiny_vit())

    def write(formats) -> None:
        header = {"ranks": current_ranks(model), "form": {"scale": 2.0, "parametrization": "product", "pool": 1}}
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


def test_what_is_no_adapter_file_is_refused(tiny_vit, tmp_path) -> None:
    model = tiny_vit()
    freeze_backbone(model)
    for name, content in {"empty": b"", "text": b"no tensors here", "cut": adapter_bytes(model, {})[:-3]}.items():
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: is not a readable safetensors file"):
            load_trained(model, file)
    with pytest.raises(UserError, match="missing: is not a readable"):
        load_trained(model, tmp_path / "missing")
    save_file({"head.weight": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(UserError, match="no peft_vit header"):
        load_trained(model, tmp_path / "foreign")


def test_a_header_that_lies_is_refused_before_memory_is_asked_for(tiny_vit, tmp_path) -> None:
    model = adapted(tiny_vit())
    file = tmp_path / "adapter.safetensors"
    site = "blocks.0.attn.query"
    form = {"scale": 2.0, "parametrization": "product", "pool": 1}

    def refusal(ranks, form=form) -> str:
        file.write_bytes(adapter_bytes(model, {}))
        header = json.dumps({"ranks": ranks, "form": form})
        save_file(load_file(file), file, metadata={"peft_vit": header})
        with pytest.raises(UserError) as caught:
            load_trained(adapted(tiny_vit()), file)
        assert caught.value.file == str(file)
        return str(caught.value)

    for rank in (10**9, -1, 65):
        assert f"ranks[{site}]: expected 0 to 64, got {rank}" in refusal({**current_ranks(model), site: rank})
    for rank in (2.0, "2", None, True, [2], float("inf")):
        assert "a rank is a whole number" in refusal({**current_ranks(model), site: rank})
    assert "names other sites" in refusal({})
    for other in (None, 7, [], "scale"):
        assert "form and formats are mappings" in refusal(current_ranks(model), other)
    assert "damaged peft_vit header" in refusal([1, 2])


def test_a_form_without_scales_and_a_deep_header_are_refused(tiny_vit, tmp_path) -> None:
    file = tmp_path / "adapter.safetensors"
    for header in (
        '{"ranks": {"a": 1}, "form": {"a": {"scale": [1]}}}',
        '{"ranks": {"a": 1}, "form": {}}',
        '{"ranks": {"a": 1}, "form": ' + "[" * 50_000,
        "{}",
        "null",
    ):
        save_file({"x": torch.zeros(1)}, file, metadata={"peft_vit": header})
        with pytest.raises(UserError, match="damaged peft_vit header"):
            read_adapter_file(file)


def test_a_pipe_is_not_waited_for(tiny_vit, tmp_path) -> None:
    os.mkfifo(tmp_path / "adapter.safetensors")
    with pytest.raises(UserError, match="no regular file"):
        load_trained(adapted(tiny_vit()), tmp_path / "adapter.safetensors")
