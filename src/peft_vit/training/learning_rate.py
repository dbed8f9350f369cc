"""The learning rate's course over a training."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, LRScheduler, OneCycleLR

from peft_vit.config import TrainingConfig

_WARMUP_STEPS = 20  # of warmup_stable_decay, or a tenth of the run
_ONE_CYCLE_SHARE = 0.3  # of the steps, for the way up
_DECAY_SHARE = 0.25  # of the steps before the decay


class WarmupStableDecay:
    """Factor on the learning rate: up to 1 in a line, 1 for as long as it takes, down to 0 in a line.

    For trainings whose length is not known before (arXiv 2404.06395): the way down may begin at any step. It takes a
    quarter of the steps before it, so a fifth of the run, and begins in time for the last step that there may be.

    Args:
        total_steps: that there may be.
        warmup_share: of them for the way up; None: 20 steps, or a tenth if that is less.
    """

    def __init__(self, total_steps: int, warmup_share: float | None = None) -> None:
        usual = min(_WARMUP_STEPS, total_steps // 10)
        self.warmup_steps = max(1, usual if warmup_share is None else round(warmup_share * total_steps))
        self.end = total_steps
        self.decay_from = total_steps - max(1, round(total_steps * _DECAY_SHARE / (1 + _DECAY_SHARE)))

    def bring_down(self, step: int) -> int:
        """Begin the way down after a step, unless it has begun; return the step that the training ends with."""
        if step < self.decay_from:
            self.decay_from = step
            self.end = min(self.end, step + max(1, round(step * _DECAY_SHARE)))
        return self.end

    def __call__(self, step: int) -> float:
        """Return the factor of the step that follows `step` steps."""
        up = (step + 1) / self.warmup_steps
        down = (self.end - step) / (self.end - self.decay_from + 1)
        return max(0.0, min(1.0, up, down))


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainingConfig, total_steps: int
) -> tuple[LRScheduler, WarmupStableDecay | None]:
    """Return the learning rate's course, and what can bring it down early, if anything can.

    one_cycle (arXiv 1708.07120, as torch's OneCycleLR) warms up over `warmup_share`, 30 % of the steps by default, and
    decays by cosine.
    """
    assert config.learning_rate is not None
    if config.schedule == "one_cycle":
        share = _ONE_CYCLE_SHARE if config.warmup_share is None else config.warmup_share
        peaks = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, peaks, total_steps=total_steps, pct_start=share, cycle_momentum=False), None
    if config.schedule == "constant":
        return ConstantLR(optimizer, factor=1.0), None
    decay = WarmupStableDecay(total_steps, config.warmup_share)
    return LambdaLR(optimizer, decay), decay
