"""How small a quantized model is, beside how small its bits alone would make it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from peft_vit.analysis.studies import Run
from peft_vit.config import QaLoraConfig
from peft_vit.records import FloatPart, QuantizationSummary

FLOAT32_BITS, FLOAT16_BITS = 32, 16


@dataclass(frozen=True)
class ModelBytes:
    """Where the bytes of a low-bit model are, mean over seeds."""

    codes: float  # packed codes of the quantized layers
    scales: float  # their scales
    offsets: float  # their offsets, with those that merging adds
    in_float: dict[FloatPart, float]  # everything else, by part
    weights: float  # values of the float model, head included
    live: float  # distinct storages
    file: float  # the same as a safetensors file

    @property
    def total(self) -> float:
        """Return what the model takes once adapters are merged."""
        return self.codes + self.scales + self.offsets + sum(self.in_float.values())

    @property
    def bits_per_weight(self) -> float:
        """Return the bits that one value of the float model takes, everything counted."""
        return 8 * self.total / self.weights


@dataclass(frozen=True)
class MeasuredSize:
    """What is commonly claimed of a format, and what was counted; ratios are of bits, larger is smaller."""

    # float32 over the bits of a code, as if that were all; None if neither settings nor records tell
    claimed: float | None
    layers_bits: float  # stored bits a weight over the quantized layers, scales and offsets included
    model: ModelBytes | None  # the whole model; None in older records


def measured_size(settings: QaLoraConfig, runs: Sequence[Run]) -> MeasuredSize:
    """Return the size that quantized runs of one experiment recorded."""
    summaries = [run.record.quantization for run in runs if run.record.quantization is not None]
    return MeasuredSize(
        claimed=_claimed(settings, summaries),
        layers_bits=fmean(summary.bits_per_weight for summary in summaries),
        model=_model_bytes(summaries),
    )


def _claimed(settings: QaLoraConfig, summaries: Sequence[QuantizationSummary]) -> float | None:
    if settings.quantization_bits is not None:
        return FLOAT32_BITS / settings.quantization_bits
    layers = [layer for summary in summaries if summary.size for layer in summary.size.layers.values()]
    if not layers:
        return None
    return FLOAT32_BITS * sum(layer.weights for layer in layers) / (8 * sum(layer.codes_bytes for layer in layers))


def _model_bytes(summaries: Sequence[QuantizationSummary]) -> ModelBytes | None:
    sizes = [summary.size for summary in summaries if summary.size is not None]
    if not sizes:
        return None
    parts = list(dict.fromkeys(part for size in sizes for part in size.float_bytes))
    return ModelBytes(
        codes=fmean(sum(layer.codes_bytes for layer in size.layers.values()) for size in sizes),
        scales=fmean(sum(layer.scales_bytes for layer in size.layers.values()) for size in sizes),
        offsets=fmean(
            size.merging_bytes + sum(layer.offsets_bytes for layer in size.layers.values()) for size in sizes
        ),
        in_float={part: fmean(size.float_bytes.get(part, 0) for size in sizes) for part in parts},
        weights=fmean(size.weights for size in sizes),
        live=fmean(size.live_bytes for size in sizes),
        file=fmean(size.file_bytes for size in sizes),
    )


def bits_by_layer(runs: Sequence[Run]) -> dict[str, float]:
    """Return module -> stored bits a weight in the end, mean over seeds."""
    last = [run.record.bits_history[-1].bits_per_weight for run in runs if run.record.bits_history]
    shared = set.intersection(*(set(bits) for bits in last)) if last else set()
    return {name: fmean(bits[name] for bits in last) for name in (last[0] if last else ()) if name in shared}
