"""Tables of what a low-bit model takes: what its bits promise, what was counted, and where the bytes are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from peft_vit.analysis import QuantizationImpact
from peft_vit.analysis.size import FLOAT16_BITS, FLOAT32_BITS, ModelBytes
from peft_vit.records import FloatPart
from peft_vit.report.document import Cell, Table
from peft_vit.report.formatting import fixed, megabytes
from peft_vit.report.tables import number_cell, text_cell


def size_table(impacts: Sequence[QuantizationImpact]) -> Table:
    """Return what is claimed of each format beside what was measured, for its layers and for the whole model."""
    return Table.of(
        "size",
        "How much smaller: claimed and measured",
        (
            {
                "experiment": text_cell("experiment", q.experiment.name),
                "claimed": number_cell("claimed_vs_fp32", q.size.claimed, _times),
                **_bits_and_ratios("layers", q.size.layers_bits),
                **_bits_and_ratios("model", q.size.model.bits_per_weight if q.size.model else None),
                "live": number_cell("live_bytes", None if q.size.model is None else q.size.model.live, megabytes),
                "file": number_cell("file_bytes", None if q.size.model is None else q.size.model.file, megabytes),
                "memory of a run": number_cell("own_memory_bytes", q.size.own_memory_bytes, megabytes),
            }
            for q in impacts
        ),
        "Claimed: 32 over the bits of a code, 8 × for 4 bits and 4 × for 8, as is commonly said. Layers: codes, "
        "scales and offsets of the quantized layers. Model: with all that is left in float, once adapters are "
        "merged; against 4 bytes (fp32) and 2 bytes (fp16) for each value of the float model. Live: distinct "
        "storages of the low-bit model; file: the same as safetensors. Memory of a run: what training "
        "added to its process's memory at most, model and activations included. Means over seeds. – : not in these "
        "(older) records.",
    )


def _times(ratio: float) -> str:
    return f"{fixed(ratio, 1)} ×"


def _bits_and_ratios(of: str, bits: float | None) -> dict[str, Cell]:
    return {
        f"{of}: bits a weight": number_cell(f"{of}_bits_per_weight", bits, fixed),
        f"fp32 / {of}": number_cell(f"{of}_vs_fp32", bits and FLOAT32_BITS / bits, _times),
        f"fp16 / {of}": number_cell(f"{of}_vs_fp16", bits and FLOAT16_BITS / bits, _times),
    }


def bytes_table(impacts: Sequence[QuantizationImpact]) -> Table:
    """Return where the bytes of each low-bit model are."""
    counted = [(q, q.size.model) for q in impacts if q.size.model is not None]
    parts = [part for part in get_args(FloatPart) if any(part in model.in_float for _, model in counted)]
    return Table.of(
        "size_parts",
        "Where the bytes are",
        (
            {
                "experiment": text_cell("experiment", q.experiment.name),
                **{
                    f"{part} (float)" if part in parts else part: Cell(_with_share(size, model), {part: size})
                    for part, size in _bytes(model, parts).items()
                },
                "together": Cell(megabytes(model.total), {"total_bytes": model.total, "weights": model.weights}),
            }
            for q, model in counted
        ),
        "Shares of the whole in brackets. Other: class and register tokens, layer scales. Means over seeds.",
    )


def _bytes(model: ModelBytes, parts: Sequence[FloatPart]) -> dict[str, float]:
    packed = {"codes": model.codes, "scales": model.scales, "offsets": model.offsets}
    return packed | {part: model.in_float.get(part, 0.0) for part in parts}


def _with_share(value: float, model: ModelBytes) -> str:
    return f"{megabytes(value)} ({fixed(100 * value / model.total, 1)} %)" if value else "–"


def layers_table(impacts: Sequence[QuantizationImpact]) -> Table:
    """Return stored bits a weight by kind of layer; the CSV file has every layer, with its error."""
    kinds = list(dict.fromkeys(_kind(name) for q in impacts for name in q.bits_by_layer))
    return Table.of(
        "bits_by_layer",
        "Bits a weight by layer",
        ({"experiment": q.experiment.name, **{k: _range(q.bits_by_layer, k) for k in kinds}} for q in impacts),
        "Scales and offsets included; from the smallest to the largest over the blocks. The CSV has every layer.",
        data=(
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
