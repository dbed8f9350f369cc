"""Codes that onnxruntime expands when it loads a file: in float32 and in 8 bits, against torch and NumPy."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_files import compared, logits_of, packed, packed_model
from tiny_models import CARD
from torch import Tensor, nn

from peft_vit.adapters import AdaptedLinear, adapted_modules
from peft_vit.config import NUMBER_FORMATS
from peft_vit.deployment import export_onnx, input_ranges
from peft_vit.deployment.onnx_file import ExpandedLinear, Int8Linear, onnx_graph, step_and_zero
from peft_vit.quantization import QuantizationFormat
from peft_vit.quantization.packing import field_bits

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

KINDS = ("int2", "int4", "int8", "nf4", "fp4", "int3", "nf3")
FORMATS = [
    *(QuantizationFormat(kind, 16, offset, torch.float16) for kind in KINDS[:5] for offset in (True, False)),
    *(QuantizationFormat(kind, None, offset) for kind in KINDS[:5] for offset in (True, False)),
    *(QuantizationFormat(kind, 16, True, torch.float16) for kind in KINDS[5:]),
    QuantizationFormat("nf3", 16, False, torch.float16, double_quant=True),
    QuantizationFormat("int4", 8, True, torch.float16),  # onnxruntime's low-bit products take no such groups
]
NOT_INT2 = [format for format in FORMATS if format.bits > 2]
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
    model, file = packed_model(NOT_INT2), tmp_path_factory.mktemp("int8") / "model.onnx"
    export_onnx(model, file, CARD, input_ranges=input_ranges(model, [images_like(64, seed=5)]))
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
    content = onnx_graph(network, 16, lambda layer, _: ExpandedLinear(layer)).SerializeToString()
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


def one_layer(layer: AdaptedLinear, made: Callable[[AdaptedLinear, str], nn.Module], tmp_path: Path) -> Session:
    """Return a session of a layer on flattened images of 4 x 4 pixels, 48 inputs."""
    graph = onnx_graph(nn.Sequential(nn.Flatten(), layer), 4, made)
    return optimized(graph.SerializeToString(), tmp_path / "optimized.onnx")[0]


@pytest.mark.parametrize("outputs", [5, 8])  # 5: rows of the file end within a byte
@pytest.mark.parametrize("kind", KINDS)
def test_an_expanded_weight_is_the_layers(kind, outputs, tmp_path) -> None:
    layer = packed(nn.Linear(48, outputs, bias=False), QuantizationFormat(kind, 16, True, torch.float16))
    session = one_layer(layer, lambda layer, _: ExpandedLinear(layer), tmp_path)
    weight = session(np.eye(48, dtype=np.float32).reshape(48, 3, 4, 4))  # (48, out)
    np.testing.assert_array_equal(weight, layer.quantized.dequantize().T.numpy())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "int2"])
def test_a_product_in_8_bits_is_its_definition(kind, bias, tmp_path) -> None:
    torch.manual_seed(3)
    layer = packed(nn.Linear(48, 10, bias=bias), QuantizationFormat(kind, 16, True, torch.float16))
    inputs = (-1.5, 2.0)  # much lies outside
    session = one_layer(layer, lambda layer, _: Int8Linear(layer, inputs), tmp_path)
    x = torch.randn(200, 3, 4, 4).numpy()
    weight = layer.quantized.dequantize().numpy().astype(np.float64)
    steps = np.abs(weight).max(1, keepdims=True) / 64
    step = 3.5 / 255
    zero = round(1.5 / step)
    q_x = np.clip(np.rint(x.reshape(200, 48).astype(np.float64) / step) + zero, 0, 255)
    wanted = (q_x - zero) @ np.rint(weight / steps).T * step * steps.T
    if bias:
        wanted += layer.bias.detach().numpy()
    # Of thousands of numbers one may lie so near the middle of two steps that float32 takes the other.
    assert np.mean(np.abs(session(x) - wanted) < 1e-4) > 0.98


def test_weights_are_small_enough_for_sums_of_pairs_in_16_bits(in_8_bits, tmp_path) -> None:
    _, graph = optimized(in_8_bits[1].read_bytes(), tmp_path / "optimized.onnx")
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    products = [node for node in graph.graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(products) == 24
    for node in products:
        weights = onnx.numpy_helper.to_array(tensors[node.input[1]])
        assert weights.dtype == np.int8
        assert np.abs(weights.astype(int)).max() == 64
        assert np.iinfo(np.int16).max >= 255 * 2 * 64


def test_a_model_in_8_bits_is_near_and_does_not_depend_on_the_batch(in_8_bits) -> None:
    error, _ = compared(*in_8_bits, 100)
    assert 1e-4 < error < 0.2  # not exact; random weights amplify what is lost
    images = images_like(8)
    torch.testing.assert_close(logits_of(in_8_bits[1], images)[:1], logits_of(in_8_bits[1], images[:1]))


def test_ranges_are_those_of_the_inputs() -> None:
    layer = packed(nn.Linear(48, 4), QuantizationFormat("int4", 16, True))
    model = nn.Sequential(nn.Flatten(), layer)
    batches = [torch.randn(5, 3, 4, 4), 3 * torch.randn(2, 3, 4, 4)]
    everything = torch.cat(batches)
    assert input_ranges(model, batches) == {"1": (float(everything.min()), float(everything.max()))}
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize(("inputs", "zero"), [((-1.0, 1.0), 128), ((0.5, 2.0), 0), ((-2.0, -1.0), 255), ((0, 0), 0)])
def test_the_step_covers_the_range_and_zero_is_exact(inputs, zero) -> None:
    step, exact = step_and_zero(inputs)
    assert exact == zero
    assert step > 0
    ends = [step * (code - exact) for code in (0, 255)]
    assert ends[0] - step / 2 <= min(inputs[0], 0)
    assert max(inputs[1], 0) <= ends[1] + step / 2
