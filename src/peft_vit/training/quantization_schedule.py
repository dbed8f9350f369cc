"""How strongly the quantized weight replaces the float one, step by step: from 0 to exactly 1.

With t the part of the way from `quantization_warmup_steps` to the end step, the quantized share is 1 (constant),
t (linear) or (1 - cos(pi t)) / 2 (cosine). This fading is this project's addition to QA-LoRA.
"""

from __future__ import annotations

import math

from peft_vit.config import QaLoraConfig
from peft_vit.errors import UserError


def end_step(config: QaLoraConfig, total_steps: int) -> int:
    """Return the step after which only quantized weights are left; 0 under a constant schedule.

    Raises:
        UserError: if the schedule can't finish within the run.
    """
    if config.quantization_schedule == "constant":
        return 0
    end = config.quantization_end_step
    if end is None:
        end = config.quantization_warmup_steps + max(1, 2 * (total_steps - config.quantization_warmup_steps) // 3)
    if end > total_steps or end <= config.quantization_warmup_steps:
        raise UserError(
            f"the schedule runs from step {config.quantization_warmup_steps} to {end} and can't finish within "
            f"{total_steps} steps; shorten it or train longer",
            field="qa_lora.quantization_end_step",
        )
    return end


def quantized_share(config: QaLoraConfig, total_steps: int, steps_done: int) -> float:
    """Return how much of the quantized weight is in use after `steps_done` steps at an even pace, 0 to exactly 1."""
    end = end_step(config, total_steps)
    if steps_done >= end:
        return 1.0
    start = config.quantization_warmup_steps
    return share_at(config, max(steps_done - start, 0) / (end - start))


def share_at(config: QaLoraConfig, part: float) -> float:
    """Return the share at a part of the way, 0 to 1."""
    if config.quantization_schedule == "constant" or part == 1.0:
        return 1.0
    return part if config.quantization_schedule == "linear" else (1 - math.cos(math.pi * part)) / 2


def next_part(part: float, steps_left: int, pace: float) -> float:
    """Return the part of the way after one more step of a schedule whose pace is managed.

    An even pace does 1 / steps_left of what is left; it is multiplied by `pace`. The last step does all of it, so
    the way ends at exactly 1 at the end step, and with a pace below 2 not before.

    Args:
        part: of the way done, 0 to 1.
        steps_left: to the end step, this one included.
        pace: 1 is even.
    """
    return 1.0 if steps_left <= 1 else part + pace * (1 - part) / steps_left
