"""What the package refuses: formats, weights, updates, and stored tensors that are damaged."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from peft_vit.base.errors import UserError
from peft_vit.core.quantization import (
    QuantizationFormat,
    QuantizedTensor,
    pack_codes,
    quantize,
    quantize_with_compensation,
)

HALF = torch.float16


def int4(group: int | None = 5, offset: bool = True, dtype: torch.dtype = torch.float32) -> QuantizationFormat:
    return QuantizationFormat("int4", group, offset, dtype)


def quantized(format: QuantizationFormat | None = None) -> QuantizedTensor:
    """Quantize weights (4, 10) in two groups a row."""
    return quantize(torch.randn(4, 10, generator=torch.Generator().manual_seed(1)), format or int4())


def stored(codes: list[int]) -> QuantizedTensor:
    """Read symmetric codes of a row of three."""
    tensors = {"codes": pack_codes(torch.tensor([codes], dtype=torch.uint8), 4), "scales": torch.ones(1, 1)}
    return QuantizedTensor.from_tensors(tensors, (1, 3), int4(None, offset=False))


REFUSED: list[tuple[Callable[[], object], str]] = [  # and the field that is named
    (lambda: QuantizationFormat("int9", 32, False), "type"),
    (lambda: int4(0), "group_size"),
    (lambda: int4(48).groups(100), "group_size"),
    (lambda: quantize(torch.full((1, 4), 65505.0), QuantizationFormat("nf4", None, False, HALF)), "scale_dtype"),
    (lambda: quantize(torch.full((1, 4), -7e4), int4(None, dtype=HALF)), "scale_dtype"),
    (lambda: quantized().with_offset_added(torch.zeros(4, 2), torch.bfloat16), "offset_dtype"),
    (lambda: quantized(int4(dtype=HALF)).with_offset_added(torch.full((4, 2), 7e4)), "offset_dtype"),
    (lambda: stored([8, 0, 9]), "codes"),  # symmetric integers never use 0
    (lambda: stored([8, 8, 9, 1]), "codes"),  # bits behind the last code
]


@pytest.mark.parametrize(("call", "field"), REFUSED)
def test_what_no_format_can_hold_is_refused_by_its_field(call: Callable[[], object], field: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.field == field


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 2.0**126])
def test_weights_and_inputs_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(UserError, match="infinities, NaN"):
        quantize(torch.tensor([[0.0, bad]]), int4(2))
    with pytest.raises(UserError, match="rounding: the inputs of qkv hold infinities or NaN"):
        quantize_with_compensation(torch.ones(4, 10), int4(), torch.full((10, 10), bad * 1e300), name="qkv")


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("codes", lambda codes: codes.int()),
        ("codes", lambda codes: codes[:, :-1]),
        ("scales", Tensor.half),
        ("scales", lambda scales: scales * torch.nan),
        ("scales", Tensor.neg),
        ("offsets", lambda offsets: offsets[:, :-1]),
        ("offsets", lambda offsets: offsets * torch.nan),
    ],
)
def test_damaged_tensors_are_refused_by_name(name: str, damaged: Callable[[Tensor], Tensor]) -> None:
    tensors = quantized().tensors()
    with pytest.raises(UserError) as caught:
        QuantizedTensor.from_tensors(tensors | {name: damaged(tensors[name])}, (4, 10), int4())
    assert caught.value.field == name


@pytest.mark.parametrize("names", [("codes", "scales"), ("codes", "scales", "offsets", "zero_points")])
def test_other_tensors_than_those_of_the_format_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="expected the tensors codes, scales, offsets"):
        QuantizedTensor.from_tensors(dict.fromkeys(names, torch.zeros(1)), (4, 10), int4())
