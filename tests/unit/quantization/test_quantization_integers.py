"""Weights and rows in 8-bit integers: products are integers' exactly; weights take 7 bits where 8 would saturate."""

from dataclasses import replace

import pytest
import torch

from peft_vit.core.quantization import QuantizationFormat, integers, quantize
from peft_vit.core.quantization.integers import Int8Matmul, Int8Weight, exact_matmuls, largest_exact_code, quantize_rows

PRODUCTS = exact_matmuls(384, "cpu")


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
@pytest.mark.parametrize("inputs", [8, 30, 64, 384, 1536])
@pytest.mark.parametrize("rows", [1, 3, 64, 300])
def test_the_largest_products_are_those_of_64_bit_integers(rows, inputs, product) -> None:
    generator = torch.Generator().manual_seed(0)
    (product,) = (here for here in exact_matmuls(inputs, "cpu") if here.name == product.name)
    signs = torch.randint(0, 2, (rows + 24, inputs), generator=generator, dtype=torch.int8) * 2 - 1
    signs[0], signs[-1] = 1, 1
    x, codes = signs[:rows] * integers.LARGEST, signs[rows:] * product.largest
    weight = Int8Weight(codes, torch.full((len(codes),), 0.5), product.name)
    exact = (x.long() @ codes.long().T).float()  # rounded to 24 bits, as the sums are
    assert torch.equal(weight.multiply(x), exact * 0.5)
    back = torch.randint(0, 2, (rows, len(codes)), generator=generator, dtype=torch.int8) * 2 - 1  # a gradient's rows
    exact = (back.long() * integers.LARGEST @ codes.long()).float()
    assert torch.equal(weight.multiply_back(back * integers.LARGEST), exact)


def saturating(weight, x):
    """Add pairs of products of x + 128 and the weights in 16 bits, as vpmaddubsw does."""
    shifted, weights = x.long() + 128, weight.codes.long()  # (N, in), (out, in)
    pairs = (shifted.unflatten(1, (-1, 2)).unsqueeze(1) * weights.unflatten(1, (-1, 2))).sum(-1)  # (N, out, in / 2)
    return (pairs.clamp(-(2**15), 2**15 - 1).sum(-1) - 128 * weights.sum(1)).float()


def test_weights_take_seven_bits_where_products_saturate(monkeypatch) -> None:
    largest_exact_code.cache_clear()
    monkeypatch.setattr(Int8Weight, "multiply", saturating)
    try:
        assert exact_matmuls(64, "cpu") == [Int8Matmul("int_mm", 7), Int8Matmul("qlinear", 7)]
        assert exact_matmuls(64, "cpu", 8) == []
        weight = Int8Weight.from_float(torch.randn(16, 64), Int8Matmul("int_mm", 7))
        assert weight.codes.abs().max() == 64
        x = torch.randint(-127, 128, (5, 64), dtype=torch.int8)
        assert torch.equal(saturating(weight, x), (x.long() @ weight.codes.long().T).float())
    finally:
        largest_exact_code.cache_clear()


def test_codes_are_the_nearest_and_scales_those_of_the_largest() -> None:
    weight = torch.randn(12, 40, generator=torch.Generator().manual_seed(1))
    weight[3] = 0
    rounded = Int8Weight.from_float(weight, Int8Matmul("int_mm", 8))
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((rounded.dequantize() - weight).abs() <= step / 2 * (1 + 1e-5)).all()
    assert torch.equal(rounded.dequantize()[3], torch.zeros(40))
    codes, scales = quantize_rows(weight)
    assert codes.dtype == torch.int8
    assert ((codes * scales - weight).abs() <= weight.abs().amax(1, keepdim=True) / 127 / 2 * (1 + 1e-5)).all()
    assert codes[[0, 1, 2]].abs().amax(1).tolist() == [127, 127, 127]
    assert torch.equal(codes[3], torch.zeros(40, dtype=torch.int8))


@pytest.mark.parametrize("type", ["int2", "int3", "int4", "int8"])
def test_packed_integers_with_one_scale_a_row_are_multiplied_as_they_are(type) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(3))
    packed = quantize(weight, QuantizationFormat(type, group_size=None, offset=False))
    integers = Int8Weight.from_quantized(packed, Int8Matmul("int_mm", 8))
    torch.testing.assert_close(integers.dequantize(), packed.dequantize(), rtol=1e-6, atol=0)
    assert int(integers.codes.abs().max()) < 2 ** (int(type[3:]) - 1)


def test_groups_whose_scales_are_whole_numbers_of_times_the_smallest_are_exact_and_others_near() -> None:
    generator = torch.Generator().manual_seed(4)
    packed = quantize(
        torch.randn(24, 64, generator=generator),
        QuantizationFormat("int4", group_size=16, offset=False, scale_dtype=torch.float32),
    )
    times = torch.randint(1, 9, packed.scales.shape, generator=generator)
    times[:, 0] = 1
    whole = replace(packed, scales=(torch.rand(24, 1, generator=generator) + 0.1) * times)
    integers = Int8Weight.from_quantized(whole, Int8Matmul("int_mm", 7))
    torch.testing.assert_close(integers.dequantize(), whole.dequantize(), rtol=1e-6, atol=1e-7)
    assert torch.equal(integers.codes.float(), (whole.dequantize() / whole.scales[:, :1]).round())
    near = Int8Weight.from_quantized(packed, Int8Matmul("int_mm", 7))
    error = (near.dequantize() - packed.dequantize()).norm() / packed.dequantize().norm()
    assert 0 < error < 0.015
