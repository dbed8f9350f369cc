"""Which int8 matmul is exact and the fastest on this machine, beside a float one of the same shape.

No flag of a processor says it: the same call is a nested loop on one and three times as fast as float32 on another, see
`quantization.integers`. So each product is tried here, first on so few values that a nested loop is left after
milliseconds; in turn with float, the fastest of several times, and on one thread, whatever else the machine does.
"""

from __future__ import annotations

import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_vit.base.errors import UserError
from peft_vit.core.adapters.integer_product import int8_linear
from peft_vit.core.quantization.integers import Bits, Int8Matmul, Int8Weight, exact_matmuls

FASTER = 1.1  # times, than float, for products of integers to be chosen
SLOW = 5.0  # times float's seconds, beyond which integers are refused
_ROWS, _INPUTS, _OUTPUTS = 512, 384, 1536  # of a ViT-S
_FEW_ROWS, _FEW_OUTPUTS = 32, 256  # of the first try
_HOPELESS, _HOPELESS_S = 5.0, 1e-3  # times float's seconds in the first try, and seconds: beyond both nobody goes on
_TRIES = 10  # of the few values, before a product is left: some fall into moments when other work has the processor
_MUCH_FASTER = 0.95  # of the seconds of another: more does not pay for fewer bits, or memory of packed weights
_SECONDS, _ROUNDS = 0.3, 3  # of trying, about; rounds at the least


_Linear = Callable[[Tensor], Tensor]  # (N, in) -> (N, out)


@dataclass(frozen=True)
class MatmulTimes:
    """How long the fastest exact int8 matmul of a device takes, and one in float.

    Attributes:
        matmul: the fastest; None: the device has no exact one.
        seconds: of one forward and one back, with the rounding of their inputs; infinite without one.
        float_s: of the same in float.
    """

    matmul: Int8Matmul | None
    seconds: float
    float_s: float

    @property
    def is_faster(self) -> bool:
        """Return whether int8 is worth it."""
        return FASTER * self.seconds < self.float_s

    @property
    def times(self) -> str:
        """Return both times, for people."""
        assert self.matmul is not None
        call = {"int_mm": "torch._int_mm", "qlinear": "oneDNN"}[self.matmul.name]
        integers, floats = (
            f"{1e3 * seconds:,.0f}" if seconds >= 0.01 else f"{1e3 * seconds:.1f}"
            for seconds in (self.seconds, self.float_s)
        )
        return f"products take {integers} ms in 8-bit integers ({call}), {floats} in float"

    def usable(self, device: torch.device, field: str = "training.compute", remedy: str = "use float") -> Int8Matmul:
        """Return the matmul.

        Raises:
            UserError: if there is none, or it is so slow that nobody would wait for it; with what to do.
        """
        if self.matmul is None:
            raise UserError(f"{device.type} multiplies no such 8-bit integers exactly; {remedy}", field=field)
        if self.seconds > SLOW * self.float_s:
            raise UserError(f"int8 is too slow here: {self.times}; {remedy}", field=field)
        return self.matmul


def time_matmuls(device: torch.device, dtype: torch.dtype = torch.float32, bits: Bits | None = None) -> MatmulTimes:
    """Time every exact int8 matmul of a device, and the float one.

    Args:
        device: on which they are tried.
        dtype: of the float product.
        bits: of weights; None: as many as are exact.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(shape, generator=generator).to(device) for shape in ((_ROWS, _INPUTS), (_OUTPUTS, _INPUTS))
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        few = x[:_FEW_ROWS], weight[:_FEW_OUTPUTS]
        few_float_s = min(_seconds(few[0], _in_float(few[1], dtype)) for _ in range(_ROUNDS))
        calls: dict[Int8Matmul | None, _Linear] = {None: _in_float(weight, dtype)}
        seconds: dict[Int8Matmul | None, float] = defaultdict(lambda: math.inf)
        for matmul in exact_matmuls(_INPUTS, device.type, bits):
            few_s = min(_seconds(few[0], _in_int8(few[1], matmul)) for _ in range(_TRIES))
            if few_s <= max(_HOPELESS * few_float_s, _HOPELESS_S):
                calls[matmul] = _in_int8(weight, matmul)
            else:
                seconds[matmul] = few_s * x.numel() * _OUTPUTS / (few[0].numel() * _FEW_OUTPUTS)
        rounds, started = 0, time.perf_counter()
        while rounds < _ROUNDS or time.perf_counter() - started < _SECONDS:
            rounds += 1
            for way, call in calls.items():
                seconds[way] = min(seconds[way], _seconds(x, call))
    finally:
        torch.set_num_threads(threads)
    float_s = seconds.pop(None)
    best: Int8Matmul | None = None
    best_s = math.inf
    for way, way_s in seconds.items():
        if way_s < _MUCH_FASTER * best_s:
            best, best_s = way, way_s
    return MatmulTimes(best, best_s, float_s)


@functools.cache
def fastest_matmul(device: torch.device) -> Int8Matmul:
    """Return the fastest exact int8 matmul, measured once a process (UserError as `MatmulTimes.usable`)."""
    return time_matmuls(device).usable(device)


def _in_float(weight: Tensor, dtype: torch.dtype) -> _Linear:
    typed = weight.to(dtype)
    return lambda x: F.linear(x.to(dtype), typed)


def _in_int8(weight: Tensor, matmul: Int8Matmul) -> _Linear:
    rounded = Int8Weight.from_float(weight, matmul)
    return lambda x: int8_linear(x, rounded, None, [])


def _seconds(x: Tensor, linear: _Linear) -> float:
    """Return the seconds of a layer forward and back to its inputs (N, in); of the second time, as the first packs."""
    seconds = 0.0
    for _ in range(2):
        inputs = x.detach().requires_grad_()
        started = time.perf_counter()
        y = linear(inputs)  # (N, out)
        (of_x,) = torch.autograd.grad(y, inputs, y)
        float(of_x[0, 0])  # waits for a GPU
        seconds = time.perf_counter() - started
    return seconds
