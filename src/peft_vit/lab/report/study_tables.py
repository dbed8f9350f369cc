"""Tables of a study's report: methods, how they differ, low bits, and findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from peft_vit.base.statistics import mean_interval
from peft_vit.base.statistics.descriptive import grouped
from peft_vit.base.statistics.estimates import describe_test, recorded_interval, recorded_mean
from peft_vit.core.tasks import Scores
from peft_vit.deploy.page.document import (
    Column,
    Raw,
    Table,
    csv_rows,
    interval_columns,
    only_in_file,
    own_interval_columns,
    table,
)
from peft_vit.deploy.page.formatting import (
    better_above,
    better_question,
    count,
    fixed,
    joined,
    megabytes,
    number_interval,
    percent_interval,
    plain,
    points,
    points_interval,
    score_interval,
    score_of,
)
from peft_vit.lab.analysis import Allocation, Estimate, Finding, MethodResult, QuantizationImpact, Run
from peft_vit.lab.analysis.comparison import SAME_SIZE
from peft_vit.lab.analysis.convergence import SETTLED_WITHIN_NATS, late_loss_deviation, roughness, settled_step
from peft_vit.lab.analysis.quantization import FLOAT16_BITS, FLOAT32_BITS, layers_bits

# --- what tables share ------------------------------------------------------------------------------------------------


OVER_SEEDS = (
    "95 % t intervals in brackets: what other seeds would change, on the same test images unless each seed has its own."
)

FAMILY_NOTE = (
    "The exact Wilcoxon signed-rank test at 5 % decides, with Holm's correction over the rows of "
    "this table; the 95 % t interval beside it describes what other seeds would change."
)

to_thousandths = partial(number_interval, decimals=3)

EXPERIMENT = Column("experiment", "experiment.name", data="experiment")


def mean_of(title: str, key: str, value: Callable[[Run], float | None], show: Callable[[Any], str] = str) -> Column:
    """Return the mean over the `runs` of a row of what each recorded."""
    return Column(title, lambda row: recorded_mean(map(value, row.runs)), show, key)


def interval_of(title: str, key: str, value: Callable[[Run], float | None], show: Callable[[Any], str]) -> Column:
    """Return that mean with its interval over seeds."""
    return Column(title, lambda row: recorded_interval(map(value, row.runs)), show, partial(own_interval_columns, key))


def comparison_values(comparison: Estimate) -> dict[str, Raw]:
    """Return what decided a comparison."""
    significance = comparison.significance
    return {
        "p_value": None if significance is None else significance.p_value,
        "p_holm": comparison.adjusted_p,
        "needed_n": None if significance is None else significance.minimum_n,
        "verdict": comparison.verdict,
        "note": comparison.note,
    }


# --- methods: what they reach and cost, and how they differ -----------------------------------------------------------


def accuracy_table(methods: Sequence[MethodResult]) -> Table:
    """Return test accuracy by experiment, or of other tasks what decides, each seed visible."""
    scores = methods[0].runs[0].scores
    may_pass = " and may pass 100 %" if scores.metric.is_share else ""
    words, of_classes = scores.metric.words, scores.metric.counts_images
    validated = all(m.validation_accuracy is not None for m in methods)
    chose = "Validation chose the epoch" if validated else "Without validation images the last step's model was used"
    return table(
        "accuracy",
        f"Test {words} by method",
        methods,
        [
            EXPERIMENT,
            *only_in_file(method="experiment.method"),
            Column(
                f"test {words}",
                "test_accuracy",
                partial(score_interval, scores),
                partial(interval_columns, "test_accuracy" if of_classes else "test_score"),
            ),
            Column("n", lambda m: len(m.runs)),
            Column(
                "each seed (%)" if scores.metric.is_share else "each seed",
                "by_seed",
                lambda by_seed: joined(
                    f"{seed}: {score_of(scores, score).removesuffix(' %')}" for seed, score in by_seed.items()
                ),
                lambda by_seed: {f"seed_{seed}": score for seed, score in by_seed.items()},
            ),
            Column("validation", "validation_accuracy.estimate", partial(score_of, scores), "validation_accuracy"),
            *([Column("above majority (points)", "above_majority.estimate", points, "above_majority")] * of_classes),
        ],
        f"n counts seeds. {OVER_SEEDS} With two seeds they are wide{may_pass}. {chose}; test was read once.",
    )


def cost_table(methods: Sequence[MethodResult]) -> Table:
    """Return what each experiment costs."""
    return table(
        "cost",
        "Cost by method",
        methods,
        [
            EXPERIMENT,
            Column("trainable at end", "final_parameters", count),
            mean_of("largest", "peak_parameters", lambda run: run.parameters.peak, count),
            mean_of(
                "adapter alone", "adapter_parameters", lambda run: run.parameters.final - run.parameters.head, count
            ),
            mean_of("frozen", "frozen_bytes", lambda run: run.bytes.frozen_bytes, megabytes),
            mean_of("adapter file", "adapter_file_bytes", lambda run: run.bytes.adapter_file_bytes, megabytes),
            mean_of("s a step", "seconds_per_step", lambda run: run.record.seconds_per_step, lambda s: fixed(s, 3)),
            mean_of("latency (ms)", "latency_s", lambda run: run.record.latency_s.get(1), lambda s: fixed(1000 * s, 1)),
            mean_of("memory of a run", "own_memory_bytes", lambda run: run.record.own_memory_bytes, megabytes),
            *only_in_file(n=lambda m: len(m.runs)),
        ],
        "Means over seeds. Trainable parameters include the head and are counted on the live model; "
        "'adapter alone' is the end without the head. Latency: a forward pass of one image. Memory of a run: what "
        "it added to its process's memory at most, the model included; – in older records. MB are 10⁶ bytes. "
        "Seconds and memory hold for the machine named under provenance.",
    )


def convergence_table(methods: Sequence[MethodResult]) -> Table:
    """Return how steadily each experiment's loss came down."""
    return table(
        "convergence",
        "How steadily the loss came down",
        methods,
        [
            EXPERIMENT,
            interval_of("late deviation (nats)", "late_deviation", late_loss_deviation, to_thousandths),
            interval_of("roughness (nats)", "roughness", roughness, to_thousandths),
            interval_of("near the end from step", "settled_step", settled_step, partial(number_interval, decimals=0)),
            Column("of steps", lambda m: max(len(run.record.steps) for run in m.runs), data="steps"),
            Column("n", lambda m: len(m.runs), data="n"),
        ],
        "Late deviation: standard deviation of the training loss about its own line over the last third of the "
        "steps. Roughness: spread of a step's loss about the mean of its neighbours. Both hold the noise of "
        "minibatches. Near the end: first evaluation from which on the validation loss stays within "
        f"{SETTLED_WITHIN_NATS} nats of its last value. – : not measurable in these records. {OVER_SEEDS}",
        folded=True,
    )


