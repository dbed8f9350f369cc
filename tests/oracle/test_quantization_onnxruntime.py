"""Stored codes, read by onnxruntime's own low-bit kernels and multiplied there, against our float weights."""

import numpy as np
import pytest
import torch
from torch import Tensor

from peft_vit.core.quantization import QuantizationFormat, QuantizedTensor, quantize, unpack_codes

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

OUT, IN, GROUP = 24, 128, 32


def product_by_onnxruntime(kind: str, inputs: list[np.ndarray], x: np.ndarray, **attributes: int) -> np.ndarray:
    """Return x times the transposed weights as `com.microsoft.<kind>` computes it; inputs follow x, in order."""
    names = [f"input{index}" for index in range(len(inputs))]
    node = onnx.helper.make_node(kind, ["x", *names], ["y"], domain="com.microsoft", K=IN, N=OUT, **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "product",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, list(x.shape))],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [x.shape[0], OUT])],
        [onnx.numpy_helper.from_array(array, name) for name, array in zip(names, inputs, strict=True)],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def weight_and_input() -> tuple[Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(OUT, IN, generator=generator), torch.randn(7, IN, generator=generator).numpy()


def assert_same_product(quantized: QuantizedTensor, x: np.ndarray, product: np.ndarray) -> None:
    expected = x.astype(np.float64) @ quantized.dequantize().double().numpy().T
    assert np.abs(product - expected).max() <= 2e-6 * np.abs(expected).max()


# Not int8 with offset: on the CPU, onnxruntime 1.32 takes float zero points for 2 and 4 bits only.
@pytest.mark.parametrize(
    ("type", "bits", "offset"),
    [("int2", 2, False), ("int2", 2, True), ("int4", 4, False), ("int4", 4, True), ("int8", 8, False)],
)
def test_integers_are_what_matmul_nbits_reads(type: str, bits: int, offset: bool) -> None:
    weight, x = weight_and_input()
    quantized = quantize(weight, QuantizationFormat(type, GROUP, offset))  # type: ignore[arg-type]
    groups = IN // GROUP
    inputs = [quantized.codes.view(OUT, groups, -1).numpy(), quantized.scales.flatten().numpy()]
    if quantized.offsets is not None:  # (code - zero) * scale = scale * code + offset
        inputs.append((-quantized.offsets / quantized.scales).numpy())
    product = product_by_onnxruntime("MatMulNBits", inputs, x, bits=bits, block_size=GROUP)
    assert_same_product(quantized, x, product)


@pytest.mark.parametrize(("type", "number"), [("fp4", 0), ("nf4", 1)])
def test_codebooks_are_what_matmul_bnb4_reads(type: str, number: int) -> None:
    weight, x = weight_and_input()
    quantized = quantize(weight, QuantizationFormat(type, GROUP, offset=False))  # type: ignore[arg-type]
    codes = unpack_codes(quantized.codes, 4, IN).numpy()
    high_half_first = (codes[:, ::2] << 4 | codes[:, 1::2]).flatten()  # bitsandbytes' order
    inputs = [high_half_first, quantized.scales.flatten().numpy()]
    product = product_by_onnxruntime("MatMulBnb4", inputs, x, block_size=GROUP, quant_type=number)
    assert_same_product(quantized, x, product)
