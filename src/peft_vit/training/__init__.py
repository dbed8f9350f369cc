"""The loop, one optimiser step, and what methods hook into it."""

from peft_vit.training.adaptive_bits import ChosenBits, allocate_bits, check_bits
from peft_vit.training.allocation_hook import AllocationHook
from peft_vit.training.calibration import Calibration
from peft_vit.training.checkpoint import CheckpointKeeper, Checkpoints, CheckpointWarning, Interrupted
from peft_vit.training.checkpoint_state import State
from peft_vit.training.hooks import AfterTraining, BeforeTraining, Hook, Overhead
from peft_vit.training.linear_probe import (
    Features,
    LinearProbe,
    fit_probe,
    flip_axes,
    head_inputs,
    head_logits,
    held_out_temperature,
)
from peft_vit.training.loop import train
from peft_vit.training.optimization import loss_weights, optimization_step
from peft_vit.training.peft_adalora_hook import PeftAdaLoraHook, last_update
from peft_vit.training.progress import Progress
from peft_vit.training.qa_lora import QALoRATrainer
from peft_vit.training.quantization_schedule import end_step
from peft_vit.training.quantized_layers import check_ranks
from peft_vit.training.runtime import RuntimeConfig
from peft_vit.training.starting_ranks import StartingRanks
from peft_vit.training.training_state import TrainingResult, steps_per_epoch

__all__ = [
    "AfterTraining",
    "AllocationHook",
    "BeforeTraining",
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
    "flip_axes",
    "head_inputs",
    "head_logits",
    "held_out_temperature",
    "last_update",
    "loss_weights",
    "optimization_step",
    "steps_per_epoch",
    "train",
]
