"""Predictions, what single updates bring to their quality, and what a model weighs and takes."""

from peft_vit.evaluation.calibration import calibrate
from peft_vit.evaluation.footprint import (
    MemoryWatch,
    available_memory_bytes,
    frozen_bytes,
    give_memory_back,
    head_parameters,
    model_size,
    optimizer_bytes,
    peak_memory_bytes,
    peak_memory_of,
    reset_peak_memory,
    storage_bytes,
    trainable_bytes,
    trainable_parameters,
)
from peft_vit.evaluation.metrics import autocast, forward_s, measure_ablation, predict, predict_with_middle
