"""The loop, one optimiser step, and what methods hook into it."""

from peft_vit.training.adaptive_bits import ChosenBits, allocate_bits, check_bits
from peft_vit.training.allocation_hook import AllocationHook
from peft_vit.training.checkpoint import CheckpointKeeper, Checkpoints, CheckpointWarning, Interrupted, State
from peft_vit.training.hooks import AfterTraining, Hook, Overhead
from peft_vit.training.linear_probe import (
    FLIP_AXES,
    Features,
    LinearProbe,
    fit_probe,
    head_inputs,
    head_logits,
    held_out_temperature,
)
from peft_vit.training.loop import Progress, TrainingResult, steps_per_epoch, train
from peft_vit.training.optimization import loss_weights, optimization_step
from peft_vit.training.peft_adalora_hook import PeftAdaLoraHook, last_update
from peft_vit.training.qa_lora import QALoRATrainer, end_step
from peft_vit.training.quantized_layers import check_ranks
from peft_vit.training.runtime import Calibration, RuntimeConfig
from peft_vit.training.starting_ranks import StartingRanks

__all__ = [
    "FLIP_AXES",
    "AfterTraining",
    "AllocationHook",
    "Calibration",
    "CheckpointKeeper",
    "CheckpointWarning",
    "Checkpoints",
    "ChosenBits",
    "Features",
    "Hook",
    "Interrupted",
    "LinearProbe",
    "Overhead",
    "PeftAdaLoraHook",
    "Progress",
    "QALoRATrainer",
    "RuntimeConfig",
    "StartingRanks",
    "State",
    "TrainingResult",
    "allocate_bits",
    "check_bits",
    "check_ranks",
    "end_step",
    "fit_probe",
    "head_inputs",
    "head_logits",
    "held_out_temperature",
    "last_update",
    "loss_weights",
    "optimization_step",
    "steps_per_epoch",
    "train",
]
