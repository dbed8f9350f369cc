"""Number formats, their codebooks, how codes are packed, and what a format says of a matrix's bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from peft_vit.config import NUMBER_FORMATS
from peft_vit.config.registries import NumberFormat
from peft_vit.quantization import QuantizationFormat, code_values, pack_codes, quantize, unpack_codes
from peft_vit.quantization.packing import row_bytes, unpack_pairs

pytestmark = pytest.mark.part("quantization")


def test_the_normal_codebook_of_3_bits_is_made_as_qloras_of_4() -> None:
    # 4 quantiles for the positive half, 3 for the negative, zero shared, scaled so that the ends are 1 and -1. The
    # outermost is half a step of probability from the end, of steps of 1/2^k above zero and 1/(2^k - 1) below, on
    # average. bitsandbytes has the one of 4 bits: see the oracle.
    end = 1 - (0.5 / 8 + 0.5 / 7) / 2
    positive, negative = norm.ppf(np.linspace(end, 0.5, 5)[:-1])[::-1], -norm.ppf(np.linspace(end, 0.5, 4)[:-1])
    expected = np.concatenate([negative, [0.0], positive]) / norm.ppf(end)
    np.testing.assert_allclose(code_values("nf3").numpy(), expected, atol=2e-7)
    assert code_values("nf3")[3] == 0


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


def test_json_of_a_plain_format_is_that_of_older_files() -> None:
    plain = QuantizationFormat("nf4", 32, False, torch.float16)
    older = {"type": "nf4", "group_size": 32, "offset": False, "scale_dtype": "float16"}
    assert plain.as_json() == older
    double = QuantizationFormat("nf4", 32, False, torch.float16, double_quant=True)
    assert double.as_json() == older | {"double_quant": True}
    assert (QuantizationFormat.from_json(older), QuantizationFormat.from_json(double.as_json())) == (plain, double)
