"""The loop, one optimiser step, and what methods hook into it."""

from peft_vit.core.training.adaptive_bits import ChosenBits, allocate_bits, check_bits
from peft_vit.core.training.checkpoint import CheckpointKeeper, Checkpoints, CheckpointWarning, Interrupted, State
from peft_vit.core.training.hooks import Calibration, Hook, HookContext, Overhead, RuntimeConfig
from peft_vit.core.training.linear_probe import (
    FLIP_AXES,
    Features,
    LinearProbe,
    can_hold_out,
    fewest_groups,
    fit_probe,
    groups_left_out,
    head_inputs,
    head_logits,
    held_out_fit,
)
from peft_vit.core.training.loop import Progress, TrainingResult, train
from peft_vit.core.training.optimization import loss_weights, optimization_step
from peft_vit.core.training.processes import Helped, LostProcessError, Member
from peft_vit.core.training.qa_lora import QALoRATrainer, end_step
from peft_vit.core.training.quantized_layers import check_ranks
from peft_vit.core.training.rank_hooks import AllocationHook, PeftAdaLoraHook, StartingRanks, last_update