def comparison_table(comparisons: Sequence[Estimate], reference: str, scores: Scores) -> Table:
    """Return paired differences against one reference, in the unit of scores."""
    return differences_table(
        f"against_{reference}",
        f"Differences to {reference}, paired by seed",
        [c for c in comparisons if c.reference == reference],
        f"Differences in test {scores.metric.words} between runs that share seed, weights and images; n counts pairs. "
        f"{better_above(scores)}{FAMILY_NOTE}",
        scores,
    )


def differences_table(slug: str, title: str, comparisons: Sequence[Estimate], note: str, scores: Scores) -> Table:
    """Return one family of comparisons, in the unit of scores."""
    return table(
        slug,
        title,
        comparisons,
        [
            Column("experiment", "name", data="experiment"),
            Column("", "reference"),
            Column(
                f"difference ({scores.unit})",
                "interval",
                points_interval,
                partial(interval_columns, "difference"),
                none=points_interval(None),
            ),
            Column(
                "each seed",
                "by_seed",
                lambda by_seed: joined(map(points, by_seed.values())),
                lambda by_seed: {f"seed_{seed}": difference for seed, difference in by_seed.items()},
            ),
            Column("n", lambda c: len(c.by_seed)),
            Column(better_question(scores), "verdict", data=""),
            Column(
                "test", lambda c: c, lambda c: describe_test(c) + (f" ({c.note})" if c.note else ""), comparison_values
            ),
        ],
        note,
    )


