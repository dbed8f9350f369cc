"""Number formats, their codebooks, how codes are packed, and what a format says of a matrix's bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantization_strategies import TYPES
from scipy.stats import norm

from peft_vit.config import NUMBER_FORMATS
from peft_vit.config.registries import NumberFormat
from peft_vit.errors import UserError
from peft_vit.quantization import QuantizationFormat, code_values, pack_codes, quantize, unpack_codes
from peft_vit.quantization.packing import row_bytes, unpack_pairs

pytestmark = pytest.mark.part("quantization")


@pytest.mark.parametrize("bits", [3, 4])
def test_normal_codebooks_are_the_quantiles_of_the_papers(bits: int) -> None:
    # QLoRA: at 4 bits 8 quantiles for the positive half, 7 for the negative, zero shared, scaled so that the ends are 1
    # and -1. The outermost is half a step of probability from the end, of steps of 1/2^k above zero and 1/(2^k - 1)
    # below, on average.
    end = 1 - (0.5 / 2**bits + 0.5 / (2**bits - 1)) / 2
    assert bits == 3 or end == pytest.approx(0.9677083, abs=1e-7)  # of the paper
    half = 2 ** (bits - 1)
    positive = norm.ppf(np.linspace(end, 0.5, half + 1)[:-1])[::-1]
    negative = -norm.ppf(np.linspace(end, 0.5, half)[:-1])
    expected = np.concatenate([negative, [0.0], positive]) / norm.ppf(end)
    np.testing.assert_allclose(code_values(f"nf{bits}").numpy(), expected, atol=2e-7)
    assert code_values(f"nf{bits}")[half - 1] == 0


def test_fp4_values_are_sign_exponent_and_fraction() -> None:
    def value(code: int) -> float:
        sign, exponent, fraction = code >> 3, (code >> 1) & 3, code & 1
        # Exponents 0, 1, 2, 3 stand for: subnormal, 8, 4, 2 (before all are divided by the largest, 12).
        magnitude = fraction * 0.0625 if exponent == 0 else 2.0 ** (4 - exponent) * (1 + fraction / 2)
        return (-1) ** sign * magnitude / 12

    np.testing.assert_allclose(code_values("fp4").numpy(), [value(code) for code in range(16)], rtol=1e-7)


@pytest.mark.parametrize("type", TYPES)
def test_a_format_in_the_registry_is_whole(type: str) -> None:
    kind = NUMBER_FORMATS[type]
    for offset in (False, True):
        values = QuantizationFormat(type, 32, offset).values()
        assert values.shape == (2**kind.bits,)
        assert values.dtype is torch.float32
        if kind.values is not None:
            assert values.abs().max() == 1
            assert 0 in values


def test_a_codebook_of_other_bits_is_a_line_in_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NUMBER_FORMATS, "uneven", NumberFormat(2, (-1.0, 0.0, 0.25, 1.0)))
    format = QuantizationFormat("uneven", 4, offset=False)
    weight = torch.tensor([[-3.0, 0.9, 2.0, 0.1], [0.5, 0.1, -0.5, 0.0]])
    assert quantize(weight, format).dequantize().tolist() == [[-3.0, 0.75, 3.0, 0.0], [0.5, 0.125, -0.5, 0.0]]
    assert format.stored_bytes(2, 4) == 2 + 2 * 4


@given(bits=st.integers(1, 8), rows=st.integers(0, 4), columns=st.integers(1, 19), seed=st.integers(0, 999))
def test_unpacking_undoes_packing(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    before = codes.clone()
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    at_once = {1: 8, 2: 4, 4: 2, 6: 4, 8: 1}.get(bits, 8)  # codes that fill whole bytes
    assert packed.shape == (rows, -(-columns // at_once) * at_once * bits // 8) == (rows, row_bytes(columns, bits))
    assert torch.equal(unpack_codes(packed, bits, columns), codes)
    assert torch.equal(codes, before)


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (4, [0x1, 0x2, 0xF], [0x21, 0x0F]),
        (2, [0, 1, 2, 3, 3], [0b11100100, 0b00000011]),
        (8, [7, 200], [7, 200]),
        # 8 codes in 3 bytes: 1 + 8 * 2 + 64 * 3 + ..., lowest byte first; and 7 more that are not there
        (3, [1, 2, 3, 4, 5, 6, 7, 0, 7], [0b11010001, 0b01011000, 0b00011111, 7, 0, 0]),
    ],
)
def test_layout_is_the_documented_one(bits: int, codes: list[int], packed: list[int]) -> None:
    assert pack_codes(torch.tensor([codes], dtype=torch.uint8), bits).tolist() == [packed]


@pytest.mark.parametrize("bits", [3, 4])
def test_pairs_are_two_codes_in_one_number(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pairs = unpack_pairs(pack_codes(codes, bits), bits)
    assert torch.equal(pairs.int(), codes[:, ::2].int() + 2**bits * codes[:, 1::2].int())


def test_codes_and_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"below 4, got 4"):
        pack_codes(torch.tensor([[0, 4]], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match=r"expected 3 bytes a row for 5 codes, got 2"):
        unpack_codes(torch.zeros(1, 2, dtype=torch.uint8), 4, 5)


def test_groups_in_a_row() -> None:
    assert QuantizationFormat("int4", 32, offset=False).groups(384) == 12
    assert QuantizationFormat("int4", None, offset=False).groups(384) == 1
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
