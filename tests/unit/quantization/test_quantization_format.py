import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_vit.errors import UserError
from peft_vit.quantization import QuantizationFormat, quantize


@pytest.mark.parametrize(("type", "bits"), [("nf4", 4), ("fp4", 4), ("int2", 2), ("int4", 4), ("int8", 8)])
def test_bits_and_codes_per_byte(type: str, bits: int) -> None:
    format = QuantizationFormat(type, 32, offset=True)  # type: ignore[arg-type]
    assert (format.bits, format.codes_per_byte) == (bits, 8 // bits)


def test_groups_in_a_row() -> None:
    assert QuantizationFormat("int4", 32, offset=False).groups(384) == 12
    assert QuantizationFormat("int4", None, offset=False).groups(384) == 1


def test_a_group_size_that_does_not_divide_the_inputs_is_refused() -> None:
    with pytest.raises(UserError, match=r"group_size: 48 does not divide the matrix's 100 inputs"):
        QuantizationFormat("int4", 48, offset=False).groups(100)


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("type", ("int3", 32, False, torch.float32)),
        ("group_size", ("int4", 0, False, torch.float32)),
        ("scale_dtype", ("int4", 32, False, torch.bfloat16)),
    ],
)
def test_a_field_that_no_format_has_is_refused(field: str, arguments: tuple) -> None:
    with pytest.raises(UserError, match=f"^{field}: expected"):
        QuantizationFormat(*arguments)


@pytest.mark.part("quantization")
@given(
    type=st.sampled_from(["nf4", "fp4", "int2", "int4", "int8"]),
    group=st.sampled_from([None, 2, 3, 16]),
    offset=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
)
def test_bytes_from_the_shape_are_the_stored_ones(type, group, offset, dtype, rows, groups) -> None:
    format = QuantizationFormat(type, group, offset, dtype)
    columns = groups * (group or 5)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    assert format.stored_bytes(rows, columns) == quantize(weight, format).nbytes
