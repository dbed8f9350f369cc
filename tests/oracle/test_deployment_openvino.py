"""Exported models, run by OpenVINO's own kernels, against the torch model on packed weights."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from exported_files import compared, logits_of, packed_model, quantized
from tiny_models import CARD
from torch import nn

from peft_vit.core.adapters import adapted_modules
from peft_vit.core.quantization import QuantizationFormat, QuantizedTensor, unpack_codes
from peft_vit.core.quantization.packing import field_bits
from peft_vit.deploy import export_openvino
from peft_vit.deploy.formats.openvino_file import weight_node
from peft_vit.deploy.formats.runtimes import SETTINGS
from peft_vit.deploy.measures.check import random_weights

ov = pytest.importorskip("openvino")
pytest.importorskip("onnxscript")

KINDS = ("int2", "int4", "int8", "nf4")
FORMATS = [
    *(QuantizationFormat(kind, size, True, torch.float16) for kind in KINDS for size in (16, 64)),
    *(QuantizationFormat(kind, None, False, torch.float16) for kind in KINDS),
    *(QuantizationFormat(kind, 32, offset, torch.float32) for kind in KINDS for offset in (False, True)),
    QuantizationFormat("int3", 16, True, torch.float16),
    QuantizationFormat("int3", 32, False, torch.float16),
    QuantizationFormat("int4", 8, True),
]


def dequantized(weight: QuantizedTensor) -> np.ndarray:
    """Return the weights, (out, in), by the definition of the formats, in NumPy's float64."""
    codes = unpack_codes(weight.codes, weight.format.bits, weight.shape[1]).numpy().astype(np.int64)
    if weight.format.type == "nf4":
        values = np.array(_NF4)[codes]
    else:
        values = codes.astype(np.float64) - (0 if weight.format.offset else 2 ** (weight.format.bits - 1))
    grouped = values.reshape(*weight.scales.shape, -1) * weight.scales.numpy().astype(np.float64)[..., None]
    if weight.offsets is not None:
        grouped += weight.offsets.numpy().astype(np.float64)[..., None]
    return grouped.reshape(weight.shape)


_NF4 = (  # QLoRA, arXiv 2305.14314, appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model, file = packed_model(FORMATS), tmp_path_factory.mktemp("openvino") / "model.xml"
    export_openvino(model, file, CARD)
    return model, file


@pytest.mark.parametrize("batch", [1, 2, 200])
def test_every_format_is_what_openvino_computes(exported, batch) -> None:
    error, same = compared(*exported, batch)
    assert error <= 1e-3  # offsets as zero points in float16
    assert same >= 0.995


def test_the_low_bit_kernels_do_the_products_on_the_runs_own_codes(exported) -> None:
    model, file = exported
    core = ov.Core()
    compiled = core.compile_model(core.read_model(file), "CPU", SETTINGS)
    types = [
        node.input_value(1).get_node().get_rt_info()["outputPrecisions"].value
        for node in compiled.get_runtime_model().get_ordered_ops()
        if node.get_rt_info()["layerType"].value == "FullyConnected"
    ]
    used = [module.quantized.format for _, module in adapted_modules(model)]
    names = [
        format.type if format.has_codebook else {2: "u2", 4: "i4", 8: "i8"}[field_bits(format.bits)] for format in used
    ]
    assert len(used) == 24
    assert types == [*names, "f32"]  # the head
    # No float matrix of a packed layer lies in the file beside its codes.
    float_bytes = sum(parameter.nbytes for parameter in model.parameters())
    packed_bytes = sum(module.quantized.nbytes for _, module in adapted_modules(model))
    assert file.with_suffix(".bin").stat().st_size <= 1.1 * (float_bytes + packed_bytes)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_weight_is_its_definition(format) -> None:
    weight = torch.randn(12, 192, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[0, :64] = 0.05  # constant: scale 0
    weight[1] = 0.0
    weight[2] = 1e-42
    weight[3] = 0.5 + 1e-7 * weight[3]
    weight[4] *= 1e-4
    made = quantized(weight, format)
    network = ov.Model([weight_node(made)], [])
    weights = ov.Core().compile_model(network, "CPU", SETTINGS)([])[0]
    wanted = dequantized(made)
    assert np.isfinite(weights).all()
    constant = 0 if made.offsets is None else np.abs(made.offsets.numpy().astype(np.float64)).max(1)
    scale = np.abs(wanted).max(1) + constant
    digits = 2.0**-11 if made.offsets is not None and made.offsets.dtype == torch.float16 else 2.0**-21
    assert (np.abs(weights - wanted).max(1) <= digits * scale + 1e-37).all()  # OpenVINO rounds denormals to 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_four_bits_take_at_most_18_hundredths_of_float32(tmp_path, kind) -> None:
    model = random_weights(timm.create_model("vit_small_patch14_dinov2", img_size=112, num_classes=10)).eval()
    larger = {"model": "vit_small_patch14_dinov2", "image_size": 112, "class_names": tuple("abcdefghij")}
    card = CARD.model_copy(update=larger)
    export_openvino(model, tmp_path / "float32.xml", card)
    small_model = packed_model([QuantizationFormat(kind, 32, True, torch.float16)], copy.deepcopy(model))
    export_openvino(small_model, tmp_path / "packed.xml", card)
    float32, small = (
        sum((tmp_path / f"{name}{ending}").stat().st_size for ending in (".xml", ".bin"))
        for name in ("float32", "packed")
    )
    assert small <= 0.18 * float32
    images = torch.randn(64, 3, 112, 112, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = small_model(images)
    logits = logits_of(tmp_path / "packed.xml", images)
    assert float((logits - expected).abs().max() / expected.abs().max()) <= 1e-2


def test_no_address_is_looked_up_when_openvino_is_loaded() -> None:
    code = """
import sys
sys.addaudithook(lambda event, told: sys.exit(f"{event} {told}") if event.startswith(("socket.", "urllib.")) else None)
from peft_vit.base.extras import load_openvino
load_openvino().Core()
from openvino.tools.ovc import telemetry_utils
assert telemetry_utils.tm.__name__.endswith("telemetry_stub"), telemetry_utils.tm
"""
    outside = {name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")}
    done = subprocess.run([sys.executable, "-c", code], env=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
