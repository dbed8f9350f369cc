"""Codes in as few bytes as they need: four of 2 bits a byte, eight of 3 bits in three bytes, two of 4 bits a byte.

Layout: along a row, earlier inputs take lower bits, and of three bytes the first holds the lowest. A row begins on a
byte, and ends with a whole byte, of 3-bit codes with three; bits left over at its end are zero. That is the order of
onnxruntime's MatMulNBits; bitsandbytes puts the earlier code into the upper half.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# By bits: the word with a byte for each of the codes that fill whole bytes, and the shifts and masks that move them.
_SPREAD = {
    2: (torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    3: (torch.int64, ((20, 0x00000FFF00000FFF), (10, 0x003F003F003F003F), (5, 0x0707070707070707))),
    4: (torch.int16, ((4, 0x0F0F),)),
}


def codes_at_once(bits: int) -> int:
    """Return the smallest number of codes that fill whole bytes: 4 of 2 bits, 8 of 3, 2 of 4, 1 of 8."""
    return 8 // math.gcd(8, bits)


def row_bytes(columns: int, bits: int) -> int:
    """Return the bytes of so many codes in a row."""
    at_once = codes_at_once(bits)
    return -(-columns // at_once) * at_once * bits // 8


def field_bits(bits: int) -> int:
    """Return the bits of the smallest field of a power of two that holds a code: runtimes have no fields of 3 bits."""
    return 1 << (bits - 1).bit_length()


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes row by row.

    Args:
        codes: uint8, (out, in), each below 2^bits.
        bits: 1 to 8.

    Returns:
        uint8, (out, `row_bytes(in, bits)`); for 8 bits the codes themselves, not a copy.
    """
    if bits == 8:
        return codes.contiguous()
    at_once = codes_at_once(bits)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % at_once))  # (out, whole bytes of codes)
    words = padded[:, ::at_once].to(torch.uint8 if at_once * bits == 8 else torch.int64)  # (out, words)
    for position in range(1, at_once):
        words = words | padded[:, position::at_once].to(words.dtype) << (bits * position)
    as_bytes = words.contiguous().view(torch.uint8).unflatten(1, (words.shape[1], -1))  # (out, words, bytes of a word)
    return as_bytes[..., : at_once * bits // 8].flatten(1)  # (out, bytes)


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Return the codes that `pack_codes` packed.

    Of 2, 3 and 4 bits, each byte is widened to a word with a byte per code, and shifts of whole words move the codes
    into place (on a little-endian machine): about twice as fast as writing every second byte.

    Args:
        packed: uint8, (out, `row_bytes(columns, bits)`).
        bits: 1 to 8.
        columns: codes in a row.

    Returns:
        uint8 codes, (out, columns).
    """
    if bits == 8:
        return packed
    if bits in _SPREAD:
        dtype, steps = _SPREAD[bits]
        words = _words(packed, 3) if bits == 3 else packed.to(dtype, memory_format=torch.contiguous_format)
        for shift, mask in steps:
            words.bitwise_or_(words << shift).bitwise_and_(mask)
        return words.view(torch.uint8)[:, :columns]  # (out, words) -> (out, codes)
    positions = bits * torch.arange(codes_at_once(bits), device=packed.device)
    codes = _words(packed, bits).unsqueeze(-1) >> positions & 2**bits - 1  # (out, words, codes a word)
    return codes.flatten(1)[:, :columns].to(torch.uint8)  # (out, codes)


def _words(packed: Tensor, bits: int) -> Tensor:
    """Return the codes that fill whole bytes together in an int64 each, (out, words)."""
    size = codes_at_once(bits) * bits // 8
    grouped = packed.unflatten(1, (packed.shape[1] // size, size))  # (out, words, bytes a word)
    # (out, words, 8) -> (out, words, 1) -> (out, words)
    return torch.nn.functional.pad(grouped, (0, 8 - size)).view(torch.int64).squeeze(-1)
