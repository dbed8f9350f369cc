"""What older records and study.json files say, in today's words."""

from __future__ import annotations

import json
from typing import Any

from peft_vit.config import AUGMENTATION_OF_FLIPS


def with_augmentation(content: Any) -> Any:
    """Return a run's specification, or a study's configuration, with `data.flips` as `training.augmentation`.

    What is not of the form that either had is returned as it is: reading it names the fault.

    Args:
        content: plain values.
    """
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, dict):
        return content
    flips = data.get("flips")
    if not isinstance(flips, str) or flips not in AUGMENTATION_OF_FLIPS:
        return content
    augmentation = tuple(one.model_dump() for one in AUGMENTATION_OF_FLIPS[flips])
    moved = {**content, "data": {key: value for key, value in data.items() if key != "flips"}}
    if "experiment" in content:
        moved["experiment"] = _trained_with(content["experiment"], augmentation)
    if isinstance(listed := content.get("experiments"), list | tuple):
        moved["experiments"] = [_trained_with(one, augmentation) for one in listed]
    return moved


def _trained_with(experiment: Any, augmentation: tuple[Any, ...]) -> Any:
    training = experiment.get("training") if isinstance(experiment, dict) else None
    if not isinstance(training, dict):
        return experiment
    return {**experiment, "training": {"augmentation": augmentation, **training}}


def study_with_augmentation(content: bytes) -> bytes:
    """Return a study.json likewise, both of its configurations."""
    if b'"flips"' not in content:
        return content
    try:
        study = json.loads(content)
    except (ValueError, RecursionError):
        return content
    if not isinstance(study, dict):
        return content
    if "configuration" in study:
        study["configuration"] = with_augmentation(study["configuration"])
    if isinstance(limited := study.get("limited"), dict) and "asked" in limited:
        limited["asked"] = with_augmentation(limited["asked"])
    return json.dumps(study).encode()
