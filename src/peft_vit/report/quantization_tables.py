"""Tables of what fewer bits cost: accuracy, loss, steadiness, bytes, memory, latency, and the balance over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from peft_vit.analysis import Comparison, QuantizationImpact
from peft_vit.analysis.comparison import outcome
from peft_vit.analysis.quantization import BalanceStep, Costs
from peft_vit.report.document import Cell, Raw, Row, Table
from peft_vit.report.formatting import fixed, megabytes, number_interval, percent_interval, points_interval
from peft_vit.report.tables import FAMILY_NOTE, OVER_SEEDS, comparison_values, ends, number_cell, text_cell


def quantization_table(impacts: Sequence[QuantizationImpact]) -> Table:
    """Return accuracy and error by format."""
    return Table.of(
        "quantization",
        "Accuracy and error by format",
        (
            {
                "experiment": text_cell("experiment", q.experiment.name),
                **_settings(q),
                "test accuracy": Cell(percent_interval(q.test_accuracy), ends("test_accuracy", q.test_accuracy)),
                "against float (points)": Cell(
                    points_interval(q.against_unquantized.difference),
                    {
                        "difference_to_float": None
                        if q.against_unquantized.difference is None
                        else q.against_unquantized.difference.estimate,
                        "float_reference": q.against_unquantized.reference,
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
                        "bits_per_weight": q.bits_per_weight,
                        "quantized_bytes": q.quantized_bytes,
                        "frozen_bytes": q.frozen_bytes,
                        "float_backbone_bytes": q.float_backbone_bytes,
                    },
                ),
            }
            for q in impacts
        ),
        _quantization_note(impacts),
    )


def _quantization_note(impacts: Sequence[QuantizationImpact]) -> str:
    return (
        "Against float: the same LoRA rank, scale and targets on float weights, paired by seed"
        f"{_float_reference(impacts)}. Relative error: ‖W − Wq‖ / ‖W‖, mean over layers. "
        "Frozen: everything that is frozen, quantized or not; the float backbone takes "
        f"{megabytes(impacts[0].float_backbone_bytes)}. {OVER_SEEDS}"
    )


def _float_reference(impacts: Sequence[QuantizationImpact]) -> str:
    found = sorted({q.against_unquantized.reference for q in impacts if q.against_unquantized.difference is not None})
    return f" ({', '.join(found)})" if found else ""


class _Measure(NamedTuple):
    name: str
    title: str
    of: Callable[[QuantizationImpact], Comparison]


_AGAINST_FLOAT = (
    _Measure("accuracy", "accuracy (points)", lambda q: q.against_unquantized),
    _Measure("nll", "NLL (nats)", lambda q: q.against_float.nll),
    _Measure("late_deviation", "late deviation (nats)", lambda q: q.against_float.late_deviation),
    _Measure("roughness", "roughness (nats)", lambda q: q.against_float.roughness),
)


def against_float_table(impacts: Sequence[QuantizationImpact]) -> Table:
    """Return every paired difference to the float twin, beside bits, format, groups and schedule."""
    return Table.of(
        "quantization_against_float",
        "Low bits minus the same LoRA on float weights, paired by seed",
        (
            {
                "experiment": q.experiment.name,
                "bits": str(q.settings.quantization_bits or "by layer"),
                **_settings(q),
                "n": str(len(q.against_unquantized.by_seed)),
                **{measure.title: _difference(measure, q) for measure in _AGAINST_FLOAT},
                "float twin": q.against_unquantized.reference
                if q.against_unquantized.by_seed
                else q.against_unquantized.note,
            }
            for q in impacts
        ),
        "Accuracy: negative is a loss. NLL on test, late deviation and roughness: positive is worse, less steady, "
        "rougher. Late deviation: standard deviation of the training loss about its own line over the last third "
        "of the steps; roughness: spread of a step's loss about its neighbours' mean. Both hold the noise of "
        f"minibatches, which pairs share. Each measure is one family of tests. {FAMILY_NOTE}",
        data=(_against_float_row(q, measure) for q in impacts for measure in _AGAINST_FLOAT),
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


def _difference(measure: _Measure, q: QuantizationImpact) -> str:
    comparison = measure.of(q)
    if comparison.difference is None:
        return "not computed"
    interval = comparison.difference
    text = points_interval(interval) if measure.name == "accuracy" else number_interval(interval, 3)
    return f"{text}, {_word(comparison)}"


def _word(comparison: Comparison) -> str:
    if comparison.verdict == "not decided":
        return "not decided"
    return f"{'more' if comparison.verdict == 'supported' else 'less'}, {outcome(comparison)}"


def _against_float_row(q: QuantizationImpact, measure: _Measure) -> dict[str, Raw]:
    comparison = measure.of(q)
    return {
        "experiment": q.experiment.name,
        "bits": q.settings.quantization_bits,
        **{name: found for cell in _settings(q).values() for name, found in cell.values.items()},
        "measure": measure.name,
        "float_reference": comparison.reference,
        **ends("difference", comparison.difference),
        **comparison_values(comparison),
    }


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


_NOTHING = Costs(0.0, None, None, {})


def _cost_row(q: QuantizationImpact) -> Row:
    own, twin = q.costs, q.float_costs or _NOTHING
    timed = twin if q.same_machine else _NOTHING
    reference = None if q.float_costs is None else q.against_unquantized.reference
    values: dict[str, Raw] = {"float_reference": reference, "same_machine": int(q.same_machine)}
    for prefix, costs in (("", q.costs), ("float_", q.float_costs)):
        values |= {f"{prefix}{name}": cost for name, cost in _cost_values(costs).items()}
    return {
        "experiment": text_cell("experiment", q.experiment.name),
        "bits a weight, layers": number_cell("bits_per_weight", q.bits_per_weight, fixed),
        "to store": _with_factor(megabytes, own.stored_bytes, twin.stored_bytes),
        "memory of a run": _with_factor(megabytes, own.own_memory_bytes, timed.own_memory_bytes),
        "a step": _with_factor(_seconds, own.seconds_per_step, timed.seconds_per_step),
        "latency, 1 image": _with_factor(_milliseconds, own.latency_s.get(1), timed.latency_s.get(1)),
        "float twin": Cell(reference or "none in this study", values),
    }


def _with_factor(write: Callable[[float], str], own: float | None, other: float | None) -> str:
    if own is None:
        return "–"
    return f"{write(own)} (× {fixed(own / other)})" if other else write(own)


def _seconds(value: float) -> str:
    return f"{fixed(value, 3)} s"


def _milliseconds(value: float) -> str:
    return f"{fixed(1000 * value, 1)} ms"


def _cost_values(costs: Costs | None) -> dict[str, Raw]:
    if costs is None:
        return {"stored_bytes": None, "own_memory_bytes": None, "seconds_per_step": None}
    return {
        "stored_bytes": costs.stored_bytes,
        "own_memory_bytes": costs.own_memory_bytes,
        "seconds_per_step": costs.seconds_per_step,
        **{f"latency_s_batch_{size}": seconds for size, seconds in costs.latency_s.items()},
    }


def balance_table(impacts: Sequence[QuantizationImpact]) -> Table:
    """Return the measures of the balance at the first, the middle and the last check; the CSV file has every one."""
    courses = [(q, name, course) for q in impacts for name, course in _courses(q).items()]
    return Table.of(
        "quantization_balance",
        "Balance of quantization and adaptation",
        (
            {
                "experiment": q.experiment.name,
                "measure": name,
                "first check": _check(course[0]),
                "in between": _check(course[len(course) // 2]) if len(course) > 2 else "–",
                "last check": _check(course[-1]) if len(course) > 1 else "–",
            }
            for q, name, course in courses
        ),
        "As recorded by the balance check, mean over the seeds that measured it then. The CSV has every check.",
        data=(
            {"experiment": q.experiment.name, "measure": name, "step": at.step, "mean": at.mean, "n": at.n}
            for q, name, course in courses
            for at in course
        ),
    )


def _courses(q: QuantizationImpact) -> dict[str, list[BalanceStep]]:
    courses: dict[str, list[BalanceStep]] = {}
    for at in q.balance:
        courses.setdefault(at.name, []).append(at)
    return courses


def _check(at: BalanceStep) -> str:
    return f"{at.mean:.4g} (step {at.step})"
