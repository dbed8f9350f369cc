"""Codes in as few bytes as they need: four of 2 bits a byte, eight of 3 bits in three bytes, two of 4 bits a byte.

Layout: along a row, earlier inputs take lower bits, and of three bytes the first holds the lowest. A row begins on a
byte, and ends with a whole byte, of 3-bit codes with three; bits left over at its end are zero. That is the order of
onnxruntime's MatMulNBits; bitsandbytes puts the earlier code into the upper half.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BITS = (2, 3, 4, 8)


def codes_at_once(bits: int) -> int:
    """Return the smallest number of codes that fill whole bytes: 4 of 2 bits, 8 of 3, 2 of 4, 1 of 8."""
    return 8 // math.gcd(8, bits)


def row_bytes(columns: int, bits: int) -> int:
    """Return the bytes of so many codes in a row."""
    at_once = codes_at_once(bits)
    return -(-columns // at_once) * at_once * bits // 8


def field_bits(bits: int) -> int:
    """Return the bits of the smallest field of a power of two that holds a code: runtimes have no fields of 3 bits."""
    return 4 if bits == 3 else bits


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes row by row.

    Args:
        codes: uint8, (out, in), each below 2^bits.
        bits: 2, 3, 4 or 8.

    Returns:
        uint8, (out, `row_bytes(in, bits)`); for 8 bits the codes themselves, not a copy.

    Raises:
        ValueError: if a code does not fit into its bits, or bits is none of the four.
    """
    _check_bits(bits)
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"expected codes below {2**bits}, got {int(codes.max())}")
    if bits == 8:
        return codes.contiguous()
    at_once = codes_at_once(bits)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % at_once))
    words = padded[:, ::at_once].to(torch.int32 if bits == 3 else torch.uint8, memory_format=torch.contiguous_format)
    for position in range(1, at_once):
        words = words | padded[:, position::at_once].to(words.dtype) << (bits * position)
    if bits != 3:
        return words  # (out, bytes)
    return words.view(torch.uint8).unflatten(1, (-1, 4))[..., :3].flatten(1)  # (out, words, 4) -> (out, bytes)


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Return the codes that `pack_codes` packed.

    Each byte is widened to a word with a byte per code, and shifts of whole words move the codes into place
    (on a little-endian machine): about twice as fast as writing every second byte.

    Args:
        packed: uint8, (out, `row_bytes(columns, bits)`).
        bits: 2, 3, 4 or 8.
        columns: codes in a row.

    Returns:
        uint8 codes, (out, columns).

    Raises:
        ValueError: if bits is none of the four or the packed rows have another length.
    """
    _check_bits(bits)
    expected = row_bytes(columns, bits)
    if packed.shape[1] != expected:
        raise ValueError(f"expected {expected} bytes a row for {columns} codes, got {packed.shape[1]}")
    if bits == 8:
        return packed
    if bits == 4:
        words = packed.to(torch.int16, memory_format=torch.contiguous_format)
        words.bitwise_or_(words << 4).bitwise_and_(0x0F0F)
    elif bits == 3:
        words = _pairs_of_3_bits(packed)
        words.bitwise_or_(words << 5).bitwise_and_(0x0707070707070707)
    else:
        words = packed.to(torch.int32, memory_format=torch.contiguous_format)
        words.bitwise_or_(words << 12).bitwise_and_(0x000F000F)
        words.bitwise_or_(words << 6).bitwise_and_(0x03030303)
    return words.view(torch.uint8)[:, :columns]  # (out, bytes) -> (out, codes)


def unpack_pairs(packed: Tensor, bits: int) -> Tensor:
    """Return packed codes of 3 or 4 bits in pairs, as whole numbers: earlier + 2^bits later.

    Args:
        packed: uint8, (out, bytes), contiguous.
        bits: 3 or 4.

    Returns:
        uint8 or int16, (out, codes / 2), those that fill up a row included.
    """
    return packed if bits == 4 else _pairs_of_3_bits(packed).view(torch.int16)


def _pairs_of_3_bits(packed: Tensor) -> Tensor:
    """Return eight codes a word, (out, words) int64: a pair in the lowest 6 of each 16 bits."""
    threes = packed.unflatten(1, (-1, 3))  # (out, words, 3)
    words = torch.nn.functional.pad(threes, (0, 5)).view(torch.int64).squeeze(-1)  # (out, words, 8) -> (out, words)
    words.bitwise_or_(words << 20).bitwise_and_(0x00000FFF00000FFF)
    return words.bitwise_or_(words << 10).bitwise_and_(0x003F003F003F003F)


def _check_bits(bits: int) -> None:
    if bits not in _BITS:
        raise ValueError(f"expected 2, 3, 4 or 8 bits, got {bits}")
