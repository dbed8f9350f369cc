import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantization_strategies import TYPES

from peft_vit.errors import UserError
from peft_vit.quantization import QuantizationFormat, quantize


@pytest.mark.parametrize(("type", "bits"), [("nf4", 4), ("fp4", 4), ("nf3", 3), ("int3", 3), ("int8", 8)])
def test_bits_of_a_code(type: str, bits: int) -> None:
    assert QuantizationFormat(type, 32, offset=True).bits == bits  # type: ignore[arg-type]


def test_groups_in_a_row() -> None:
    assert QuantizationFormat("int4", 32, offset=False).groups(384) == 12
    assert QuantizationFormat("int4", None, offset=False).groups(384) == 1


def test_a_group_size_that_does_not_divide_the_inputs_is_refused() -> None:
    with pytest.raises(UserError, match=r"group_size: 48 does not divide the matrix's 100 inputs"):
        QuantizationFormat("int4", 48, offset=False).groups(100)


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("type", ("int9", 32, False, torch.float32)),
        ("group_size", ("int4", 0, False, torch.float32)),
        ("scale_dtype", ("int4", 32, False, torch.bfloat16)),
        ("double_quant", ("int4", 32, False, torch.float16, 1)),
    ],
)
def test_a_field_that_no_format_has_is_refused(field: str, arguments: tuple) -> None:
    with pytest.raises(UserError, match=f"^{field}: expected"):
        QuantizationFormat(*arguments)


@pytest.mark.part("quantization")
@given(
    type=st.sampled_from(TYPES),
    group=st.sampled_from([None, 2, 3, 16]),
    offset=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    double_quant=st.booleans(),
    rows=st.integers(1, 90),
    groups=st.integers(1, 4),
)
def test_bytes_from_the_shape_are_the_stored_ones(type, group, offset, dtype, double_quant, rows, groups) -> None:
    format = QuantizationFormat(type, group, offset, dtype, double_quant)
    columns = groups * (group or 5)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    assert format.stored_bytes(rows, columns) == quantize(weight, format).nbytes


def test_json_of_a_plain_format_is_that_of_older_files() -> None:
    plain = QuantizationFormat("nf4", 32, False, torch.float16)
    older = {"type": "nf4", "group_size": 32, "offset": False, "scale_dtype": "float16"}
    assert plain.as_json() == older
    double = QuantizationFormat("nf4", 32, False, torch.float16, double_quant=True)
    assert double.as_json() == older | {"double_quant": True}
    assert (QuantizationFormat.from_json(older), QuantizationFormat.from_json(double.as_json())) == (plain, double)
