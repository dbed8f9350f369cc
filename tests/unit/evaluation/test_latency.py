"""A latency is the median of the timed passes, in evaluation mode, without gradients, at the run's precision."""

import pytest
import torch
from torch import nn

from peft_vit.core.training.metrics import forward_s

pytestmark = pytest.mark.part("runner")


class Scripted(nn.Module):
    """Takes as long as a list says, by moving the clock on, and notes how it was called."""

    def __init__(self, seconds: list[float], clock: list[float]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.seconds = seconds
        self.clock = clock
        self.seen: set[tuple] = set()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.clock[0] += self.seconds.pop(0)
        logits = self.linear(images)
        self.seen.add((self.training, torch.is_inference_mode_enabled(), logits.dtype, len(images)))
        return logits


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_it_is_the_median_of_twenty_passes_after_five(monkeypatch, precision, dtype) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    timed = [0.5, *[1.0] * 9, *[3.0] * 9, 1000.0]  # between the tenth and the eleventh: 2
    model = Scripted([7e5, 40.0, 0.25, 30.0, 20.0, *timed], clock).train()
    assert forward_s(model, torch.zeros(3, 4), precision=precision) == pytest.approx(2.0)
    assert model.seconds == []
    assert model.seen == {(False, True, dtype, 3)}
    assert model.training
