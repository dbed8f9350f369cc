"""Quality of predictions, and what a model weighs."""

from peft_vit.evaluation.footprint import (
    available_memory_bytes,
    frozen_bytes,
    head_parameters,
    optimizer_bytes,
    peak_memory_bytes,
    reset_peak_memory,
    storage_bytes,
    trainable_bytes,
    trainable_parameters,
)
from peft_vit.evaluation.metrics import expected_calibration_error, measure
from peft_vit.evaluation.predict import predict
from peft_vit.evaluation.size import model_size

__all__ = [
    "available_memory_bytes",
    "expected_calibration_error",
    "frozen_bytes",
    "head_parameters",
    "measure",
    "model_size",
    "optimizer_bytes",
    "peak_memory_bytes",
    "predict",
    "reset_peak_memory",
    "storage_bytes",
    "trainable_bytes",
    "trainable_parameters",
]
