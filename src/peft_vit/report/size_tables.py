"""Tables of what a low-bit model takes: what its bits promise, what was counted, and where the bytes are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from peft_vit.analysis import QuantizationImpact
from peft_vit.analysis.size import FLOAT16_BITS, FLOAT32_BITS, ModelBytes
from peft_vit.records import FloatPart
from peft_vit.report.document import Raw, Table
from peft_vit.report.numbers import fixed, megabytes


def size_table(impacts: Sequence[QuantizationImpact]) -> Table:
    """Return what is claimed of each format beside what was measured, for its layers and for the whole model."""
    return Table(
        slug="size",
        title="How much smaller: claimed and measured",
        columns=(
            "experiment",
            "claimed",
            "layers: bits a weight",
            "fp32 / layers",
            "fp16 / layers",
            "model: bits a weight",
            "fp32 / model",
            "fp16 / model",
            "live",
            "file",
            "memory of a run",
        ),
        rows=tuple(
            (
                q.experiment.name,
                _times(q.size.claimed),
                *_bits_and_ratios(q.size.layers_bits),
                *(_bits_and_ratios(q.size.model.bits_per_weight) if q.size.model else ("–", "–", "–")),
                megabytes(q.size.model.live) if q.size.model else "–",
                megabytes(q.size.model.file) if q.size.model else "–",
                "–" if q.size.own_memory_bytes is None else megabytes(q.size.own_memory_bytes),
            )
            for q in impacts
        ),
        note=(
            "Claimed: 32 over the bits of a code, 8 × for 4 bits and 4 × for 8, as is commonly said. Layers: codes, "
            "scales and offsets of the quantized layers. Model: with all that is left in float, once adapters are "
            "merged; against 4 bytes (fp32) and 2 bytes (fp16) for each value of the float model. Live: distinct "
            "storages of the low-bit model; file: the same as safetensors. Memory of a run: what training "
            "added to its process's memory at most, model and activations included. Means over seeds. – : not in these "
            "(older) records."
        ),
        data=tuple(_size_row(q) for q in impacts),
    )


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{fixed(ratio, 1)} ×"


def _bits_and_ratios(bits: float) -> tuple[str, str, str]:
    return fixed(bits), _times(FLOAT32_BITS / bits), _times(FLOAT16_BITS / bits)


def _size_row(q: QuantizationImpact) -> dict[str, Raw]:
    size, model = q.size, q.size.model
    model_bits = None if model is None else model.bits_per_weight
    return {
        "experiment": q.experiment.name,
        "claimed_vs_fp32": size.claimed,
        "layers_bits_per_weight": size.layers_bits,
        "layers_vs_fp32": FLOAT32_BITS / size.layers_bits,
        "layers_vs_fp16": FLOAT16_BITS / size.layers_bits,
        "model_bits_per_weight": model_bits,
        "model_vs_fp32": None if model_bits is None else FLOAT32_BITS / model_bits,
        "model_vs_fp16": None if model_bits is None else FLOAT16_BITS / model_bits,
        "live_bytes": None if model is None else model.live,
        "file_bytes": None if model is None else model.file,
        "own_memory_bytes": size.own_memory_bytes,
    }


def bytes_table(impacts: Sequence[QuantizationImpact]) -> Table:
    """Return where the bytes of each low-bit model are."""
    counted = [(q, q.size.model) for q in impacts if q.size.model is not None]
    parts = [part for part in get_args(FloatPart) if any(part in model.in_float for _, model in counted)]
    return Table(
        slug="size_parts",
        title="Where the bytes are",
        columns=("experiment", "codes", "scales", "offsets", *(f"{part} (float)" for part in parts), "together"),
        rows=tuple(
            (q.experiment.name, *(_with_share(value, model) for value in _bytes(model, parts)), megabytes(model.total))
            for q, model in counted
        ),
        note="Shares of the whole in brackets. Other: class and register tokens, layer scales. Means over seeds.",
        data=tuple(
            {
                "experiment": q.experiment.name,
                **dict(zip(("codes", "scales", "offsets", *parts), _bytes(model, parts), strict=True)),
                "total_bytes": model.total,
                "weights": model.weights,
            }
            for q, model in counted
        ),
    )


def _bytes(model: ModelBytes, parts: Sequence[FloatPart]) -> tuple[float, ...]:
    return (model.codes, model.scales, model.offsets, *(model.in_float.get(part, 0.0) for part in parts))


def _with_share(value: float, model: ModelBytes) -> str:
    return f"{megabytes(value)} ({fixed(100 * value / model.total, 1)} %)" if value else "–"


def layers_table(impacts: Sequence[QuantizationImpact]) -> Table:
    """Return stored bits a weight by kind of layer; the CSV file has every layer, with its error."""
    kinds = list(dict.fromkeys(_kind(name) for q in impacts for name in q.bits_by_layer))
    return Table(
        slug="bits_by_layer",
        title="Bits a weight by layer",
        columns=("experiment", *kinds),
        rows=tuple((q.experiment.name, *(_range(q.bits_by_layer, kind) for kind in kinds)) for q in impacts),
        note="Scales and offsets included; from the smallest to the largest over the blocks. The CSV has every layer.",
        data=tuple(
            {
                "experiment": q.experiment.name,
                "layer": name,
                "bits_per_weight": bits,
                "relative_error": q.error_by_layer.get(name),
            }
            for q in impacts
            for name, bits in q.bits_by_layer.items()
        ),
    )


def _kind(layer: str) -> str:
    return layer.rpartition(".")[2]


def _range(bits_by_layer: dict[str, float], kind: str) -> str:
    found = [bits for name, bits in bits_by_layer.items() if _kind(name) == kind]
    if not found:
        return "–"
    ends = dict.fromkeys((fixed(min(found)), fixed(max(found))))
    return " to ".join(ends)
