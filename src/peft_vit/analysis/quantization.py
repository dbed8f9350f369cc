"""What fewer bits cost in accuracy, and what they save in bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from peft_vit.analysis.comparability import hardware
from peft_vit.analysis.comparison import Estimate, accuracy_on_test, compare, decide, known_mean
from peft_vit.analysis.convergence import late_loss_deviation, roughness
from peft_vit.analysis.size import MeasuredSize, bits_by_layer, measured_size
from peft_vit.analysis.studies import Run, Study
from peft_vit.config import AdaLoraConfig, ExperimentConfig, LoraConfig, QaLoraConfig
from peft_vit.statistics import Interval, mean_interval

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class BalanceStep:
    """One measure of the balance of quantization and adaptation at one step, mean over the seeds that measured it."""

    step: int
    name: str
    mean: float
    n: int


# What is compared with the twin on float weights, paired by seed; each is a family over all experiments. Negative
# log likelihood on test and both measures of the training loss are in nats: positive is worse, less steady, rougher.
_COMPARED: dict[str, Callable[[Run], float | None]] = {
    "accuracy": accuracy_on_test,
    "nll": lambda run: run.test.nll,
    "late_deviation": late_loss_deviation,
    "roughness": roughness,
}


@dataclass(frozen=True)
class QuantizationImpact:
    """One QA-LoRA experiment."""

    experiment: ExperimentConfig
    settings: QaLoraConfig  # its quantization section
    test_accuracy: Interval  # interval over seeds

    mean_relative_error: float  # mean over modules (and seeds) of ||W - Wq|| / ||W||
    worst_module: tuple[str, float]  # the module with the largest error, and that error
    quantized_bytes: float  # bytes of the quantized layers
    size: MeasuredSize  # what is claimed of the format and what was counted, layers and whole model
    bits_by_layer: dict[str, float]  # stored bits a weight in the end, by module
    error_by_layer: dict[str, float]  # relative error by module, mean over runs, of those that all runs quantized
    frozen_bytes: float  # bytes of everything that is frozen
    float_backbone_bytes: float  # bytes of the whole backbone in float32, head excluded
    balance: tuple[BalanceStep, ...]  # measures of the balance check, at every step at which they were recorded
    against_float: dict[str, Estimate]  # by measure: difference to the LoRA of equal rank, scale and targets on float
    costs: dict[str, float | None]  # what its runs took, see `_costs`
    float_costs: dict[str, float | None]  # what the runs of that LoRA took
    same_machine: bool  # whether both ran on one machine with as many threads, so that seconds and memory compare

    @property
    def against_unquantized(self) -> Estimate:
        """Return the difference in test accuracy to that LoRA."""
        return self.against_float["accuracy"]


def quantization_impacts(study: Study) -> tuple[QuantizationImpact, ...]:
    """Return one row for each QA-LoRA experiment whose runs recorded what quantization did."""
    found = []
    for experiment in study.with_method("qa_lora", "qa_adalora"):
        runs = [run for run in study.of(experiment.name) if run.record.quantization is not None]
        if runs:
            found.append((experiment, experiment.need(QaLoraConfig), runs))
    twins = [_float_twin(study, experiment, settings) for experiment, settings, _ in found]

    families = {
        measure: decide([_compare(*q, twin, value) for q, twin in zip(found, twins, strict=True)], study.untested)
        for measure, value in _COMPARED.items()
    }
    return tuple(
        _impact(*q, twin, {measure: family[i] for measure, family in families.items()})
        for i, (q, twin) in enumerate(zip(found, twins, strict=True))
    )


def _float_twin(study: Study, experiment: ExperimentConfig, settings: QaLoraConfig) -> tuple[Run, ...]:
    """Return the runs of the study's experiment that differs only in that its weights are float; () without one."""
    adaptive = experiment.section(AdaLoraConfig) is not None
    for other in study.with_method("adalora") if adaptive else study.fixed_rank_loras():
        if _equal_but_float(experiment, settings, other):
            return study.of(other.name)
    return ()


