"""Which product of 8-bit integers is exact and the fastest on this machine, beside a float product of the same shape.

No flag of a processor says it: the same call is a nested loop on one and three times as fast as float32 on another, see
`quantization.integers`. So each product is tried here, first on so few values that a nested loop is left after
milliseconds; in turn with float, the fastest of several times, and on one thread, whatever else the machine does.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_vit.base.errors import UserError
from peft_vit.core.adapters.integer_product import integer_product
from peft_vit.core.quantization.integers import Bits, IntegerWeight, Product, exact_products

FASTER = 1.1  # times, than float, for products of integers to be chosen
SLOW = 5.0  # times float's seconds, beyond which integers are refused
_ROWS, _INPUTS, _OUTPUTS = 512, 384, 1536  # of a ViT-S
_FEW_ROWS, _FEW_OUTPUTS = 32, 256  # of the first try
_HOPELESS, _HOPELESS_S = 5.0, 1e-3  # times float's seconds in the first try, and seconds: beyond both nobody goes on
_MUCH_FASTER = 0.95  # of the seconds of another: more does not pay for fewer bits, or memory of packed weights
_SECONDS, _ROUNDS = 0.3, 3  # of trying, about; rounds at the least


_Linear = Callable[[Tensor], Tensor]  # (N, in) -> (N, out)


@dataclass(frozen=True)
class ProductTimes:
    """What was found.

    Attributes:
        product: the fastest exact one; None: the device has none.
        seconds: of a product forward and one back, with the rounding of their inputs; infinite without one.
        float_s: of the same in float.
    """

    product: Product | None
    seconds: float
    float_s: float

    @property
    def is_faster(self) -> bool:
        """Return whether integers are worth it."""
        return FASTER * self.seconds < self.float_s

    @property
    def is_slow(self) -> bool:
        """Return whether nobody would wait for it."""
        return self.seconds > SLOW * self.float_s

    @property
    def times(self) -> str:
        """Return both times, for people."""
        assert self.product is not None
        call = {"int_mm": "torch._int_mm", "qlinear": "oneDNN"}[self.product.name]
        integers, floats = (
            f"{1e3 * seconds:,.0f}" if seconds >= 0.01 else f"{1e3 * seconds:.1f}"
            for seconds in (self.seconds, self.float_s)
        )
        return f"products take {integers} ms in 8-bit integers ({call}), {floats} in float"

    def usable(self, device: torch.device, field: str = "training.compute", remedy: str = "use float") -> Product:
        """Return the product.

        Raises:
            UserError: if there is none, or it is so slow that nobody would wait for it; with what to do.
        """
        if self.product is None:
            raise UserError(f"{device.type} multiplies no such 8-bit integers exactly; {remedy}", field=field)
        if self.is_slow:
            raise UserError(f"int8 is too slow here: {self.times}; {remedy}", field=field)
        return self.product


def measure_products(
    device: torch.device, dtype: torch.dtype = torch.float32, bits: Bits | None = None
) -> ProductTimes:
    """Try every exact product of a device beside the float one.

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
        first_s = min(_seconds(few[0], _in_float(few[1], dtype)) for _ in range(_ROUNDS))
        calls: dict[Product | None, _Linear] = {None: _in_float(weight, dtype)}
        exact: dict[Product, float] = {}
        for product in exact_products(_INPUTS, device.type, bits):
            seconds = _seconds(few[0], _in_integers(few[1], product))
            if seconds > max(_HOPELESS * first_s, _HOPELESS_S):
                exact[product] = seconds * x.numel() * _OUTPUTS / (few[0].numel() * _FEW_OUTPUTS)
            else:
                calls[product] = _in_integers(weight, product)
        float_s, rounds, started = math.inf, 0, time.perf_counter()
        while rounds < _ROUNDS or time.perf_counter() - started < _SECONDS:
            rounds += 1
            for way, call in calls.items():
                seconds = _seconds(x, call)
                if way is None:
                    float_s = min(seconds, float_s)
                else:
                    exact[way] = min(seconds, exact.get(way, math.inf))
    finally:
        torch.set_num_threads(threads)
    best: Product | None = None
    for product, seconds in exact.items():
        if best is None or seconds < _MUCH_FASTER * exact[best]:
            best = product
    return ProductTimes(best, math.inf if best is None else exact[best], float_s)


@functools.cache
def product_here(device: torch.device) -> Product:
    """Return the fastest exact product, measured once a process (UserError as `ProductTimes.usable`)."""
    return measure_products(device).usable(device)


def _in_float(weight: Tensor, dtype: torch.dtype) -> _Linear:
    typed = weight.to(dtype)
    return lambda x: F.linear(x.to(dtype), typed)


def _in_integers(weight: Tensor, product: Product) -> _Linear:
    integers = IntegerWeight.from_float(weight, product)
    return lambda x: integer_product(x, integers, None, [])


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
