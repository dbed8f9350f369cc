"""Exported models, run by onnxruntime's own kernels, against the torch model on packed weights."""

from pathlib import Path

import pytest
import torch
from exported_files import compared, packed_model
from tiny_models import CARD, SHALLOW_CARD, random_model
from torch import nn

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import AdaptedLinear, adapted_modules
from peft_vit.core.quantization import QuantizationFormat, quantize
from peft_vit.deploy import export_onnx, open_exported
from peft_vit.deploy.formats.header import HEADER, Header
from peft_vit.deploy.formats.runtimes import onnx_content

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

FORMATS = [  # with offset, which an update has changed; blocks of one and of several to a group
    *(
        QuantizationFormat(kind, size, offset=True, scale_dtype=torch.float16)
        for kind in ("int2", "int3", "int4", "int8", "nf4", "fp4")
        for size in (16, 64)
    ),
    *(
        QuantizationFormat(kind, None, offset=False, scale_dtype=torch.float16)
        for kind in ("int2", "int3", "int4", "int8", "nf4", "fp4")
    ),
    QuantizationFormat("int4", 32, offset=True),  # float32
    QuantizationFormat("int8", 32, offset=False),
    QuantizationFormat("nf4", 32, offset=False),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[nn.Module, Path]:
    model, file = packed_model(FORMATS), tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(model, file, CARD)
    return model, file


@pytest.mark.parametrize("batch", [1, 2, 200])
def test_every_format_is_what_onnxruntime_computes(exported, batch) -> None:
    error, same = compared(*exported, batch)
    assert error <= 1e-5
    assert same >= 0.995


def test_the_low_bit_kernels_do_the_products(exported) -> None:
    model, file = exported
    proto = onnx.load(file)
    onnx.checker.check_model(proto)
    nodes = [node for node in proto.graph.node if node.domain == "com.microsoft"]
    attributes = [{entry.name: entry.i for entry in node.attribute} for node in nodes]
    assert len(nodes) == len(dict(adapted_modules(model))) == 24
    for format, node, values in zip(FORMATS, nodes, attributes, strict=False):
        if format.has_codebook:
            assert (node.op_type, values["quant_type"]) == ("MatMulBnb4", {"fp4": 0, "nf4": 1}[format.type])
        else:
            assert (node.op_type, values["bits"]) == ("MatMulNBits", 4 if format.bits == 3 else format.bits)
    blocks = [values["block_size"] for values in attributes]
    assert blocks[:4] == [16, 64, 16, 64]
    assert 192 in {values["K"] for values in attributes}  # one scale a row of 192 inputs: three blocks of 64 share it
    weights = [tensor for tensor in proto.graph.initializer if len(tensor.dims) > 1 and "blocks" in tensor.name]
    assert not [t.name for t in weights if t.data_type == onnx.TensorProto.FLOAT and t.dims[-1] in (64, 192)]


@pytest.mark.parametrize(
    "kind", ["int2", "nf4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int4", "int8", "fp4"))]
)
def test_constant_groups_are_exact_and_finite(tmp_path, kind) -> None:
    model = random_model("shallow_vit")
    layer = AdaptedLinear(model.blocks[1].mlp.fc2)
    weight = layer.weight.detach()
    weight[:, :64] = 0.05  # scale 0
    weight[:, 64:128] = 0.0
    weight[0, :32] = 1e-42
    quantized = quantize(weight, QuantizationFormat(kind, 32, offset=True))
    layer.set_quantized(quantized.with_offset_added(torch.full(quantized.scales.shape, 0.01)))
    layer.drop_float()
    model.blocks[1].mlp.fc2 = layer
    export_onnx(model, tmp_path / "model.onnx", SHALLOW_CARD)
    assert compared(model, tmp_path / "model.onnx", 4)[0] <= 1e-5  # NaN would not be


@pytest.mark.parametrize("place", ["initializer", "attribute"])
def test_a_model_that_points_at_other_files_is_refused(exported, tmp_path, place) -> None:
    """Signed again, as anybody can; onnxruntime would read the other file as weights."""
    (tmp_path / "secret").write_bytes(bytes(4))
    proto = onnx.load(exported[1])
    if place == "initializer":
        tensor = proto.graph.initializer[0]
    else:
        node = proto.graph.node.add(op_type="Constant", output=["aside"])
        tensor = node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t
        tensor.dims[:], tensor.data_type = [1], onnx.TensorProto.FLOAT
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret")
    proto.metadata_props.add(key=HEADER, value=Header(card=CARD).signed(onnx_content(CARD, proto)).model_dump_json())
    file = tmp_path / "model.onnx"
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match=r"model\.onnx: keeps numbers in other files"):
        open_exported(file)
