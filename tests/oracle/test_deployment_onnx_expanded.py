"""Codes that onnxruntime expands when it loads a file: in float32 and in 8 bits, against torch and NumPy."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_files import compared, logits_of, packed, packed_model
from tiny_models import CARD, random_model
from torch import Tensor, nn

from peft_vit.core.adapters import AdaptedLinear, adapted_modules, use_int8_matmul
from peft_vit.core.adapters.integer_product import int8_linear
from peft_vit.core.config import NUMBER_FORMATS
from peft_vit.core.quantization import QuantizationFormat
from peft_vit.core.quantization.integers import EXPORTED_MATMUL, LARGEST, Int8Weight, quantize_rows
from peft_vit.core.quantization.packing import field_bits
from peft_vit.deploy import export_onnx, open_exported
from peft_vit.deploy.formats.onnx_file import ExpandedLinear, Int8Linear, onnx_graph

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

KINDS = ("int2", "int4", "int8", "nf4", "fp4", "int3")
FORMATS = [
    *(QuantizationFormat(kind, 16, offset, torch.float16) for kind in KINDS[:5] for offset in (True, False)),
    *(QuantizationFormat(kind, None, offset) for kind in KINDS[:5] for offset in (True, False)),
    *(QuantizationFormat(kind, 16, True, torch.float16) for kind in KINDS[5:]),
    QuantizationFormat("int3", 16, False, torch.float16),
    QuantizationFormat("int4", 8, True, torch.float16),  # onnxruntime's low-bit products take no such groups
]
Session = Callable[[np.ndarray], np.ndarray]


def images_like(batch: int, seed: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def optimized(content: bytes, file: Path) -> tuple[Session, onnx.ModelProto]:
    """Return onnxruntime's session as a function, and what it has made of the graph before anything hardware's own."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(file)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"images": x})[0], onnx.load(file)


@pytest.fixture(scope="module")
def fast(tmp_path_factory) -> tuple[nn.Module, Path]:
    model, file = packed_model(FORMATS), tmp_path_factory.mktemp("fast") / "model.onnx"
    export_onnx(model, file, CARD, runtime="fast")
    return model, file


@pytest.fixture(scope="module")
def in_8_bits(tmp_path_factory) -> tuple[nn.Module, Path]:
    model, file = packed_model(FORMATS), tmp_path_factory.mktemp("int8") / "model.onnx"
    export_onnx(model, file, CARD, activations="int8")
    return model, file


@pytest.mark.parametrize("batch", [1, 200])
def test_every_format_expanded_is_what_the_model_computes(fast, batch) -> None:
    error, same = compared(*fast, batch)
    assert error <= 1e-5
    assert same >= 0.995


@pytest.mark.parametrize("kind", NUMBER_FORMATS)
def test_the_file_holds_codes_and_the_session_floats(kind, tmp_path) -> None:
    layer = packed(nn.Linear(768, 256), QuantizationFormat(kind, 32, True, torch.float16))
    network = nn.Sequential(nn.Flatten(), layer)
    content = onnx_graph(network, 16, {"1": ExpandedLinear(layer)}).SerializeToString()
    in_fields = field_bits(layer.quantized.format.bits) / layer.quantized.format.bits  # codes of 3 bits take 4
    # not 786,432 as in floats; so few scales torch itself casts
    assert len(content) <= 1.5 * in_fields * layer.quantized.nbytes
    _, graph = optimized(content, tmp_path / "optimized.onnx")
    assert [node.op_type for node in graph.graph.node] == ["Reshape", "Gemm"]
    assert onnx.TensorProto.UINT8 not in {tensor.data_type for tensor in graph.graph.initializer}  # no codes are left


def test_no_layer_is_expanded_at_each_call(fast, tmp_path) -> None:
    model, file = fast
    _, graph = optimized(file.read_bytes(), tmp_path / "optimized.onnx")
    constants = {tensor.name for tensor in graph.graph.initializer}
    products = [node for node in graph.graph.node if node.op_type == "MatMul" and node.input[1] in constants]
    assert len(products) == len(dict(adapted_modules(model))) == 24


def one_layer(layer: nn.Module, tmp_path: Path) -> Session:
    """Return a session of a layer on flattened images of 4 x 4 pixels, 48 inputs."""
    graph = onnx_graph(nn.Sequential(nn.Flatten(), layer), 4, {})
    return optimized(graph.SerializeToString(), tmp_path / "optimized.onnx")[0]


@pytest.mark.parametrize("outputs", [5, 8])  # 5: rows of the file end within a byte
@pytest.mark.parametrize("kind", KINDS)
def test_an_expanded_weight_is_the_layers(kind, outputs, tmp_path) -> None:
    layer = packed(nn.Linear(48, outputs, bias=False), QuantizationFormat(kind, 16, True, torch.float16))
    session = one_layer(ExpandedLinear(layer), tmp_path)
    weight = session(np.eye(48, dtype=np.float32).reshape(48, 3, 4, 4))  # (48, out)
    np.testing.assert_array_equal(weight, layer.quantized.dequantize().T.numpy())


