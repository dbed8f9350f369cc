"""The head that a run starts from: fitted to the frozen backbone's features, where method or `head_start` say so."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from peft_vit.backbones import Backbone, Head
from peft_vit.data import Data, LabelledImages
from peft_vit.evaluation import LogitsAndLabels, trainable_parameters
from peft_vit.records import RunSpec
from peft_vit.runs.features import SharedFeatures
from peft_vit.runs.resume import Attempt
from peft_vit.training import (
    Hook,
    LinearProbe,
    RuntimeConfig,
    TrainingResult,
    fit_probe,
    head_logits,
    held_out_temperature,
    loss_weights,
)


@dataclass(frozen=True)
class HeadStart:
    """What became of the head before the first step.

    Attributes:
        head: of the model.
        features: of the model as it is before training.
        runtime: where the model runs.
        probe: None if none was asked for, or if a checkpoint holds what became of it.
        softening: see `LinearProbe`.
    """

    head: Head
    features: SharedFeatures
    runtime: RuntimeConfig
    probe: LinearProbe | None
    softening: float = 1.0

    def predict(self, images: LabelledImages) -> LogitsAndLabels:
        """Return logits (N, classes) and labels (N,) of a model of which nothing but the head was fitted."""
        return head_logits(self.head, self.features.of(images).values, self.runtime), images.labels

    def result(self, model: nn.Module) -> TrainingResult:
        """Return what a run says that ends here."""
        assert self.probe is not None
        fitted = trainable_parameters(model)
        return TrainingResult(
            steps=list(self.probe.steps),
            evaluations=list(self.probe.evaluations),
            chosen=self.probe.chosen,
            chosen_step=self.probe.chosen_step,
            initial_parameters=fitted,
            peak_parameters=fitted,
        )


def start_head(
    model: nn.Module, spec: RunSpec, attempt: Attempt, data: Data, hooks: list[Hook], runtime: RuntimeConfig
) -> HeadStart:
    """Fit the head, and put it in its place, if the run asks for it and no earlier attempt has begun to train.

    The model is prepared, with updates as they start. The attempt takes note of the fit and of its seconds.
    """
    training = spec.experiment.training
    head = Backbone(model).head
    assert attempt.known.provenance is not None
    features = SharedFeatures(model, spec, attempt.known.provenance, hooks, runtime)
    if attempt.goes_on or not (spec.experiment.is_probe or training.head_start == "probe"):
        return HeadStart(head, features, runtime, None)
    with attempt.overhead.of("features"):
        of_training = features.of_training(data.train)
        of_validation = features.of(data.validation) if len(data.validation) else None

    def temperature() -> float:
        if of_validation is not None:
            return probe.temperature(of_validation)
        return held_out_temperature(
            of_training, len(data.train), probe.fit.chosen_l2, class_weights=class_weights, seed=spec.seed
        )

    with attempt.overhead.of("probe"):
        weights = loss_weights(training, data, torch.device("cpu"))
        class_weights = None if weights is None else weights.double().numpy()
        probe = fit_probe(
            of_training, of_validation, head, runtime, class_weights=class_weights, l2=spec.experiment.probe_l2
        )
        softening = 1.0
        if spec.experiment.is_probe:
            probe.set_head(head)
        else:
            calibrated = temperature()
            probe.set_head(head, calibrated)
            softening = probe.softening(of_training, calibrated)
    attempt.known.head_fit = probe.fit
    return HeadStart(head, features, runtime, probe, softening)
