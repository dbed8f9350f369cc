"""The loop, one optimiser step, and what methods hook into it."""

from peft_vit.errors import DivergedError
from peft_vit.training.adaptive_bits import ChosenBits, allocate_bits, check_bits
from peft_vit.training.allocation_hook import AllocationHook
from peft_vit.training.checkpoint import CheckpointKeeper, Checkpoints, CheckpointWarning, Interrupted
from peft_vit.training.checkpoint_state import State
from peft_vit.training.linear_probe import Features, LinearProbe, fit_probe, flip_axes, head_inputs, head_logits
from peft_vit.training.loop import train
from peft_vit.training.loss import class_weights
from peft_vit.training.optimization import AfterTraining, RunHook, StepHook, build_optimizer, optimization_step
from peft_vit.training.peft_adalora_hook import PeftAdaLoraHook, last_update
from peft_vit.training.progress import Progress
from peft_vit.training.qa_lora import QALoRATrainer
from peft_vit.training.quantization_schedule import end_step, quantized_share
from peft_vit.training.quantized_layers import check_rank, format_of
from peft_vit.training.runtime import RuntimeConfig
from peft_vit.training.training_state import TrainingResult, steps_per_epoch

__all__ = [
    "AfterTraining",
    "AllocationHook",
    "CheckpointKeeper",
    "CheckpointWarning",
    "Checkpoints",
    "ChosenBits",
    "DivergedError",
    "Features",
    "Interrupted",
    "LinearProbe",
    "PeftAdaLoraHook",
    "Progress",
    "QALoRATrainer",
    "RunHook",
    "RuntimeConfig",
    "State",
    "StepHook",
    "TrainingResult",
    "allocate_bits",
    "build_optimizer",
    "check_bits",
    "check_rank",
    "class_weights",
    "end_step",
    "fit_probe",
    "flip_axes",
    "format_of",
    "head_inputs",
    "head_logits",
    "last_update",
    "optimization_step",
    "quantized_share",
    "steps_per_epoch",
    "train",
]
