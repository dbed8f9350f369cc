import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_vit.quantization import pack_codes, unpack_codes
from peft_vit.quantization.packing import row_bytes, unpack_pairs


@given(bits=st.integers(1, 8), rows=st.integers(0, 4), columns=st.integers(1, 19), seed=st.integers(0, 999))
def test_unpacking_undoes_packing(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    at_once = {1: 8, 2: 4, 4: 2, 8: 1}.get(bits, 4 if bits == 6 else 8)  # codes that fill whole bytes
    whole_bytes = -(-columns // at_once) * at_once * bits // 8
    assert packed.shape == (rows, whole_bytes) == (rows, row_bytes(columns, bits))
    assert torch.equal(unpack_codes(packed, bits, columns), codes)


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


def test_packing_leaves_the_codes_alone() -> None:
    codes = torch.tensor([[1, 2], [3, 3]], dtype=torch.uint8)
    before = codes.clone()
    pack_codes(codes, 2)
    pack_codes(codes[:1, :1], 4)
    assert torch.equal(codes, before)


def test_a_code_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"below 4, got 4"):
        pack_codes(torch.tensor([[0, 4]], dtype=torch.uint8), 2)


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected 3 bytes a row for 5 codes, got 2"):
        unpack_codes(torch.zeros(1, 2, dtype=torch.uint8), 4, 5)
