"""Where float16 scales or offsets lose what float32 ones keep, it is said; elsewhere it is not."""

import re
import warnings

import numpy as np
import pytest
import torch
from quantization_strategies import TYPES

from peft_vit.base.errors import UnderflowWarning
from peft_vit.core.quantization import QuantizationFormat, quantize

GROUP, ROWS, GROUPS = 32, 4, 3
UPDATES = [(1e-8, torch.float16, 2), (1e-8, torch.float32, 0), (0.3, None, 0)]
FORMATS = [(type, offset) for type in TYPES for offset in (False, True)]


def of_magnitude(largest: float, rows: int = ROWS) -> torch.Tensor:
    """Return weights (rows, GROUPS * GROUP) whose groups all have this largest magnitude."""
    groups = torch.randn(rows, GROUPS, GROUP, generator=torch.Generator().manual_seed(0))
    return (groups * (largest / groups.abs().amax(-1, keepdim=True))).flatten(1)


def root_mean_square_error(weight: torch.Tensor, type: str, offset: bool, dtype: torch.dtype) -> float:
    got = quantize(weight, QuantizationFormat(type, GROUP, offset, dtype)).dequantize()
    return float(np.sqrt(np.mean((got.double().numpy() - weight.double().numpy()) ** 2)))


@pytest.mark.parametrize(("type", "offset"), FORMATS)
@pytest.mark.parametrize("largest", [1e-8, 1e-7])
def test_weights_that_float16_scales_lose_are_said(type, offset, largest) -> None:
    weight = of_magnitude(0.1)
    weight[1, GROUP : 2 * GROUP] = of_magnitude(largest)[1, :GROUP]
    with pytest.warns(UnderflowWarning) as caught:
        quantize(weight, QuantizationFormat(type, GROUP, offset, torch.float16), name="blocks.3.attn.qkv")
    (message,) = (str(entry.message) for entry in caught)
    assert re.match(rf"blocks\.3\.attn\.qkv: float16 is too coarse for the {type} scales of 1 of 12 groups", message)
    assert "use scale_precision: fp32" in message
    assert caught[0].filename == __file__


@pytest.mark.parametrize(("type", "offset"), FORMATS)
def test_where_nothing_is_said_float16_is_as_good_as_float32(type, offset) -> None:
    said = []
    for largest in np.logspace(-9, 0, 28):
        weight = of_magnitude(largest, rows=64)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            coarse = root_mean_square_error(weight, type, offset, torch.float16)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # float32 scales are never too coarse
            fine = root_mean_square_error(weight, type, offset, torch.float32)
        said.append([entry.category for entry in caught])
        assert said[-1] in ([], [UnderflowWarning])
        assert said[-1] or coarse < 1.03 * fine
        assert largest >= 2e-8 or coarse > 1.1 * fine
    assert said[0]
    assert not said[-1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("type", "offset"), FORMATS)
def test_zeros_equal_weights_and_int8s_small_scales_lose_nothing_and_nothing_is_said(type, offset) -> None:
    for weight in (torch.zeros(ROWS, GROUP), torch.full((ROWS, GROUP), 1 / 3), of_magnitude(0.005)):
        quantize(weight, QuantizationFormat(type, GROUP, offset, torch.float16))


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize(("update", "dtype", "lost"), UPDATES)
def test_updates_that_float16_offsets_lose_are_said(type, update, dtype, lost) -> None:
    weight = of_magnitude(0.1)
    weight[0, : 2 * GROUP] = 0  # in two groups there is nothing but the update
    quantized = quantize(weight, QuantizationFormat(type, GROUP, True, torch.float16))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantized.with_offset_added(torch.full((ROWS, GROUPS), update), dtype, name="head")
    expected = f"head: float16 is too coarse for the offsets of {lost} of 12 groups, whose weights are too small for it"
    assert [str(entry.message).split(";")[0] for entry in caught] == ([expected] if lost else [])