@pytest.mark.parametrize("kind", [*KINDS, "whole", "float"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_in_8_bits_is_the_one_that_training_makes(kind, bias, tmp_path) -> None:
    """The same codes and the same sums, for groups whose scales are whole multiples, others, and float weights."""
    torch.manual_seed(3)
    layer: AdaptedLinear | nn.Linear = nn.Linear(48, 10, bias=bias)
    if kind == "float":
        integers = Int8Weight.from_float(layer.weight, EXPORTED_MATMUL)
    elif kind == "whole":
        layer = packed(layer, QuantizationFormat("int4", 16, False, torch.float32))
        scales = 0.07 * torch.tensor([[1, 3, 5]]).expand(10, -1)
        layer.quantized = replace(layer.quantized, scales=scales)
        integers = Int8Weight.from_quantized(layer.quantized, EXPORTED_MATMUL)
        assert torch.equal(integers.scales, scales[:, 0])
    else:
        layer = packed(layer, QuantizationFormat(kind, 16, True, torch.float16))
        integers = Int8Weight.from_quantized(layer.quantized, EXPORTED_MATMUL)
    session = one_layer(Int8Linear(layer), tmp_path)
    x = torch.randn(500, 48) * torch.logspace(-3, 3, 500).unsqueeze(1)
    x[7] = 0
    y = torch.from_numpy(session(x.reshape(-1, 3, 4, 4).numpy()))
    codes, scales = quantize_rows(x)
    sums = codes.long() @ integers.codes.long().T  # (N, out)
    constant = 0 if layer.bias is None else layer.bias.detach()
    loud = x.abs().amax(1) > 0.5  # others' sums are lost beside the bias
    found = ((y - constant).double() / scales / integers.scales)[loud]
    assert torch.equal(found.round().long(), sums[loud])
    torch.testing.assert_close(y, int8_linear(x, integers, layer.bias, []).detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(y[7], torch.zeros(10) + constant)


def test_weights_are_small_enough_for_sums_of_pairs_in_16_bits(in_8_bits, tmp_path) -> None:
    _, graph = optimized(in_8_bits[1].read_bytes(), tmp_path / "optimized.onnx")
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    products = [node for node in graph.graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(products) == 24
    for node in products:
        weights = onnx.numpy_helper.to_array(tensors[node.input[1]])
        assert weights.dtype == np.int8
        assert 0 < np.abs(weights.astype(int)).max() <= 64
        assert np.iinfo(np.int16).max >= 255 * 2 * 64


def test_a_model_in_8_bits_is_near_and_does_not_depend_on_the_batch(in_8_bits) -> None:
    error, _ = compared(*in_8_bits, 100)
    assert 1e-4 < error < 0.2  # not exact; random weights amplify what is lost
    images = images_like(8)
    torch.testing.assert_close(logits_of(in_8_bits[1], images)[:1], logits_of(in_8_bits[1], images[:1]))


def test_a_model_trained_in_8_bits_says_the_same_in_the_file(tmp_path) -> None:
    """Nothing is merged, so that nothing is rounded again but weights of more than 7 bits."""
    model = packed_model([QuantizationFormat("int4", None, False)], random_model("shallow_vit"))
    export_onnx(model, tmp_path / "model.onnx", CARD, activations="int8")
    opened = open_exported(tmp_path / "model.onnx")
    assert opened.card.integer_bits == 7
    use_int8_matmul(model, EXPORTED_MATMUL)
    images = images_like(400)
    with torch.inference_mode():
        trained = model(images)
    exported = logits_of(tmp_path / "model.onnx", images)
    assert float((exported.argmax(1) == trained.argmax(1)).float().mean()) >= 0.995
    assert float((exported - trained).abs().max() / trained.abs().max()) < 0.02


def test_the_largest_integers_are_exact_here(tmp_path) -> None:
    """In a batch, and row by row, for which onnxruntime has a kernel of its own."""
    x, layer = torch.randn(64, 48).sign(), nn.Linear(48, 10, bias=False)
    x[0] = 1
    layer.weight.data.copy_(torch.randn(10, 48).sign())
    layer.weight.data[0] = 1
    session = one_layer(Int8Linear(layer), tmp_path)
    images = x.reshape(-1, 3, 4, 4).numpy()
    sums = (LARGEST * EXPORTED_MATMUL.largest * (x @ layer.weight.T)).detach().long()  # (N, out)
    for y in (session(images), np.concatenate([session(image[None]) for image in images])):
        found = torch.from_numpy(y).double() * LARGEST * EXPORTED_MATMUL.largest
        assert torch.equal(found.round().long(), sums)
