"""Tables of what fewer bits cost: accuracy, loss, steadiness, bytes, memory, latency, and the balance over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from peft_vit.analysis import Comparison, QuantizationImpact
from peft_vit.analysis.comparison import outcome
from peft_vit.analysis.quantization import BalanceStep, Costs
from peft_vit.report.document import Raw, Table
from peft_vit.report.numbers import fixed, megabytes, number_interval, percent_interval, points_interval
from peft_vit.report.tables import FAMILY_NOTE, OVER_SEEDS, ends


def quantization_table(impacts: Sequence[QuantizationImpact]) -> Table:
    """Return accuracy and error by format."""
    return Table(
        slug="quantization",
        title="Accuracy and error by format",
        columns=(
            "experiment",
            "format",
            "groups",
            "schedule",
            "test accuracy",
            "against float (points)",
            "relative error",
            "frozen",
        ),
        rows=tuple(
            (
                q.experiment.name,
                q.settings.quantization_type or "by layer",
                str(q.settings.group_size) if q.settings.use_group_quantization else "rows",
                q.settings.quantization_schedule,
                percent_interval(q.test_accuracy),
                points_interval(q.against_unquantized.difference),
                f"{fixed(100 * q.mean_relative_error, 2)} %",
                megabytes(q.frozen_bytes),
            )
            for q in impacts
        ),
        note=_quantization_note(impacts),
        data=tuple(
            {
                "experiment": q.experiment.name,
                "quantization_type": q.settings.quantization_type,
                "group_size": q.settings.group_size if q.settings.use_group_quantization else None,
                "schedule": q.settings.quantization_schedule,
                "gradient_scaling_factor": q.settings.gradient_scaling_factor,
                **ends("test_accuracy", q.test_accuracy),
                "difference_to_float": None
                if q.against_unquantized.difference is None
                else q.against_unquantized.difference.estimate,
                "float_reference": q.against_unquantized.reference,
                "mean_relative_error": q.mean_relative_error,
                "worst_module": q.worst_module[0],
                "worst_relative_error": q.worst_module[1],
                "bits_per_weight": q.bits_per_weight,
                "quantized_bytes": q.quantized_bytes,
                "frozen_bytes": q.frozen_bytes,
                "float_backbone_bytes": q.float_backbone_bytes,
            }
            for q in impacts
        ),
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
    return Table(
        slug="quantization_against_float",
        title="Low bits minus the same LoRA on float weights, paired by seed",
        columns=(
            "experiment",
            "bits",
            "format",
            "groups",
            "schedule",
            "n",
            *(measure.title for measure in _AGAINST_FLOAT),
            "float twin",
        ),
        rows=tuple(
            (
                q.experiment.name,
                *_settings(q),
                str(len(q.against_unquantized.by_seed)),
                *(_difference(measure, q) for measure in _AGAINST_FLOAT),
                q.against_unquantized.reference if q.against_unquantized.by_seed else q.against_unquantized.note,
            )
            for q in impacts
        ),
        note=(
            "Accuracy: negative is a loss. NLL on test, late deviation and roughness: positive is worse, less steady, "
            "rougher. Late deviation: standard deviation of the training loss about its own line over the last third "
            "of the steps; roughness: spread of a step's loss about its neighbours' mean. Both hold the noise of "
            f"minibatches, which pairs share. Each measure is one family of tests. {FAMILY_NOTE}"
        ),
        data=tuple(_against_float_row(q, measure) for q in impacts for measure in _AGAINST_FLOAT),
    )


def _settings(q: QuantizationImpact) -> tuple[str, str, str, str]:
    settings = q.settings
    return (
        "by layer" if settings.quantization_bits is None else str(settings.quantization_bits),
        settings.quantization_type or "by layer",
        str(settings.group_size) if settings.use_group_quantization else "rows",
        settings.quantization_schedule,
    )


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
    comparison, settings = measure.of(q), q.settings
    return {
        "experiment": q.experiment.name,
        "bits": settings.quantization_bits,
        "quantization_type": settings.quantization_type,
        "group_size": settings.group_size if settings.use_group_quantization else None,
        "schedule": settings.quantization_schedule,
        "gradient_scaling_factor": settings.gradient_scaling_factor,
        "measure": measure.name,
        "float_reference": comparison.reference,
        **ends("difference", comparison.difference),
        "p_value": None if comparison.significance is None else comparison.significance.p_value,
        "p_holm": comparison.adjusted_p,
        "needed_n": None if comparison.significance is None else comparison.significance.minimum_n,
        "verdict": comparison.verdict,
        "note": comparison.note,
    }


def quantization_cost_table(impacts: Sequence[QuantizationImpact]) -> Table:
    """Return bytes, memory, seconds and latency of low bits, with the factor to the float twin."""
    return Table(
        slug="quantization_cost",
        title="What low bits take, against the same LoRA on float weights",
        columns=(
            "experiment",
            "bits a weight, layers",
            "to store",
            "memory of a run",
            "a step",
            "latency, 1 image",
            "float twin",
        ),
        rows=tuple(
            (
                q.experiment.name,
                fixed(q.bits_per_weight),
                _with_factor(megabytes, q.costs.stored_bytes, q.float_costs.stored_bytes if q.float_costs else None),
                *(_with_factor(write, own, other) for write, own, other in _timed(q)),
                q.against_unquantized.reference if q.float_costs is not None else "none in this study",
            )
            for q in impacts
        ),
        note=(
            "Means over seeds; in brackets the factor on the float twin's, below 1 is less. To store: everything "
            "frozen, and the adapter file. Weights are unpacked when they are used, so fewer bits need not be faster. "
            "No factor of memory and seconds where the two ran on different machines or numbers of threads. Latency "
            "of other batch sizes: CSV. – : not recorded."
        ),
        data=tuple(_cost_row(q) for q in impacts),
    )


def _timed(q: QuantizationImpact) -> tuple[tuple[Callable[[float], str], float | None, float | None], ...]:
    own, other = q.costs, q.float_costs
    if other is None or not q.same_machine:
        other = Costs(0.0, None, None, {})
    return (
        (megabytes, own.own_memory_bytes, other.own_memory_bytes),
        (_seconds, own.seconds_per_step, other.seconds_per_step),
        (_milliseconds, own.latency_s.get(1), other.latency_s.get(1)),
    )


def _with_factor(write: Callable[[float], str], own: float | None, other: float | None) -> str:
    if own is None:
        return "–"
    return f"{write(own)} (× {fixed(own / other)})" if other else write(own)


def _seconds(value: float) -> str:
    return f"{fixed(value, 3)} s"


def _milliseconds(value: float) -> str:
    return f"{fixed(1000 * value, 1)} ms"


def _cost_row(q: QuantizationImpact) -> dict[str, Raw]:
    row: dict[str, Raw] = {
        "experiment": q.experiment.name,
        "bits_per_weight": q.bits_per_weight,
        "float_reference": None if q.float_costs is None else q.against_unquantized.reference,
        "same_machine": int(q.same_machine),
    }
    for prefix, costs in (("", q.costs), ("float_", q.float_costs)):
        row |= {f"{prefix}{name}": value for name, value in _cost_values(costs).items()}
    return row


def _cost_values(costs: Costs | None) -> dict[str, Raw]:
    if costs is None:
        return {"stored_bytes": None, "own_memory_bytes": None, "seconds_per_step": None}
    return {
        "stored_bytes": costs.stored_bytes,
        "own_memory_bytes": costs.own_memory_bytes,
        "seconds_per_step": costs.seconds_per_step,
        **{f"latency_s_batch_{size}": value for size, value in costs.latency_s.items()},
    }


def balance_table(impacts: Sequence[QuantizationImpact]) -> Table:
    """Return the measures of the balance at the first, the middle and the last check; the CSV file has every one."""
    courses = [(q, name, course) for q in impacts for name, course in _courses(q).items()]
    return Table(
        slug="quantization_balance",
        title="Balance of quantization and adaptation",
        columns=("experiment", "measure", "first check", "in between", "last check"),
        rows=tuple(
            (
                q.experiment.name,
                name,
                _check(course[0]),
                _check(course[len(course) // 2]) if len(course) > 2 else "–",
                _check(course[-1]) if len(course) > 1 else "–",
            )
            for q, name, course in courses
        ),
        note="As recorded by the balance check, mean over the seeds that measured it then. The CSV has every check.",
        data=tuple(
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
