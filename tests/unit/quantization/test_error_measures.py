import math

import pytest
import torch

from peft_vit.quantization import (
    QuantizationFormat,
    QuantizedTensor,
    error_bound,
    quantize,
    relative_error,
    signal_to_noise_db,
)

pytestmark = pytest.mark.filterwarnings("ignore::peft_vit.errors.UnderflowWarning")  # tiny weights are drawn


def four_levels() -> QuantizedTensor:
    """Return the weights 0, 1, 2, 3 in one group."""
    format = QuantizationFormat("int2", None, offset=True)
    return quantize(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), format)


def test_relative_error_by_hand() -> None:
    weight = torch.tensor([[0.0, 1.0, 2.0, 6.0]])  # error (0, 0, 0, 3), norm sqrt(41)
    assert relative_error(weight, four_levels()) == pytest.approx(3 / math.sqrt(41))


def test_signal_to_noise_by_hand() -> None:
    weight = torch.tensor([[0.0, 1.0, 2.0, 6.0]])
    assert signal_to_noise_db(weight, four_levels()) == pytest.approx(10 * math.log10(41 / 9))


def test_no_error_and_no_signal() -> None:
    same = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    assert relative_error(same, four_levels()) == 0
    assert signal_to_noise_db(same, four_levels()) == math.inf
    assert relative_error(torch.zeros(1, 4), four_levels()) == math.inf
    assert signal_to_noise_db(torch.zeros(1, 4), four_levels()) == -math.inf


def test_relative_error_survives_the_largest_and_smallest_weights() -> None:
    format = QuantizationFormat("int4", 32, offset=True)
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    expected = relative_error(weight, quantize(weight, format))
    for factor in (2.0**120, 2.0**-120):
        assert relative_error(weight * factor, quantize(weight * factor, format)) == pytest.approx(expected)


def test_more_bits_and_smaller_groups_lose_less() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))

    def error(type: str, group: int | None) -> float:
        return relative_error(weight, quantize(weight, QuantizationFormat(type, group, offset=True)))  # type: ignore[arg-type]

    assert error("int8", 32) < error("int4", 32) < error("int2", 32)
    assert error("int4", 16) < error("int4", 64) < error("int4", None)
    assert error("nf4", 64) < error("fp4", 64)


def test_bound_is_half_the_farther_gap() -> None:
    torch.testing.assert_close(error_bound(four_levels()), torch.full((1, 4), 0.5))
    nf4 = quantize(torch.tensor([[-2.0, 0.0, 2.0]]), QuantizationFormat("nf4", None, offset=False))
    # Between 0.7230 and 1, between -1 and -0.6962, between -0.0911 and 0.
    expected = torch.tensor([[0.3038072, 0.0910500, 0.2770432]])
    torch.testing.assert_close(error_bound(nf4), expected)
    assert bool((error_bound(nf4) > 0).all())
