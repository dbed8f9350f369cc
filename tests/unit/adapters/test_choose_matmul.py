"""Which product of integers is chosen: the fastest exact one; slow ones are left at once, and refusals say times."""

import math
from collections.abc import Callable

import pytest
import torch

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import matmuls
from peft_vit.core.adapters.matmuls import SLOW, MatmulTimes, time_matmuls
from peft_vit.core.quantization.integers import Int8Matmul

CPU = torch.device("cpu")
LOOP, PACKED = Int8Matmul("int_mm", 8), Int8Matmul("qlinear", 7)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Let float take 10 ms and each product what a test says, with their numbers of rows in proportion."""

    def make(**seconds: float) -> list[int]:
        rows: list[int] = []
        monkeypatch.setattr(matmuls, "exact_matmuls", lambda inputs, device, bits=None: [LOOP, PACKED])
        monkeypatch.setattr(matmuls, "_in_float", lambda weight, dtype: (None, len(weight)))
        monkeypatch.setattr(matmuls, "_in_int8", lambda weight, product: (product.name, len(weight)))

        def took(x: torch.Tensor, linear: tuple[str | None, int]) -> float:
            name, outputs = linear
            if name is not None:
                rows.append(len(x))
            share = len(x) * outputs / (matmuls._ROWS * matmuls._OUTPUTS)
            return share * (0.01 if name is None else seconds[name])

        monkeypatch.setattr(matmuls, "_seconds", took)
        monkeypatch.setattr(matmuls, "_SECONDS", 0.0)
        return rows

    return make


@pytest.mark.parametrize(
    ("int_mm", "qlinear", "chosen", "faster"),
    [
        (0.002, 0.0019, LOOP, True),  # as fast, in more bits and less memory
        (0.002, 0.001, PACKED, True),
        (3.0, 0.006, PACKED, True),
        (3.0, 0.0095, PACKED, False),  # too little is gained
    ],
)
def test_the_fastest_is_chosen_and_integers_where_they_are_worth_it(timed, int_mm, qlinear, chosen, faster) -> None:
    timed(int_mm=int_mm, qlinear=qlinear)
    choice = time_matmuls(CPU)
    assert choice.matmul == chosen
    assert choice.is_faster == faster
    assert choice.usable(CPU) == chosen
    assert (choice.seconds, choice.float_s) == (pytest.approx({LOOP: int_mm, PACKED: qlinear}[chosen]), 0.01)


def test_a_nested_loop_is_left_after_a_few_values_and_its_time_is_reckoned(timed) -> None:
    rows = timed(int_mm=3.0, qlinear=2.0)
    choice = time_matmuls(CPU)
    assert set(rows) == {matmuls._FEW_ROWS}
    assert choice.seconds == pytest.approx(2.0)
    with pytest.raises(UserError, match=r"too slow here: .*2,000 ms in 8-bit integers \(oneDNN\), 10 in float"):
        choice.usable(CPU)


def test_a_moment_in_which_the_machine_stood_still_is_no_reason_to_leave_a_product(timed, monkeypatch) -> None:
    timed(int_mm=0.002, qlinear=0.004)
    took, still = matmuls._seconds, iter([0.0045] * 3)

    def of_a_busy_machine(x: torch.Tensor, linear: tuple[str | None, int]) -> float:
        return took(x, linear) if linear[0] is None else next(still, took(x, linear))

    monkeypatch.setattr(matmuls, "_seconds", of_a_busy_machine)
    choice = time_matmuls(CPU)
    assert choice.usable(CPU) == LOOP
    assert choice.seconds == pytest.approx(0.002)


def test_slow_is_several_times_floats_time_and_none_is_none() -> None:
    assert MatmulTimes(LOOP, 0.99 * SLOW, 1.0).usable(CPU) == LOOP
    with pytest.raises(UserError, match="go on elsewhere") as caught:
        MatmulTimes(LOOP, 1.01 * SLOW, 1.0).usable(CPU, "training.compute", "go on elsewhere")
    assert caught.value.field == "training.compute"
    with pytest.raises(UserError, match="multiplies no such 8-bit integers exactly"):
        MatmulTimes(None, math.inf, 1.0).usable(CPU)


def test_without_onednn_pytorchs_own_product_is_not_taken() -> None:
    """Its loop is what processors without AVX512-VNNI get; oneDNN's layer does not ask for the flag."""
    threads = torch.get_num_threads()
    with torch.backends.mkldnn.flags(enabled=False):
        choice = time_matmuls(CPU)
    assert choice.matmul.name == "qlinear"
    assert torch.get_num_threads() == threads
