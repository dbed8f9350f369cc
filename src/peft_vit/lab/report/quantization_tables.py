"""Tables of low bits: what they cost in accuracy and steadiness, what they take, and where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from peft_vit.base.statistics import mean_interval
from peft_vit.base.statistics.descriptive import grouped
from peft_vit.base.statistics.estimates import describe_test
from peft_vit.deploy.page.document import Column, Table, csv_rows, interval_columns, table
from peft_vit.deploy.page.formatting import fixed, megabytes, percent_interval, points_interval
from peft_vit.lab.analysis import QuantizationImpact, Run
from peft_vit.lab.analysis.quantization import FLOAT16_BITS, FLOAT32_BITS, layers_bits
from peft_vit.lab.report.columns import EXPERIMENT, FAMILY_NOTE, OVER_SEEDS, comparison_values, mean_of, to_thousandths


def quantization_tables(impacts: Sequence[QuantizationImpact]) -> Iterator[Table]:
    """Yield every table of experiments on quantized weights; of layers and balance where recorded."""
    if not impacts:
        return
    yield _accuracy_table(impacts)
    yield _against_float_table(impacts)
    yield _size_table(impacts)
    yield from (table for table in (_layers_table(impacts), _balance_table(impacts)) if table.rows)


_SETTINGS = [
    Column("format", "settings.quantization_type", data="quantization_type", none="by layer"),
    Column(
        "groups",
        lambda q: q.settings.group_size if q.settings.use_group_quantization else None,
        data="group_size",
        none="rows",
    ),
    Column("schedule", "settings.quantization_schedule", data="schedule"),
    Column("", "settings.gradient_scaling_factor", data="gradient_scaling_factor"),
]


def _accuracy_table(impacts: Sequence[QuantizationImpact]) -> Table:
    compared = [q.against_unquantized for q in impacts]
    twins = ", ".join(sorted({c.reference for c in compared if c.interval is not None}))
    float_bytes = mean_of("", "float_backbone_bytes", lambda run: 4 * run.parameters.backbone_total, megabytes)

    def quantized_bytes(run: Run) -> float | None:
        return None if run.record.quantization is None else run.record.quantization.quantized_bytes

    def errors(q: QuantizationImpact) -> dict[str, Any]:
        worst = max(q.relative_errors, key=lambda name: (q.relative_errors[name], name), default="")
        return {
            "mean_relative_error": float(np.mean(list(q.relative_errors.values()) or [np.nan])),
            "worst_module": worst,
            "worst_relative_error": q.relative_errors.get(worst, np.nan),
        }

    return table(
        "quantization",
        "Accuracy and error by format",
        impacts,
        [
            EXPERIMENT,
            *_SETTINGS,
            Column(
                "test accuracy",
                lambda q: mean_interval([run.test.accuracy for run in q.runs]),
                percent_interval,
                partial(interval_columns, "test_accuracy"),
            ),
            Column(
                "against float (points)",
                "against_unquantized",
                lambda c: points_interval(c.interval),
                lambda c: {
                    "difference_to_float": None if c.interval is None else c.interval.estimate,
                    "float_reference": c.reference,
                },
            ),
            Column("relative error", errors, lambda of: f"{fixed(100 * of['mean_relative_error'])} %", dict),
            Column("", lambda q: layers_bits(q.runs), data="bits_per_weight"),
            mean_of("", "quantized_bytes", quantized_bytes),
            mean_of("frozen", "frozen_bytes", lambda run: run.bytes.frozen_bytes, megabytes),
            float_bytes,
        ],
        "Against float: the same LoRA rank, scale and targets on float weights, paired by seed"
        f"{f' ({twins})' if twins else ''}. Relative error: ‖W − Wq‖ / ‖W‖, mean over layers. "
        "Frozen: everything that is frozen, quantized or not; the float backbone takes "
        f"{float_bytes.text(impacts[0])}. {OVER_SEEDS}",
    )


_MEASURES = {
    "accuracy": "accuracy (points)",
    "nll": "NLL (nats)",
    "late_deviation": "late deviation (nats)",
    "roughness": "roughness (nats)",
}


def _against_float_table(impacts: Sequence[QuantizationImpact]) -> Table:
    def text(measure: str, q: QuantizationImpact) -> str:
        comparison = q.against_float[measure]
        if comparison.interval is None:
            return "not computed"
        difference = points_interval if measure == "accuracy" else to_thousandths
        words = {"supported": f"more, {describe_test(comparison)}", "refuted": f"less, {describe_test(comparison)}"}
        return f"{difference(comparison.interval)}, {words.get(comparison.verdict, 'not decided')}"

    settings = [EXPERIMENT, Column("bits", "settings.quantization_bits", data="bits", none="by layer"), *_SETTINGS]
    return table(
        "quantization_against_float",
        "Low bits minus the same LoRA on float weights, paired by seed",
        impacts,
        [
            *settings,
            Column("n", lambda q: len(q.against_unquantized.by_seed)),
            *(Column(title, partial(text, measure)) for measure, title in _MEASURES.items()),
            Column("float twin", "against_unquantized", lambda c: c.reference if c.by_seed else c.note),
        ],
        "Accuracy: negative is a loss. NLL on test, late deviation and roughness: positive is worse, less steady, "
        "rougher. Late deviation: standard deviation of the training loss about its own line over the last third "
        "of the steps; roughness: spread of a step's loss about its neighbours' mean. Both hold the noise of "
        f"minibatches, which pairs share. Each measure is one family of tests. {FAMILY_NOTE}",
        data=(
            {
                **setting,
                "measure": measure,
                "float_reference": compared.reference,
                **interval_columns("difference", compared.interval),
                **comparison_values(compared),
            }
            for q, setting in zip(impacts, csv_rows(impacts, settings), strict=True)
            for measure, compared in q.against_float.items()
        ),
    )


def _size_table(impacts: Sequence[QuantizationImpact]) -> Table:
    def times(ratio: float) -> str:
        return f"{fixed(ratio, 1)} ×"

    def bits_and_ratios(of: str, path: str | Callable[[Any], float]) -> list[Column]:
        column = Column(f"{of}: bits a weight", path, fixed, f"{of}_bits_per_weight")

        def over(full: int, q: QuantizationImpact) -> float | None:
            bits = column.value(q)
            return None if bits is None else full / bits

        return [
            column,
            Column(f"fp32 / {of}", partial(over, FLOAT32_BITS), times, f"{of}_vs_fp32"),
            Column(f"fp16 / {of}", partial(over, FLOAT16_BITS), times, f"{of}_vs_fp16"),
        ]

    return table(
        "size",
        "How much smaller: claimed and measured",
        impacts,
        [
            EXPERIMENT,
            Column("claimed", "claimed", times, "claimed_vs_fp32"),
            *bits_and_ratios("layers", lambda q: layers_bits(q.runs)),
            *bits_and_ratios("model", "model.bits_per_weight"),
            Column("live", "model.live", megabytes, "live_bytes"),
            Column("file", "model.file", megabytes, "file_bytes"),
            mean_of("memory of a run", "own_memory_bytes", lambda run: run.record.own_memory_bytes, megabytes),
        ],
        "Claimed: 32 over the bits of a code, 8 × for 4 bits and 4 × for 8, as is commonly said. Layers: codes, "
        "scales and offsets of the quantized layers. Model: with all that is left in float, once adapters are "
        "merged; against 4 bytes (fp32) and 2 bytes (fp16) for each value of the float model. Live: distinct "
        "storages of the low-bit model; file: the same as safetensors. Memory of a run: what training "
        "added to its process's memory at most, model and activations included. Means over seeds. – : not in these "
        "(older) records.",
    )


def _layers_table(impacts: Sequence[QuantizationImpact]) -> Table:
    layers = [(q, name, bits) for q in impacts for name, bits in q.bits_by_layer.items()]
    by_kind = grouped(((q.experiment.name, name.rpartition(".")[2]), bits) for q, name, bits in layers)
    ends = {key: dict.fromkeys((fixed(min(bits)), fixed(max(bits)))) for key, bits in by_kind.items()}
    kinds = dict.fromkeys(kind for _, kind in by_kind)
    return table(
        "bits_by_layer",
        "Bits a weight by layer",
        [
            {"experiment": name} | {kind: " to ".join(ends.get((name, kind), "–")) for kind in kinds}
            for name in (q.experiment.name for q in impacts if kinds)
        ],
        None,
        "Scales and offsets included; from the smallest to the largest over the blocks. The CSV has every layer.",
        data=(
            {
                "experiment": q.experiment.name,
                "layer": name,
                "bits_per_weight": bits,
                "relative_error": q.relative_errors.get(name),
            }
            for q, name, bits in layers
        ),
        folded=True,
    )


def _balance_table(impacts: Sequence[QuantizationImpact]) -> Table:
    """Return the measures of the balance at the first, the middle and the last check; the CSV file has every one."""

    def text(check: dict[str, Any]) -> str:
        return f"{check['mean']:.4g} (step {check['step']})"

    balances = [(q.experiment.name, measure, checks) for q in impacts for measure, checks in q.balance().items()]
    return table(
        "quantization_balance",
        "Balance of quantization and adaptation",
        [
            {
                "experiment": experiment,
                "measure": measure,
                "first check": text(checks[0]),
                "in between": text(checks[len(checks) // 2]) if len(checks) > 2 else "–",
                "last check": text(checks[-1]) if len(checks) > 1 else "–",
            }
            for experiment, measure, checks in balances
        ],
        None,
        "As recorded by the balance check, mean over the seeds that measured it then. The CSV has every check.",
        data=(
            {"experiment": experiment, "measure": measure, **check}
            for experiment, measure, checks in balances
            for check in checks
        ),
        folded=True,
    )
