"""The last training: what the folds have chosen, fixed."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peft_vit.backbones import describe
from peft_vit.config import BackboneConfig, ExperimentConfig
from peft_vit.tasks.classification import ACCURACY
from peft_vit.tuning.candidates import designs
from peft_vit.tuning.final import train_finally

SHAPE = describe(BackboneConfig(model="test_vit", weights="random"), 32)


def last_training(name: str, gains: list[float]) -> tuple[ExperimentConfig, list[str]]:
    """Return the experiment of the last training, of 100 images where the folds had 80, and what is told."""
    told: list[str] = []
    studies: list[dict[str, Any]] = []

    def study(_name: str, _model: str, _size: int, seeds: list[int], experiments: list[Any]) -> dict[str, Any]:
        studies.append({"data": {"folds": 5}, "seeds": seeds, "experiments": experiments})
        return studies[-1]

    def run(asked: dict[str, Any], _limit: Any) -> dict[Any, Any]:
        assert asked["data"] == {"validation_images": 0}
        return {(one["name"], 0): SimpleNamespace(folder=Path("run")) for one in asked["experiments"]}

    context: Any = SimpleNamespace(
        images=100,
        train_images=80,
        batch_size=8,
        metric=ACCURACY,
        flips="none",
        request=SimpleNamespace(seed=0),
        state=SimpleNamespace(tell=told.append, unlimited=None, studies=Path("studies")),
        study=study,
        runner=run,
    )
    backbone: Any = SimpleNamespace(model="test_vit", image_size=32, schedule=SimpleNamespace(steps=20))
    folds: Any = [SimpleNamespace(gain=gain, l2=0.01) for gain in gains]
    train_finally(context, backbone, lambda steps: designs(SHAPE, steps, 3), [name], {name: 1e-3}, {name: folds}, {})
    (experiment,) = studies[0]["experiments"]
    return ExperimentConfig.model_validate_json(json.dumps(experiment)), told


def test_steps_grow_with_the_images() -> None:
    experiment, told = last_training("lora_nf4", [0.04, 0.02, -0.02, -0.01, 0.0])
    assert (experiment.method, experiment.training.steps, experiment.training.flips) == ("qa_lora", 25, "none")
    assert not told


@pytest.mark.parametrize(
    ("name", "method"), [("lora_nf4", "qa_linear"), ("adalora_nf4", "qa_linear"), ("lora_r8", "linear")]
)
def test_where_training_gains_nothing_the_probe_is_trained_that_it_starts_from(name: str, method: str) -> None:
    experiment, told = last_training(name, [0.04, -0.02, -0.03, 0.01, -0.01])
    assert (experiment.method, experiment.training.steps, experiment.training.probe_l2) == (method, None, 0.01)
    changed = "on the folds training changed validation by -0.2 points"
    assert told == [f"  {name}: {changed}, so it is the linear probe that it starts from"]
