"""What fewer bits cost in accuracy, and what they save in bytes: claimed of the format, and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np

from peft_vit.base.statistics.descriptive import grouped
from peft_vit.base.statistics.estimates import Estimate, decide
from peft_vit.core.config import AdaLoraConfig, ExperimentConfig, LoraConfig, QaLoraConfig
from peft_vit.core.records import QuantizationSummary
from peft_vit.lab.analysis.comparison import Value, accuracy_on_test, compare
from peft_vit.lab.analysis.convergence import late_loss_deviation, roughness
from peft_vit.lab.analysis.studies import Run, Study

FLOAT32_BITS, FLOAT16_BITS = 32, 16

# What is compared with the twin on float weights, paired by seed; each is a family over all experiments. Negative
# log likelihood on test and both measures of the training loss are in nats: positive is worse, less steady, rougher.
_COMPARED: dict[str, Value] = {
    "accuracy": accuracy_on_test,
    "nll": lambda run: run.test.nll,
    "late_deviation": late_loss_deviation,
    "roughness": roughness,
}


@dataclass(frozen=True)
class ModelBytes:
    """What a low-bit model takes once adapters are merged, mean over seeds."""

    total: float  # codes, scales and offsets, those that merging adds among them, and all that is left in float
    weights: float  # values of the float model, head included
    live: float  # distinct storages
    file: float  # the same as a safetensors file

    @property
    def bits_per_weight(self) -> float:
        """Return the bits that one value of the float model takes, everything counted."""
        return 8 * self.total / self.weights


@dataclass(frozen=True)
class QuantizationImpact:
    """One experiment on quantized weights, and its twin: the one that differs only in that its weights are float."""

    experiment: ExperimentConfig
    settings: QaLoraConfig  # its quantization section
    runs: tuple[Run, ...]  # that recorded what quantization did
    twin: tuple[Run, ...]  # empty without one
    against_float: dict[str, Estimate]  # by measure: difference to the twin

    @property
    def against_unquantized(self) -> Estimate:
        """Return the difference in test accuracy."""
        return self.against_float["accuracy"]

    @cached_property
    def model(self) -> ModelBytes | None:
        """Return the bytes of the whole model; None in older records."""
        return model_bytes(self.runs)

    @cached_property
    def relative_errors(self) -> dict[str, float]:
        """Return ``||W - Wq|| / ||W||`` by module, mean over runs, of those that all of them quantized."""
        return dict(sorted(_means([summary.relative_error for summary in _summaries(self.runs)]).items()))

    @property
    def bits_by_layer(self) -> dict[str, float]:
        """Return module -> stored bits a weight in the end, mean over seeds."""
        return _means([run.record.bits_history[-1].bits_per_weight for run in self.runs if run.record.bits_history])

    @property
    def claimed(self) -> float | None:
        """Return float32 over the bits of a code, as if that were all; None if neither settings nor records tell."""
        if self.settings.quantization_bits is not None:
            return FLOAT32_BITS / self.settings.quantization_bits
        sizes = [summary.size for summary in _summaries(self.runs) if summary.size is not None]
        layers = [layer for size in sizes for layer in size.layers.values()]
        if not layers:
            return None
        return FLOAT32_BITS * sum(layer.weights for layer in layers) / (8 * sum(layer.codes_bytes for layer in layers))

    def balance(self) -> dict[str, list[dict[str, Any]]]:
        """Return by measure of the balance check its value at every step: mean over the seeds that measured it then."""
        rows = [row for summary in _summaries(self.runs) for row in summary.balance]
        measured = grouped(((int(row["step"]), name), row[name]) for row in rows for name in row.keys() - {"step"})
        return grouped(
            (name, {"step": step, "mean": fmean(values), "n": len(values)})
            for (step, name), values in sorted(measured.items())
        )


def quantization_impacts(study: Study) -> tuple[QuantizationImpact, ...]:
    """Return one row for each QA-LoRA experiment whose runs recorded what quantization did."""
    undecided = [
        QuantizationImpact(experiment, experiment.need(QaLoraConfig), runs, _float_twin(study, experiment), {})
        for experiment in study.with_method("qa_lora", "qa_adalora")
        if (runs := tuple(run for run in study.runs_of(experiment.name) if run.record.quantization is not None))
    ]
    families = {
        measure: decide([_compare(impact, value) for impact in undecided], study.untested)
        for measure, value in _COMPARED.items()
    }
    return tuple(
        replace(impact, against_float={measure: family[i] for measure, family in families.items()})
        for i, impact in enumerate(undecided)
    )


def _float_twin(study: Study, experiment: ExperimentConfig) -> tuple[Run, ...]:
    adaptive, settings = experiment.section(AdaLoraConfig), experiment.need(QaLoraConfig)
    if adaptive is None and settings.adaptive_bits is not None and settings.adaptive_bits.ranks:
        return ()
    for other in study.fixed_rank_loras() if adaptive is None else study.with_method("adalora"):
        if other.training != experiment.training:
            continue
        lora = other.section(LoraConfig)
        fixed = lora and (lora.rank, lora.scale, set(lora.targets))
        equal = (settings.fixed_rank, settings.scale, set(settings.targets))
        if fixed == equal if adaptive is None else other.section(AdaLoraConfig) == adaptive:
            return study.runs_of(other.name)
    return ()


def _compare(impact: QuantizationImpact, value: Value) -> Estimate:
    experiment, twin = impact.experiment, impact.twin
    if twin:
        return compare(impact.runs, twin, experiment.name, twin[0].experiment.name, value)
    ranks = f"LoRA of rank {impact.settings.fixed_rank} with the same scale, targets"
    if experiment.section(AdaLoraConfig) is not None:
        ranks = "AdaLoRA with the same adalora section"
    note = f"the study has no float {ranks} and training"
    return Estimate(name=experiment.name, reference="unquantized LoRA of equal rank", note=note)


def layers_bits(runs: Sequence[Run]) -> float:
    """Return stored bits a weight over the quantized layers, scales and offsets included."""
    return fmean(summary.bits_per_weight for summary in _summaries(runs))


def model_bytes(runs: Sequence[Run]) -> ModelBytes | None:
    """Return what models of quantized runs of one experiment take; None in older records."""
    sizes = [summary.size for summary in _summaries(runs) if summary.size is not None]
    if not sizes:
        return None
    totals = [
        size.merging_bytes
        + sum(layer.codes_bytes + layer.scales_bytes + layer.offsets_bytes for layer in size.layers.values())
        + sum(size.float_bytes.values())
        for size in sizes
    ]
    return ModelBytes(
        total=fmean(totals),
        weights=fmean(size.weights for size in sizes),
        live=fmean(size.live_bytes for size in sizes),
        file=fmean(size.file_bytes for size in sizes),
    )


def _summaries(runs: Sequence[Run]) -> list[QuantizationSummary]:
    return [run.record.quantization for run in runs if run.record.quantization is not None]


def _means(by_run: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each value that all runs have, in the order of the first."""
    values = grouped((name, value) for of_run in by_run for name, value in of_run.items())
    return {name: float(np.mean(of_name)) for name, of_name in values.items() if len(of_name) == len(by_run)}
