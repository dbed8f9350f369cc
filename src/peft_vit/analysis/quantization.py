"""What fewer bits cost in accuracy, and what they save in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peft_vit.analysis.comparison import Comparison, compare, correct
from peft_vit.analysis.size import MeasuredSize, bits_by_layer, measured_size
from peft_vit.analysis.studies import Run, Study
from peft_vit.config import ExperimentConfig, QaLoraConfig
from peft_vit.records import QuantizationSummary
from peft_vit.statistics import Interval, mean_interval

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class BalanceMeasure:
    """One measure of the balance between quantization and adaptation, mean over seeds."""

    name: str
    first: float
    last: float


@dataclass(frozen=True)
class QuantizationImpact:
    """One QA-LoRA experiment.

    Attributes:
        experiment: what was asked.
        settings: its quantization section.
        test_accuracy: interval over seeds.
        against_unquantized: difference to the LoRA of equal rank, scale and targets on float weights.
        bits_per_weight: stored bits a weight over the quantized layers, scales and offsets included.
        mean_relative_error: mean over modules (and seeds) of ||W - Wq|| / ||W||.
        worst_module: the module with the largest error, and that error.
        quantized_bytes: bytes of the quantized layers.
        size: what is claimed of the format and what was counted, layers and whole model.
        bits_by_layer: stored bits a weight in the end, by module.
        error_by_layer: relative error by module.
        frozen_bytes: bytes of everything that is frozen.
        float_backbone_bytes: bytes of the whole backbone in float32, head excluded.
        balance: measures of the balance check.
    """

    experiment: ExperimentConfig
    settings: QaLoraConfig
    test_accuracy: Interval
    against_unquantized: Comparison
    bits_per_weight: float
    mean_relative_error: float
    worst_module: tuple[str, float]
    quantized_bytes: float
    size: MeasuredSize
    bits_by_layer: dict[str, float]
    error_by_layer: dict[str, float]
    frozen_bytes: float
    float_backbone_bytes: float
    balance: tuple[BalanceMeasure, ...]


def quantization_impacts(study: Study) -> tuple[QuantizationImpact, ...]:
    """Return one row for each QA-LoRA experiment whose runs recorded what quantization did."""
    found = []
    for experiment in study.with_method("qa_lora", "qa_adalora"):
        runs = [run for run in study.of(experiment.name) if run.record.quantization is not None]
        if runs and experiment.qa_lora is not None:
            found.append((experiment, experiment.qa_lora, runs))
    family = correct([_against_unquantized(study, e, settings, runs) for e, settings, runs in found])
    return tuple(
        _impact(experiment, settings, runs, against)
        for (experiment, settings, runs), against in zip(found, family, strict=True)
    )


def _against_unquantized(
    study: Study, experiment: ExperimentConfig, settings: QaLoraConfig, runs: Sequence[Run]
) -> Comparison:
    """Compare with the study's experiment that differs only in that its weights are float."""
    name = experiment.name
    for other in study.with_method("adalora") if experiment.adalora is not None else study.fixed_rank_loras():
        if _equal_but_float(experiment, settings, other):
            return compare(runs, study.of(other.name), name, other.name)
    ranks = f"LoRA of rank {settings.fixed_rank} with the same scale, targets"
    if experiment.adalora is not None:
        ranks = "AdaLoRA with the same adalora section"
    note = f"the study has no float {ranks} and training"
    return Comparison(name, "unquantized LoRA of equal rank", None, (), (), None, None, "not decided", note)


def _equal_but_float(experiment: ExperimentConfig, settings: QaLoraConfig, other: ExperimentConfig) -> bool:
    if other.training != experiment.training:
        return False
    if experiment.adalora is not None:
        return other.adalora == experiment.adalora
    if settings.adaptive_bits is not None and settings.adaptive_bits.ranks:
        return False
    section = other.lora
    return section is not None and (section.rank, section.scale, set(section.targets)) == (
        settings.fixed_rank, settings.scale, set(settings.targets),
    )  # fmt: skip


def _impact(
    experiment: ExperimentConfig, settings: QaLoraConfig, runs: Sequence[Run], against: Comparison
) -> QuantizationImpact:
    summaries = [run.record.quantization for run in runs if run.record.quantization is not None]
    errors = _mean_errors(summaries)
    bits = float(np.mean([summary.bits_per_weight for summary in summaries]))
    worst = max(errors, key=lambda name: (errors[name], name)) if errors else ""
    return QuantizationImpact(
        experiment=experiment,
        settings=settings,
        test_accuracy=mean_interval([run.test.accuracy for run in runs]),
        against_unquantized=against,
        bits_per_weight=bits,
        mean_relative_error=float(np.mean(list(errors.values()))) if errors else float("nan"),
        worst_module=(worst, errors.get(worst, float("nan"))),
        quantized_bytes=float(np.mean([summary.quantized_bytes for summary in summaries])),
        size=measured_size(settings, runs),
        bits_by_layer=bits_by_layer(runs),
        error_by_layer=errors,
        frozen_bytes=float(np.mean([run.bytes.frozen_bytes for run in runs])),
        float_backbone_bytes=float(np.mean([_FLOAT32_BYTES * run.parameters.backbone_total for run in runs])),
        balance=_balance([summary.balance for summary in summaries]),
    )


def _mean_errors(summaries: Sequence[QuantizationSummary]) -> dict[str, float]:
    """Return module -> relative error, mean over runs, for the modules that all runs quantized."""
    shared = sorted(set.intersection(*(set(summary.relative_error) for summary in summaries)))
    return {name: float(np.mean([summary.relative_error[name] for summary in summaries])) for name in shared}


def _balance(rows_by_run: Sequence[list[dict[str, float]]]) -> tuple[BalanceMeasure, ...]:
    filled = [rows for rows in rows_by_run if rows]
    if not filled:
        return ()
    names = sorted(set.intersection(*(set(rows[0]) & set(rows[-1]) for rows in filled)) - {"step"})
    return tuple(
        BalanceMeasure(
            name,
            float(np.mean([rows[0][name] for rows in filled])),
            float(np.mean([rows[-1][name] for rows in filled])),
        )
        for name in names
    )
