"""Codes in as few bytes as they need: two 4-bit codes a byte, four 2-bit codes.

Layout: along a row, earlier inputs take lower bits. A row begins on a byte; bits left over at its end are
zero. That is the order of onnxruntime's MatMulNBits; bitsandbytes puts the earlier code into the upper half.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes row by row.

    Args:
        codes: uint8, (out, in), each below 2^bits.
        bits: 2, 4 or 8.

    Returns:
        uint8, (out, ceil(in * bits / 8)); for 8 bits the codes themselves, not a copy.

    Raises:
        ValueError: if a code does not fit into its bits, or bits is none of the three.
    """
    _check_bits(bits)
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"expected codes below {2**bits}, got {int(codes.max())}")
    if bits == 8:
        return codes.contiguous()
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_byte))
    packed = padded[:, ::per_byte].clone(memory_format=torch.contiguous_format)  # (out, bytes)
    for position in range(1, per_byte):
        packed |= padded[:, position::per_byte] << (bits * position)
    return packed


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Return the codes that `pack_codes` packed.

    Each byte is widened to a word with a byte per code, and shifts of whole words move the codes into place
    (on a little-endian machine): about twice as fast as writing every second byte.

    Args:
        packed: uint8, (out, ceil(columns * bits / 8)).
        bits: 2, 4 or 8.
        columns: codes in a row.

    Returns:
        uint8 codes, (out, columns).

    Raises:
        ValueError: if bits is none of the three or the packed rows have another length.
    """
    _check_bits(bits)
    row_bytes = -(-columns * bits // 8)
    if packed.shape[1] != row_bytes:
        raise ValueError(f"expected {row_bytes} bytes a row for {columns} codes, got {packed.shape[1]}")
    if bits == 8:
        return packed
    if bits == 4:
        words = packed.to(torch.int16, memory_format=torch.contiguous_format)
        words.bitwise_or_(words << 4).bitwise_and_(0x0F0F)
    else:
        words = packed.to(torch.int32, memory_format=torch.contiguous_format)
        words.bitwise_or_(words << 12).bitwise_and_(0x000F000F)
        words.bitwise_or_(words << 6).bitwise_and_(0x03030303)
    return words.view(torch.uint8)[:, :columns]  # (out, bytes) -> (out, codes)


def _check_bits(bits: int) -> None:
    if bits not in (2, 4, 8):
        raise ValueError(f"expected 2, 4 or 8 bits, got {bits}")