def against_fixed_table(allocations: Sequence[Allocation]) -> Table:
    """Return whether adaptive ranks paid."""
    return differences_table(
        "allocation_against_fixed",
        "Adaptive against fixed ranks at equal trainable parameters",
        [a.against_fixed for a in allocations],
        "Test accuracy minus that of fixed-rank LoRA, read off the line through the same seed's LoRA "
        "runs at the same number of trainable parameters (linear in its logarithm, no extrapolation; "
        f"within {100 * SAME_SIZE:.0f} % is equal). {FAMILY_NOTE}",
        Scores(),
    )


# --- low bits: what they cost in accuracy and steadiness, what they take, and where they are --------------------------


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
        "(older) records, or bits that differ by layer.",
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
    balances = [(q.experiment.name, q.balance()) for q in impacts]
    return table(
        "quantization_balance",
        "Balance of quantization and adaptation",
        [
            {"experiment": name, "measure": measure, "last check": f"{checks[-1]['mean']:.4g}"}
            for name, measures in balances
            for measure, checks in measures.items()
        ],
        None,
        "At the end of training, mean over the seeds that measured it then. The CSV has every check.",
        data=(
            {"experiment": name, "measure": measure, **check}
            for name, measures in balances
            for measure, checks in measures.items()
            for check in checks
        ),
        folded=True,
    )


# --- findings ---------------------------------------------------------------------------------------------------------


HOW = (
    "Each sentence is worded so that a positive estimate supports it. 'Not decided' means that these runs cannot tell, "
    "not that there is no difference. Tests are at 5 %, with Holm's correction over all tests of one family. "
    f"{OVER_SEEDS} Pairs share seed, weights, images and split."
)


def findings_table(findings: Sequence[Finding]) -> Table:
    """Return every sentence with its numbers, by experiment or pair."""
    return table("findings", "Findings by experiment", findings, FINDING, HOW)


def numbers(finding: Finding) -> dict[str, str]:
    """Return what is beside a finding in a table: estimate, n and test, in words."""
    n_of = finding.n_of if len(finding.by_seed) != 1 else finding.n_of.replace("seeds", "seed").replace("pairs", "pair")
    test = finding.outcome if finding.test == "none" else f"{finding.test}: {finding.outcome}"
    note = f" ({finding.note})" if finding.note else ""
    return {"estimate": estimate_of(finding), "n": f"{len(finding.by_seed)} {n_of}", "test": plain(test + note)}


def estimate_of(finding: Finding) -> str:
    """Return the estimate with its interval and unit; shares as points."""
    interval, unit = finding.interval, finding.sentence.unit
    if interval is None:
        return "–"
    if unit == "share":
        return f"{points_interval(interval)} points"
    return f"{number_interval(interval)} {unit}"


FINDING = [
    *only_in_file(id="sentence.id"),
    Column("sentence", "sentence.text", plain, "sentence"),
    Column("experiment or pair", "subject"),
    Column("verdict", "verdict"),
    *only_in_file(
        estimate="interval.estimate",
        low="interval.low",
        high="interval.high",
        unit="sentence.unit",
        n=lambda finding: len(finding.by_seed),
        n_of="n_of",
        test="test",
        margin="sentence.margin",
        p_holm="adjusted_p",
        p_holm_opposite="opposite_p",
        outcome="outcome",
        note="note",
    ),
    Column("estimate", estimate_of),
    Column("n", lambda finding: numbers(finding)["n"]),
    Column("test", lambda finding: numbers(finding)["test"]),
]
