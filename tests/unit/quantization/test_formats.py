"""Number formats, their codebooks, how codes are packed, and what a format says of a matrix's bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_vit.core.config import NUMBER_FORMATS
from peft_vit.core.config.registries import NumberFormat
from peft_vit.core.quantization import QuantizationFormat, pack_codes, quantize, unpack_codes
from peft_vit.core.quantization.packing import row_bytes

pytestmark = pytest.mark.part("quantization")


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


def test_json_of_a_format_is_that_of_older_files() -> None:
    plain = QuantizationFormat("nf4", 32, False, torch.float16)
    older = {"type": "nf4", "group_size": 32, "offset": False, "scale_dtype": "float16"}
    assert plain.as_json() == older
    assert QuantizationFormat.from_json(older) == plain
