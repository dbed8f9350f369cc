"""What records and study.json files of earlier versions say, in today's words; what no longer exists is refused.

A setting that went stands in `GONE`, a choice of one that stayed in `GONE_CHOICES`. A file in which such a setting has
the value at which it did nothing, or one of kept results, is read without it; any other is refused in one line that
names the version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft_vit.config import AUGMENTATION_OF_FLIPS
from peft_vit.errors import UserError

LAST_VERSION_WITH_ALL = "0.2.0"


@dataclass(frozen=True)
class Gone:
    """A setting of an experiment that this version does not have.

    Attributes:
        default: the value at which it did nothing.
        digested_after: the field behind which it stood in what `RunSpec.digest` hashes, so that digests of runs from
            before stay; None: digests left it out at its default.
        kept: values that did something, and that kept results have. Such a run can be read and compared, and is none
            that this version would make: the digest in its record is another than its specification has.
    """

    default: Any
    digested_after: str | None = None
    kept: tuple[Any, ...] = ()


GONE: dict[tuple[str, ...], Gone] = {  # by its place below an experiment
    ("adalora", "prune"): Gone("physical", digested_after="lambda_gain", kept=("reversible",)),
    ("training", "activation_storage"): Gone("exact"),
    ("qa_lora", "start"): Gone("zero"),
    ("qa_lora", "loftq_iterations"): Gone(1),
}
GONE_CHOICES: dict[tuple[str, ...], frozenset[str]] = {  # likewise, the values that went
    ("lora", "ranks", "rule"): frozenset({"eva", "spt", "gora"}),
    ("adalora", "importance_metric"): frozenset({"singular_value", "relative_magnitude"}),
}
# Keys of a study's configuration on which no result depends: dropped.
GONE_OF_STUDIES: tuple[str, ...] = ("hypotheses",)
_SIZES = ("image_size", "train_images", "shots_per_class", "validation_images", "test_images")
_RENAMED = {"initial_rank_budget": "initial_budget"}  # settings whose names were others


def migrated(content: Any) -> Any:
    """Return a run's specification, or a study's configuration, as this version says it.

    What is not of the form that any version had is returned as it is: reading it names the fault.

    Args:
        content: plain values.

    Raises:
        UserError: with the field, if it asks for what this version does not have.
    """
    if not isinstance(content, dict):
        return content
    content = _renamed({key: value for key, value in content.items() if key not in GONE_OF_STUDIES})
    if "experiment" in content:
        content["experiment"] = _experiment(content["experiment"])
    if isinstance(listed := content.get("experiments"), list | tuple):
        content["experiments"] = type(listed)(map(_experiment, listed))
    if isinstance(stopping := content.get("stopping"), dict):
        content["stopping"] = _stopping(stopping)
    return _with_augmentation(content)


def migrated_study(content: bytes) -> bytes:
    """Return a study.json likewise."""
    try:
        study = json.loads(content)
    except (ValueError, RecursionError):
        return content
    if not isinstance(study, dict):
        return content
    if "configuration" in study:
        study["configuration"] = migrated(study["configuration"])
    if isinstance(limited := study.pop("limited", None), dict):
        data, asked = (_images(one) for one in (study.get("configuration"), limited.get("asked")))
        if data != asked:
            raise UserError(
                "the study was made on smaller or fewer images than it asked for, which this version no longer does; "
                f"peft-vit {LAST_VERSION_WITH_ALL} goes on with it",
                field="limited",
            )
    return json.dumps(study).encode()


def _images(configuration: Any) -> list[Any]:
    """Return how large a study's images are, and how many: what a limit of time once made less of."""
    data = configuration.get("data") if isinstance(configuration, dict) else None
    return [data.get(name) if isinstance(data, dict) else None for name in _SIZES]


def with_digested(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """Return an experiment as digests see it: with the settings that went, where they stood, at their defaults."""
    whole = dict(experiment)
    for (*path, field), gone in GONE.items():
        if gone.digested_after is not None:
            whole = _inserted(whole, path, field, gone)
    return whole


def _inserted(values: Mapping[str, Any], path: list[str], field: str, gone: Gone) -> dict[str, Any]:
    if path:
        below = values.get(path[0])
        if not isinstance(below, Mapping):
            return dict(values)
        return {**values, path[0]: _inserted(below, path[1:], field, gone)}
    whole: dict[str, Any] = {}
    for key, value in values.items():
        whole[key] = value
        if key == gone.digested_after:
            whole[field] = gone.default
    return whole


def _experiment(experiment: Any) -> Any:
    for path, gone in GONE.items():
        experiment = _without(experiment, path, (gone.default, *gone.kept), path)
    for path, choices in GONE_CHOICES.items():
        if (chosen := _at(experiment, path)) in choices:
            raise _refusal(("experiment", *path), chosen)
    return experiment


def _stopping(stopping: dict[str, Any]) -> dict[str, Any]:
    if stopping.get("spending") == "anytime":
        raise _refusal(("stopping", "spending"), "anytime")
    # futility: null was its default, which is a number now
    return {key: value for key, value in stopping.items() if (key, value) != ("futility", None)}


def _at(values: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return values if isinstance(values, str) else None


def _without(values: Any, path: tuple[str, ...], read: tuple[Any, ...], whole: tuple[str, ...]) -> Any:
    if not isinstance(values, dict) or path[0] not in values:
        return values
    if len(path) > 1:
        return {**values, path[0]: _without(values[path[0]], path[1:], read, whole)}
    if values[path[0]] not in read:
        raise _refusal(("experiment", *whole), values[path[0]])
    return {key: value for key, value in values.items() if key != path[0]}


def _refusal(path: tuple[str, ...], value: Any) -> UserError:
    problem = f"{value} is something that this version no longer has"
    return UserError(f"{problem}; peft-vit {LAST_VERSION_WITH_ALL} reads it", field=".".join(path))


def _renamed(values: Any) -> Any:
    if isinstance(values, dict):
        return {_RENAMED.get(key, key): _renamed(value) for key, value in values.items()}
    return type(values)(map(_renamed, values)) if isinstance(values, list | tuple) else values


def _with_augmentation(content: dict[str, Any]) -> dict[str, Any]:
    """Say `data.flips` as `training.augmentation`."""
    data = content.get("data")
    flips = data.get("flips") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(flips, str) or flips not in AUGMENTATION_OF_FLIPS:
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
