"""Adapters that start at the quantization error: LoftQ's algorithm 1 in NumPy, on an orthonormal basis of groups."""

from functools import partial

import numpy as np
import pytest
import torch

from peft_vit.quantization import QuantizationFormat, loftq, quantize

pytestmark = pytest.mark.part("quantization")
PARTS = [(slice(0, 12), 3), (slice(12, 20), 0), (slice(20, 36), 2)]
CASES = [
    (QuantizationFormat("nf4", 64, False), 1, 5),  # as PEFT has it, whose own runs on a GPU alone
    (QuantizationFormat("nf4", 16, True, torch.float16), 16, 1),
    (QuantizationFormat("fp4", 16, False), 16, 4),
    (QuantizationFormat("int2", 16, True), 16, 1),
    (QuantizationFormat("int4", 16, False), 16, 3),
    (QuantizationFormat("int2", None, False), 1, 5),
]


def weight() -> torch.Tensor:
    return torch.tensor(np.random.default_rng(3).normal(size=(36, 128)), dtype=torch.float32)


def naive(matrix: np.ndarray, format: QuantizationFormat, pool: int, iterations: int) -> tuple[list, list]:
    """Return the errors after each iteration, and the updates (out, in)."""
    basis = np.kron(np.eye(matrix.shape[1] // pool), np.ones((pool, 1))) / np.sqrt(pool)  # (in, in / g), orthonormal
    update, errors, updates = np.zeros(matrix.shape), [], []
    for _ in range(iterations):
        left_over = torch.tensor(matrix - update, dtype=torch.float32)
        residual = matrix - quantize(left_over, format).dequantize().double().numpy()
        update = np.zeros(matrix.shape)
        for rows, rank in PARTS:
            u, s, vt = np.linalg.svd(residual[rows] @ basis)
            update[rows] = (u[:, :rank] * s[:rank]) @ vt[:rank] @ basis.T
        errors.append(np.linalg.norm(residual - update))
        updates.append(update)
    return errors, updates


@pytest.mark.parametrize(("format", "pool", "iterations"), CASES, ids=lambda one: getattr(one, "type", str(one)))
def test_it_is_the_best_update_of_its_rank_among_those_that_are_constant_on_groups(format, pool, iterations) -> None:
    W = weight()
    quantized, factors = loftq(W, partial(quantize, format=format), PARTS, pool=pool, iterations=iterations)
    assert [(left.shape[1], right.shape) for left, right in factors] == [(r, (r, 128 // pool)) for _, r in PARTS]
    update = torch.cat([left @ right for left, right in factors]).repeat_interleave(pool, 1).double().numpy()
    errors, updates = naive(W.double().numpy(), format, pool, iterations)
    np.testing.assert_allclose(update, updates[int(np.argmin(errors))], atol=2e-5)
    error = np.linalg.norm(W.double().numpy() - quantized.dequantize().double().numpy() - update)
    assert error == pytest.approx(min(errors), rel=1e-5)
    zero_start = np.linalg.norm((W - quantize(W, format).dequantize()).double().numpy())
    assert error < zero_start


@pytest.mark.parametrize("scales", [torch.float32, torch.float16])
def test_offsets_of_integers_take_up_what_an_update_adds_so_that_iterations_bring_next_to_nothing(scales) -> None:
    W, format = weight(), QuantizationFormat("int4", 16, True, scales)
    errors, _ = naive(W.double().numpy(), format, 16, 3)
    np.testing.assert_allclose(errors, errors[0], rtol=1e-3)
    quantized, factors = loftq(W, partial(quantize, format=format), PARTS, pool=16, iterations=3)
    update = torch.cat([left @ right for left, right in factors]).repeat_interleave(16, 1)
    assert torch.linalg.vector_norm(W - quantized.dequantize() - update) == pytest.approx(errors[0], rel=1e-3)


def test_adapters_start_in_float32_whatever_the_weight_has() -> None:
    format = QuantizationFormat("nf4", 16, False)
    _, factors = loftq(weight().bfloat16(), partial(quantize, format=format), PARTS, pool=16, iterations=1)
    assert {one.dtype for pair in factors for one in pair} == {torch.float32}
