"""Tables of low bits: what they cost in accuracy and steadiness, what they take, and where the bytes are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

from peft_vit.analysis import Estimate, QuantizationImpact
from peft_vit.analysis.comparison import outcome
from peft_vit.analysis.quantization import BalanceStep
from peft_vit.analysis.size import FLOAT16_BITS, FLOAT32_BITS, ModelBytes
from peft_vit.records import FloatPart
from peft_vit.report.document import Cell, Raw, Row, Table
from peft_vit.report.formatting import COSTS, fixed, known, megabytes, percent, percent_interval, points_interval
from peft_vit.report.tables import FAMILY_NOTE, OVER_SEEDS, cell, comparison_values, ends, to_thousandths


def quantization_table(impacts: Sequence[QuantizationImpact]) -> Table:
    """Return accuracy and error by format."""
    compared = [q.against_unquantized for q in impacts]
    twins = ", ".join(sorted({c.reference for c in compared if c.interval is not None}))
    return Table.of(
        "quantization",
        "Accuracy and error by format",
        (
            {
                "experiment": cell("experiment", q.experiment.name),
                **_settings(q),
                "test accuracy": Cell(percent_interval(q.test_accuracy), ends("test_accuracy", q.test_accuracy)),
                "against float (points)": Cell(
                    points_interval(against.interval),
                    {
                        "difference_to_float": None if against.interval is None else against.interval.estimate,
                        "float_reference": against.reference,
                    },
                ),
                "relative error": Cell(
                    f"{fixed(100 * q.mean_relative_error, 2)} %",
                    {
                        "mean_relative_error": q.mean_relative_error,
                        "worst_module": q.worst_module[0],
                        "worst_relative_error": q.worst_module[1],
                    },
                ),
                "frozen": Cell(
                    megabytes(q.frozen_bytes),
                    {
                        "bits_per_weight": q.size.layers_bits,
                        "quantized_bytes": q.quantized_bytes,
                        "frozen_bytes": q.frozen_bytes,
                        "float_backbone_bytes": q.float_backbone_bytes,
                    },
                ),
            }
            for q, against in zip(impacts, compared, strict=True)
        ),
        "Against float: the same LoRA rank, scale and targets on float weights, paired by seed"
        f"{f' ({twins})' if twins else ''}. Relative error: ‖W − Wq‖ / ‖W‖, mean over layers. "
        "Frozen: everything that is frozen, quantized or not; the float backbone takes "
        f"{megabytes(impacts[0].float_backbone_bytes)}. {OVER_SEEDS}",
    )


def _settings(q: QuantizationImpact) -> dict[str, Cell]:
    settings = q.settings
    group_size = settings.group_size if settings.use_group_quantization else None
    return {
        "format": Cell(settings.quantization_type or "by layer", {"quantization_type": settings.quantization_type}),
        "groups": Cell(str(group_size or "rows"), {"group_size": group_size}),
        "schedule": Cell(
            settings.quantization_schedule,
            {"schedule": settings.quantization_schedule, "gradient_scaling_factor": settings.gradient_scaling_factor},
        ),
    }


_MEASURES = {
    "accuracy": "accuracy (points)",
    "nll": "NLL (nats)",
    "late_deviation": "late deviation (nats)",
    "roughness": "roughness (nats)",
}


def against_float_table(impacts: Sequence[QuantizationImpact]) -> Table:
    """Return every paired difference to the float twin, beside bits, format, groups and schedule."""
    return Table.of(
        "quantization_against_float",
        "Low bits minus the same LoRA on float weights, paired by seed",
        (
            {
                "experiment": q.experiment.name,
                "bits": q.settings.quantization_bits or "by layer",
                **_settings(q),
                "n": len(accuracy.by_seed),
                **{title: _difference(measure, q.against_float[measure]) for measure, title in _MEASURES.items()},
                "float twin": accuracy.reference if accuracy.by_seed else accuracy.note,
            }
            for q in impacts
            for accuracy in [q.against_unquantized]
        ),
        "Accuracy: negative is a loss. NLL on test, late deviation and roughness: positive is worse, less steady, "
        "rougher. Late deviation: standard deviation of the training loss about its own line over the last third "
        "of the steps; roughness: spread of a step's loss about its neighbours' mean. Both hold the noise of "
        f"minibatches, which pairs share. Each measure is one family of tests. {FAMILY_NOTE}",
        data=(
            {
                "experiment": q.experiment.name,
                "bits": q.settings.quantization_bits,
                **{name: value for one in _settings(q).values() for name, value in one.values.items()},
                "measure": measure,
                "float_reference": compared.reference,
                **ends("difference", compared.interval),
                **comparison_values(compared),
            }
            for q in impacts
            for measure, compared in q.against_float.items()
        ),
    )


def _difference(measure: str, comparison: Estimate) -> str:
    found = comparison.interval
    if found is None:
        return "not computed"
    text = points_interval(found) if measure == "accuracy" else to_thousandths(found)
    if comparison.verdict == "not decided":
        return f"{text}, not decided"
    return f"{text}, {'more' if comparison.verdict == 'supported' else 'less'}, {outcome(comparison)}"


def quantization_cost_table(impacts: Sequence[QuantizationImpact]) -> Table:
    """Return bytes, memory, seconds and latency of low bits, with the factor to the float twin."""
    return Table.of(
        "quantization_cost",
        "What low bits take, against the same LoRA on float weights",
        map(_cost_row, impacts),
        "Means over seeds; in brackets the factor on the float twin's, below 1 is less. To store: everything "
        "frozen, and the adapter file. Weights are unpacked when they are used, so fewer bits need not be faster. "
        "No factor of memory and seconds where the two ran on different machines or numbers of threads. Latency "
        "of other batch sizes: CSV. – : not recorded.",
    )


def _cost_row(q: QuantizationImpact) -> Row:
    def with_factor(name: str, write: Callable[[float], str]) -> str:
        own, other = q.costs.get(name), q.float_costs.get(name)
        if own is None:
            return "–"
        if other and (q.same_machine or name == "stored_bytes"):
            return f"{write(own)} (× {fixed(own / other)})"
        return write(own)

    has_twin = q.float_costs["stored_bytes"] is not None
    reference = q.against_unquantized.reference if has_twin else None
    values: dict[str, Raw] = {"float_reference": reference, "same_machine": int(q.same_machine), **q.costs}
    return {
        "experiment": cell("experiment", q.experiment.name),
        "bits a weight, layers": cell("bits_per_weight", q.size.layers_bits, fixed),
        "to store": with_factor("stored_bytes", megabytes),
        "memory of a run": with_factor("own_memory_bytes", megabytes),
        "a step": with_factor("seconds_per_step", COSTS["seconds_per_step"].write),
        "latency, 1 image": with_factor("latency_s_batch_1", COSTS["latency_s"].write),
        "float twin": Cell(
            reference or "none in this study",
            values | {f"float_{name}": value for name, value in q.float_costs.items()},
        ),
    }


def balance_table(impacts: Sequence[QuantizationImpact]) -> Table:
    """Return the measures of the balance at the first, the middle and the last check; the CSV file has every one."""
    courses: dict[tuple[str, str], list[BalanceStep]] = {}
    for q in impacts:
        for at in q.balance:
            courses.setdefault((q.experiment.name, at.name), []).append(at)

    def check(at: BalanceStep) -> str:
        return f"{at.mean:.4g} (step {at.step})"

    return Table.of(
        "quantization_balance",
        "Balance of quantization and adaptation",
        (
            {
                "experiment": experiment,
                "measure": name,
                "first check": check(course[0]),
                "in between": check(course[len(course) // 2]) if len(course) > 2 else "–",
                "last check": check(course[-1]) if len(course) > 1 else "–",
            }
            for (experiment, name), course in courses.items()
        ),
        "As recorded by the balance check, mean over the seeds that measured it then. The CSV has every check.",
        data=(
            {"experiment": experiment, "measure": name, "step": at.step, "mean": at.mean, "n": at.n}
            for (experiment, name), course in courses.items()
            for at in course
        ),
        folded=True,
    )


def size_table(impacts: Sequence[QuantizationImpact]) -> Table:
    """Return what is claimed of each format beside what was measured, for its layers and for the whole model."""
    return Table.of(
        "size",
        "How much smaller: claimed and measured",
        (
            {
                "experiment": cell("experiment", q.experiment.name),
                "claimed": cell("claimed_vs_fp32", q.size.claimed, _times),
                **_bits_and_ratios("layers", q.size.layers_bits),
                **_bits_and_ratios("model", q.size.model.bits_per_weight if q.size.model else None),
                "live": cell("live_bytes", q.size.model and q.size.model.live, megabytes),
                "file": cell("file_bytes", q.size.model and q.size.model.file, megabytes),
                "memory of a run": cell("own_memory_bytes", q.costs["own_memory_bytes"], megabytes),
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
        f"{of}: bits a weight": cell(f"{of}_bits_per_weight", bits, fixed),
        f"fp32 / {of}": cell(f"{of}_vs_fp32", bits and FLOAT32_BITS / bits, _times),
        f"fp16 / {of}": cell(f"{of}_vs_fp16", bits and FLOAT16_BITS / bits, _times),
    }


def bytes_table(impacts: Sequence[QuantizationImpact]) -> Table:
    """Return where the bytes of each low-bit model are."""
    counted = [(q, q.size.model) for q in impacts if q.size.model is not None]
    parts = [part for part in get_args(FloatPart) if any(part in model.in_float for _, model in counted)]

    def share(part: str, size: float, model: ModelBytes) -> Cell:
        return Cell(f"{megabytes(size)} ({percent(size / model.total)})" if size else "–", {part: size})

    return Table.of(
        "size_parts",
        "Where the bytes are",
        (
            {
                "experiment": cell("experiment", q.experiment.name),
                **{part: share(part, getattr(model, part), model) for part in ("codes", "scales", "offsets")},
                **{f"{part} (float)": share(part, model.in_float.get(part, 0.0), model) for part in parts},
                "together": Cell(megabytes(model.total), {"total_bytes": model.total, "weights": model.weights}),
            }
            for q, model in counted
        ),
        "Shares of the whole in brackets. Other: class and register tokens, layer scales. Means over seeds.",
        folded=True,
    )


def layers_table(impacts: Sequence[QuantizationImpact]) -> Table:
    """Return stored bits a weight by kind of layer; the CSV file has every layer, with its error."""
    by_kind: dict[str, dict[str, list[float]]] = {}  # kind -> experiment -> bits of its layers
    for q in impacts:
        for name, bits in q.bits_by_layer.items():
            by_kind.setdefault(name.rpartition(".")[2], {}).setdefault(q.experiment.name, []).append(bits)

    def text(bits: list[float]) -> str:
        return " to ".join(dict.fromkeys((fixed(min(bits)), fixed(max(bits)))))

    return Table.of(
        "bits_by_layer",
        "Bits a weight by layer",
        (
            {"experiment": name, **{kind: known(of.get(name), text) for kind, of in by_kind.items()}}
            for name in (q.experiment.name for q in impacts)
        ),
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
        folded=True,
    )
