"""Did it pay to score? Adaptive ranks against the same budget spread without looking: equal scores, and random ones.

A control has the importance metric `uniform` or `random` and shares every other setting that costs something:
method, budget and its course, training, targets. The strategy should be equal too. Where no such control was run,
one of another strategy at equal cost is taken and named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal, get_args

from peft_vit.analysis.comparison import Estimate, Value, accuracy_on_test, compare, decide
from peft_vit.analysis.studies import Run, Study
from peft_vit.config import AdaLoraConfig, ExperimentConfig, QaLoraConfig

Control = Literal["uniform", "random"]
CONTROLS: tuple[Control, ...] = get_args(Control)
PARAMETERS = 1_000  # unit of accuracy per parameter

_OF_THE_SCORES = {
    "importance_metric",
    "importance_gradient",
    "sensitivity_beta",
    "uncertainty_beta",
    "allocation_strategy",
    "top_k",
    "threshold_tau",
}


@dataclass(frozen=True)
class AgainstControl:
    """One experiment with scored ranks against one control."""

    experiment: str
    control: Control  # which kind
    control_experiment: str | None  # the experiment that was found; None if the study has none
    same_strategy: bool  # whether both share the strategy
    accuracy: Estimate  # difference in test accuracy, paired by seed
    per_parameter: Estimate  # difference in `accuracy_per_parameter`, paired by seed
    # mean trainable parameters in the end over the control's, 1 at equal cost. An equal budget in ranks need not be
    # equal in parameters, since matrices differ in size
    parameters_ratio: float | None


def accuracy_per_parameter(run: Run) -> float:
    """Return test accuracy (share) per 1,000 trainable parameters in the end, head included.

    A quotient rewards small models whatever they lose, so it says something at about equal parameters only.
    """
    return PARAMETERS * run.test.accuracy / run.parameters.final


def against_controls(study: Study) -> tuple[AgainstControl, ...]:
    """Compare each experiment whose ranks follow scores with its controls; corrected over experiments, by control."""
    adaptive = study.with_method("adalora", "qa_adalora")
    scored = [e for e in adaptive if e.need(AdaLoraConfig).importance_metric not in CONTROLS]
    rows: list[AgainstControl] = []
    for kind in CONTROLS:
        controls = [
            _control_of(e, [c for c in adaptive if c.need(AdaLoraConfig).importance_metric == kind]) for e in scored
        ]
        pairs = list(zip(scored, controls, strict=True))
        by_accuracy, by_parameter = (
            decide([_compare(study, e, control, kind, value) for e, control in pairs], study.untested)
            for value in (accuracy_on_test, accuracy_per_parameter)
        )
        for (e, control), accuracy, per_parameter in zip(pairs, by_accuracy, by_parameter, strict=True):
            row = AgainstControl(e.name, kind, None, False, accuracy, per_parameter, None)
            if control is not None:
                own, other = (
                    fmean(r.parameters.final for r in study.of(experiment.name)) for experiment in (e, control)
                )
                same = _strategy(control) == _strategy(e)
                row = replace(row, control_experiment=control.name, same_strategy=same, parameters_ratio=own / other)
            rows.append(row)
    return tuple(rows)


def _control_of(experiment: ExperimentConfig, controls: Sequence[ExperimentConfig]) -> ExperimentConfig | None:
    at_equal_cost = [control for control in controls if _cost(control) == _cost(experiment)]
    at_equal_cost.sort(key=lambda control: _strategy(control) != _strategy(experiment))
    return next(iter(at_equal_cost), None)


def _cost(experiment: ExperimentConfig) -> tuple[object, ...]:
    """Return everything that a control must share."""
    settings = experiment.need(AdaLoraConfig).model_dump(exclude=_OF_THE_SCORES)
    return experiment.method, experiment.training, experiment.section(QaLoraConfig), settings


def _strategy(experiment: ExperimentConfig) -> tuple[object, ...]:
    section = experiment.need(AdaLoraConfig)
    return section.allocation_strategy, section.top_k, section.threshold_tau


def _compare(
    study: Study, experiment: ExperimentConfig, control: ExperimentConfig | None, kind: Control, value: Value
) -> Estimate:
    if control is None:
        note = f"the study has no finished experiment with importance_metric: {kind} and the same budget and training"
        return Estimate(name=experiment.name, reference=f"{kind} importance", note=note)
    return compare(study.of(experiment.name), study.of(control.name), experiment.name, control.name, value)
