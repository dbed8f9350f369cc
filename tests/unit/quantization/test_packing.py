import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_vit.quantization import pack_codes, unpack_codes


@given(bits=st.sampled_from([2, 4, 8]), rows=st.integers(0, 4), columns=st.integers(1, 19), seed=st.integers(0, 999))
def test_unpacking_undoes_packing(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-columns * bits // 8))
    assert torch.equal(unpack_codes(packed, bits, columns), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [(4, [0x1, 0x2, 0xF], [0x21, 0x0F]), (2, [0, 1, 2, 3, 3], [0b11100100, 0b00000011]), (8, [7, 200], [7, 200])],
)
def test_layout_is_the_documented_one(bits: int, codes: list[int], packed: list[int]) -> None:
    assert pack_codes(torch.tensor([codes], dtype=torch.uint8), bits).tolist() == [packed]


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


def test_other_bits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2, 4 or 8 bits, got 3"):
        pack_codes(torch.zeros(1, 2, dtype=torch.uint8), 3)
