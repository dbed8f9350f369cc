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
    unpack_codes,
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


CALLS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: QuantizationFormat("int9", 32, False), UserError, "^type: expected"),
    (lambda: int4(0), UserError, "^group_size: expected"),
    (lambda: int4(dtype=torch.bfloat16), UserError, "^scale_dtype: expected"),
    (lambda: int4(48).groups(100), UserError, "group_size: 48 does not divide the matrix's 100 inputs"),
    (lambda: pack_codes(torch.tensor([[0, 4]], dtype=torch.uint8), 2), ValueError, "below 4, got 4"),
    (lambda: unpack_codes(torch.zeros(1, 2, dtype=torch.uint8), 4, 5), ValueError, "3 bytes a row for 5 codes, got 2"),
    *(
        (lambda bad=bad: quantize(torch.tensor([[0.0, bad]]), int4(2)), UserError, "infinities, NaN")
        for bad in (np.inf, -np.inf, np.nan, 2.0**126)
    ),
    *(
        (lambda weight=weight: quantize(weight, int4(None)), ValueError, "expected a matrix of floats")
        for weight in (torch.zeros(4), torch.zeros(0, 4), torch.zeros(2, 2, dtype=torch.int32))
    ),
    *(
        (
            lambda type=type, value=value: quantize(
                torch.full((1, 4), value), QuantizationFormat(type, None, type != "nf4", HALF)
            ),
            UserError,
            r"^scale_dtype: .* exceeds the largest torch\.float16, 65504",
        )
        for type, value in (("nf4", 65505.0), ("int8", -7e4), ("int4", 7e4))
    ),
    (lambda: quantized().with_offset_added(torch.zeros(4, 2), torch.bfloat16), UserError, "^offset_dtype: .*bfloat16"),
    (lambda: quantized().with_offset_added(torch.zeros(4, 4)), ValueError, r"of shape \(4, 2\), got \(4, 4\)"),
    (
        lambda: quantized(int4(dtype=HALF)).with_offset_added(torch.full((4, 2), 7e4)),
        UserError,
        "^offset_dtype: offset plus update is not finite",
    ),
    (lambda: quantized().columns(slice(0, 4)), ValueError, "0 to 4 are not whole groups and bytes"),
    (lambda: quantized().columns(slice(5, 10)), ValueError, "5 to 10 are .* multiples of 10"),
    (lambda: stored([8, 0, 9]), UserError, "^codes: expected no code 0"),
    (lambda: stored([8, 8, 9, 1]), UserError, "^codes: expected zero bits after the last code"),
    *(
        (
            lambda fill=fill: quantize_with_compensation(
                torch.ones(4, 10), int4(), torch.full((10, 10), fill), name="qkv"
            ),
            UserError,
            words,
        )
        for fill, words in ((np.inf, "infinities"), (np.nan, "NaN"))
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), CALLS)
def test_what_is_no_format_weight_or_update_is_refused(call, error, words) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: {"codes": t["codes"].int()}, r"^codes: .*uint8 of shape \(4, 5\), got torch\.int32"),
        (lambda t: {"codes": t["codes"][:, :-1]}, r"^codes: expected .* \(4, 5\), got .* of shape \(4, 4\)"),
        (lambda t: {"scales": t["scales"].half()}, r"^scales: expected torch\.float32"),
        (lambda t: {"offsets": t["offsets"][:, :-1]}, r"^offsets: expected .* of shape \(4, 2\)"),
        (lambda t: {"scales": t["scales"] * torch.nan}, "^scales: expected finite numbers"),
        (lambda t: {"offsets": t["offsets"] * torch.nan}, "^offsets: expected finite numbers"),
        (lambda t: {"scales": -t["scales"]}, "^scales: expected no negative scale"),
        (lambda t: {"zero_points": t["codes"]}, "^expected the tensors codes, scales, offsets, got .*zero_poin"),
        (lambda t: {"offsets": None}, "^expected the tensors codes, scales, offsets, got codes, scales"),
    ],
)
def test_damaged_tensors_are_refused(
    damage: Callable[[dict[str, Tensor]], dict[str, Tensor | None]], words: str
) -> None:
    tensors = quantized().tensors()
    damaged = {name: tensor for name, tensor in (tensors | damage(tensors)).items() if tensor is not None}
    with pytest.raises(UserError, match=words):
        QuantizedTensor.from_tensors(damaged, (4, 10), int4())