def _compare(
    experiment: ExperimentConfig,
    settings: QaLoraConfig,
    runs: Sequence[Run],
    twin: Sequence[Run],
    value: Callable[[Run], float | None],
) -> Estimate:
    if twin:
        return compare(runs, twin, experiment.name, twin[0].experiment.name, value)
    ranks = f"LoRA of rank {settings.fixed_rank} with the same scale, targets"
    if experiment.section(AdaLoraConfig) is not None:
        ranks = "AdaLoRA with the same adalora section"
    note = f"the study has no float {ranks} and training"
    return Estimate(name=experiment.name, reference="unquantized LoRA of equal rank", note=note)


def _equal_but_float(experiment: ExperimentConfig, settings: QaLoraConfig, other: ExperimentConfig) -> bool:
    if other.training != experiment.training:
        return False
    if experiment.section(AdaLoraConfig) is not None:
        return other.section(AdaLoraConfig) == experiment.section(AdaLoraConfig)
    if settings.adaptive_bits is not None and settings.adaptive_bits.ranks:
        return False
    section = other.section(LoraConfig)
    return section is not None and (section.rank, section.scale, set(section.targets)) == (
        settings.fixed_rank,
        settings.scale,
        set(settings.targets),
    )


def _impact(
    experiment: ExperimentConfig,
    settings: QaLoraConfig,
    runs: Sequence[Run],
    twin: Sequence[Run],
    against_float: dict[str, Estimate],
) -> QuantizationImpact:
    summaries = [run.record.quantization for run in runs if run.record.quantization is not None]
    quantized = sorted(set.intersection(*(set(summary.relative_error) for summary in summaries)))  # in all runs
    errors = {name: float(np.mean([summary.relative_error[name] for summary in summaries])) for name in quantized}
    worst = max(errors, key=lambda name: (errors[name], name)) if errors else ""
    return QuantizationImpact(
        experiment=experiment,
        settings=settings,
        test_accuracy=mean_interval([run.test.accuracy for run in runs]),
        mean_relative_error=float(np.mean(list(errors.values()))) if errors else float("nan"),
        worst_module=(worst, errors.get(worst, float("nan"))),
        quantized_bytes=fmean(summary.quantized_bytes for summary in summaries),
        size=measured_size(settings, runs),
        bits_by_layer=bits_by_layer(runs),
        error_by_layer=errors,
        frozen_bytes=fmean(run.bytes.frozen_bytes for run in runs),
        float_backbone_bytes=fmean(_FLOAT32_BYTES * run.parameters.backbone_total for run in runs),
        balance=_balance([summary.balance for summary in summaries]),
        against_float=against_float,
        costs=_costs(runs),
        float_costs=_costs(twin),
        same_machine=len({hardware(run) for run in (*runs, *twin)}) == 1,
    )


def _costs(runs: Sequence[Run]) -> dict[str, float | None]:
    """Return what runs took by name, means over seeds: None where no run recorded it.

    `stored_bytes` is everything frozen and the adapter file, `seconds_per_step` is of training, and
    `latency_s_batch_<n>` of a forward pass, for the batch sizes that all runs measured.
    """
    sizes = set.intersection(*(set(run.record.latency_s) for run in runs)) if runs else set()
    return {
        "stored_bytes": known_mean(run.bytes.frozen_bytes + run.bytes.adapter_file_bytes for run in runs),
        "own_memory_bytes": known_mean(run.record.own_memory_bytes for run in runs),
        "seconds_per_step": known_mean(run.record.seconds_per_step for run in runs),
        **{f"latency_s_batch_{n}": fmean(run.record.latency_s[n] for run in runs) for n in sorted(sizes)},
    }


def _balance(rows_by_run: Sequence[list[dict[str, float]]]) -> tuple[BalanceStep, ...]:
    found: dict[tuple[int, str], list[float]] = {}
    for rows in rows_by_run:
        for row in rows:
            for name in row.keys() - {"step"}:
                found.setdefault((int(row["step"]), name), []).append(row[name])
    return tuple(BalanceStep(step, name, fmean(values), len(values)) for (step, name), values in sorted(found.items()))
